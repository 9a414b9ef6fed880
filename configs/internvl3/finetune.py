"""Fine-tunes InternVL3 on your own data: up to 12 tiles an image, ViT frozen.

Reproduces shell/internvl3.0/2nd_finetune, on 8 GPUs (38b: 16, 78b: 32), 128 rows a step; of 14b and 78b, two GPUs share rows.
There is no script for LoRA;
--config.model.use_llm_lora=16 --config.model.freeze_llm=True --config.model.freeze_mlp=True makes one.

  python -m internvl_jax.train --config configs/internvl3/finetune.py:8b --config.data.meta_path=my_meta.json

Sizes: 1b, 2b, 8b, 9b, 14b, 38b, 78b.
"""

import sys
from pathlib import Path

from internvl_jax.config import TrainConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # A recipe is loaded by its path.
from _published import Finetuning, choose, finetune

SIZES = {
  "1b": Finetuning("OpenGVLab/InternVL3-1B", {"learning_rate": 1e-5}),
  "2b": Finetuning("OpenGVLab/InternVL3-2B", {}),
  "8b": Finetuning("OpenGVLab/InternVL3-8B", {}),
  "9b": Finetuning("OpenGVLab/InternVL3-9B", {}),
  "14b": Finetuning("OpenGVLab/InternVL3-14B", {"drop_path_rate": 0.1}, sharing=2),
  "38b": Finetuning("OpenGVLab/InternVL3-38B", {"drop_path_rate": 0.2}, per_device=2, devices=16),
  "78b": Finetuning("OpenGVLab/InternVL3-78B", {"drop_path_rate": 0.4}, per_device=2, devices=32, sharing=2),
}
CHOICES = tuple(SIZES)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `arg` is read by `_published.choose`, and stands for 8b if empty."""
  choice = choose(arg, CHOICES, default="8b")
  generation = {"conv_style": "internvl2_5", "learning_rate": 2e-5, "max_seq_length": 16384}
  return finetune(
    choice, SIZES[choice.size], f"internvl_chat_v3/internvl3_{choice.size}_dynamic_res", generation
  )
