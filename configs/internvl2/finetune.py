"""Fine-tunes InternVL2 on your own data: up to 6 tiles an image, ViT frozen.

Reproduces shell/internvl2.0/2nd_finetune: in full on 8 GPUs (40b: 16, 76b: 32), 128 rows a step; adapters of rank 16
(`lora`) on 2 GPUs (76b: 8), 16 rows; `2b,lora_coco` captions COCO with adapters of rank 128 on 8 GPUs, 512 rows.

  python -m internvl_jax.train --config configs/internvl2/finetune.py:8b,lora --config.data.meta_path=my_meta.json

Sizes: 1b, 2b, 4b, 8b, 26b, 40b, 76b; each also with `lora`.
"""

import sys
from pathlib import Path

from internvl_jax.config import TrainConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # A recipe is loaded by its path.
from _published import Finetuning, choose, finetune

SMALL = {"drop_path_rate": 0.1, "learning_rate": 4e-5}
LARGE = {"drop_path_rate": 0.4, "learning_rate": 2e-5}
SIZES = {
  "1b": Finetuning("./pretrained/InternVL2-1B", {**SMALL, "conv_style": "Hermes-2", "weight_decay": 0.01}),
  "2b": Finetuning(
    "./pretrained/InternVL2-2B", {**SMALL, "conv_style": "internlm2-chat", "weight_decay": 0.01}
  ),
  "4b": Finetuning("./pretrained/InternVL2-4B", {**SMALL, "conv_style": "phi3-chat", "weight_decay": 0.01}),
  "8b": Finetuning("./pretrained/InternVL2-8B", {**SMALL, "conv_style": "internlm2-chat"}),
  "26b": Finetuning("./pretrained/InternVL2-26B", {**LARGE, "conv_style": "internlm2-chat"}, per_device=2),
  "40b": Finetuning(
    "./pretrained/InternVL2-40B", {**LARGE, "conv_style": "Hermes-2"}, per_device=2, devices=16
  ),
  "76b": Finetuning(
    "./pretrained/InternVL2-Llama3-76B",
    {**LARGE, "conv_style": "internlm2-chat"},
    per_device=1,
    devices=32,
    lora_devices=8,
  ),
}
MODELS = {
  "1b": "qwen2_0_5b",
  "2b": "internlm2_1_8b",
  "4b": "phi3_3_8b",
  "8b": "internlm2_7b",
  "26b": "internlm2_20b",
  "40b": "hermes2_yi_34b",
  "76b": "hermes2_llama3_70b",
}
CHOICES = (*SIZES, *(f"{size},lora" for size in SIZES), "2b,lora_coco")


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `arg` is read by `_published.choose`, and stands for 8b if empty."""
  choice = choose(arg, CHOICES, default="8b")
  script = f"internvl_chat_v2_0/internvl2_{choice.size}_{MODELS[choice.size]}_dynamic_res"
  return finetune(choice, SIZES[choice.size], script, {"max_dynamic_patch": 6, "max_seq_length": 4096})
