"""InternVL3.5 on gpt-oss-20b, from a ViT and a language model apart: the projector warms up, both are frozen.

Reproduces internvl_chat_gpt_oss/shell/internvl3_5_gpt_oss/*_stage0_mlp_warmup.sh: 256 packed rows of 32768 tokens a
step. The script leaves the number of nodes open; here it is one, of 8 GPUs (`devices=64` for eight).

  python -m internvl_jax.train --config configs/internvl3_5/warmup.py:20b --config.data.meta_path=my_meta.json

The one size is 20b. Next: pretrain.py.
"""

import sys
from pathlib import Path

from internvl_jax.config import TrainConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # A recipe is loaded by its path.
from _published import PACKED, Launch, build, choose

CHOICES = ("20b",)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `arg` is read by `_published.choose`, and stands for 20b if empty."""
  return build(
    choose(arg, CHOICES, default="20b"),
    Launch(devices=8, batch=256),
    PACKED,
    {
      "conv_style": "internvl3_5_gpt_oss",
      "dataloader_num_workers": 16,
      "drop_path_rate": 0.1,
      "freeze_backbone": True,
      "freeze_llm": True,
      "gradient_checkpointing": True,
      "learning_rate": 1e-3,
      "llm_path": "openai/gpt-oss-20b",
      "max_packed_tokens": 32768,
      "max_seq_length": 16384,
      "max_steps": 5000,
      "meta_path": "shell/data/debug_sft.json",
      "num_images_expected": 96,
      "num_train_epochs": 1,
      "output_dir": "work_dirs/internvl3_5_gpt_oss_20b_pretrain/internvl3_5_gpt_oss_20b_stage0_mlp_warmup",
      "replacement": True,
      "save_steps": 500,
      "save_total_limit": 20,
      "seed": 22110,
      "vision_path": "OpenGVLab/InternViT-300M-448px-V2_5",
      "warmup_ratio": 0.01,
    },
  )
