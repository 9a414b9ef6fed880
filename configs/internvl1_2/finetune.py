"""Fine-tunes InternVL-Chat-V1.2-Plus on your own data: one tile an image, ViT frozen.

Reproduces shell/internvl1.2/2nd_finetune: in full on 16 GPUs, 128 rows a step; adapters of rank 16 (`lora`) on 2
GPUs, 16 rows.

  python -m internvl_jax.train --config configs/internvl1_2/finetune.py:40b,lora --config.data.meta_path=my_meta.json

The one size is 40b.
"""

import sys
from pathlib import Path

from internvl_jax.config import TrainConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # A recipe is loaded by its path.
from _published import Finetuning, choose, finetune

CHOICES = ("40b", "40b,lora")


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `arg` is read by `_published.choose`, and stands for 40b if empty."""
  choice = choose(arg, CHOICES, default="40b")
  size = Finetuning("./pretrained/InternVL-Chat-V1-2-Plus", {"learning_rate": 1e-5}, devices=16)
  generation = {
    "conv_style": "Hermes-2",
    "dynamic_image_size": False,
    "max_dynamic_patch": 1,
    "max_seq_length": 2048,
    "ps_version": "v1",
    "use_thumbnail": False,
  }
  return finetune(choice, size, "internvl_chat_v1_2/internvl_chat_v1_2_hermes2_yi34b_448_res", generation)
