"""InternVL-Chat-V1.2, second stage: everything trains, from a ViT, a projector and a language model apart.

Reproduces shell/internvl1.2/hermes2_yi34b, on 64 GPUs: images are squeezed into one tile.

  python -m internvl_jax.train --config configs/internvl1_2/stage2.py:40b --config.data.meta_path=my_meta.json

The one size is 40b (InternViT-6B and Nous-Hermes-2-Yi-34B).
"""

import sys
from pathlib import Path

from internvl_jax.config import TrainConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # A recipe is loaded by its path.
from _published import Launch, build, choose

CHOICES = ("40b",)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `arg` is read by `_published.choose`, and stands for 40b if empty."""
  return build(
    choose(arg, CHOICES, default="40b"),
    Launch(devices=64, batch=512, per_device=8),
    {
      "conv_style": "Hermes-2",
      "dataloader_num_workers": 4,
      "drop_path_rate": 0.4,
      "dynamic_image_size": False,
      "group_by_length": True,
      "learning_rate": 1e-5,
      "llm_path": "./pretrained/Nous-Hermes-2-Yi-34B",
      "max_seq_length": 2048,
      "meta_path": "./shell/data/internvl_1_2_finetune.json",
      "mlp_path": "./pretrained/InternViT-6B-448px-V1-2/mlp_projector/hermes_2_yi_34b.pth",
      "num_train_epochs": 1,
      "output_dir": "work_dirs/internvl_chat_v1_2/internvl_chat_v1_2_hermes2_yi34b_448_res_finetune",
      "save_steps": 200,
      "save_total_limit": 3,
      "use_thumbnail": False,
      "vision_path": "./pretrained/InternViT-6B-448px-V1-2",
      "warmup_ratio": 0.03,
    },
  )
