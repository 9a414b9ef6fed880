"""Fine-tunes InternVL2.5 on your own data: up to 6 tiles an image, ViT frozen.

Reproduces shell/internvl2.5/2nd_finetune: in full on 8 GPUs (38b: 16, 78b: 32), 128 rows a step; adapters of rank 16
(`lora`) on 2 GPUs (78b: 8), 16 rows; `2b,lora_coco` captions COCO with adapters of rank 128 on 8 GPUs, 512 rows.

  python -m internvl_jax.train --config configs/internvl2_5/finetune.py:8b,lora --config.data.meta_path=my_meta.json

Sizes: 1b, 2b, 4b, 8b, 26b, 38b, 78b; each also with `lora`.
"""

import sys
from pathlib import Path

from internvl_jax.config import TrainConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # A recipe is loaded by its path.
from _published import Finetuning, choose, finetune

SMALL = {"drop_path_rate": 0.1, "learning_rate": 4e-5}
LARGE = {"drop_path_rate": 0.4, "learning_rate": 2e-5}
SIZES = {
  "1b": Finetuning("OpenGVLab/InternVL2_5-1B", {**SMALL, "weight_decay": 0.01}),
  "2b": Finetuning("OpenGVLab/InternVL2_5-2B", {**SMALL, "weight_decay": 0.01}),
  "4b": Finetuning("OpenGVLab/InternVL2_5-4B", {**SMALL, "weight_decay": 0.01}),
  "8b": Finetuning("OpenGVLab/InternVL2_5-8B", SMALL),
  "26b": Finetuning("OpenGVLab/InternVL2_5-26B", LARGE, per_device=2),
  "38b": Finetuning("OpenGVLab/InternVL2_5-38B", LARGE, per_device=2, devices=16),
  "78b": Finetuning("OpenGVLab/InternVL2_5-78B", LARGE, per_device=1, devices=32, lora_devices=8),
}
CHOICES = (*SIZES, *(f"{size},lora" for size in SIZES), "2b,lora_coco")


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `arg` is read by `_published.choose`, and stands for 8b if empty."""
  choice = choose(arg, CHOICES, default="8b")
  script = f"internvl_chat_v2_5/internvl2_5_{choice.size}_dynamic_res"
  generation = {"conv_style": "internvl2_5", "max_dynamic_patch": 6, "max_seq_length": 8192}
  return finetune(choice, SIZES[choice.size], script, generation)
