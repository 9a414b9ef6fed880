"""InternVL3.5 on gpt-oss-20b: everything trains on the pre-training mixture, from what warmup.py left.

Reproduces internvl_chat_gpt_oss/shell/internvl3_5_gpt_oss/*_stage1_pretrain.sh: 512 packed rows of 32768 tokens a
step. The script leaves the number of nodes open; here it is one, of 8 GPUs (`devices=64` for eight).

  python -m internvl_jax.train --config configs/internvl3_5/pretrain.py:20b --config.data.meta_path=my_meta.json

The one size is 20b. Next: sft.py.
"""

import sys
from pathlib import Path

from internvl_jax.config import TrainConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # A recipe is loaded by its path.
from _published import PACKED, Launch, build, choose

CHOICES = ("20b",)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `arg` is read by `_published.choose`, and stands for 20b if empty."""
  folder = "work_dirs/internvl3_5_gpt_oss_20b_pretrain"
  return build(
    choose(arg, CHOICES, default="20b"),
    Launch(devices=8, batch=512),
    PACKED,
    {
      "conv_style": "internvl3_5_gpt_oss",
      "dataloader_num_workers": 16,
      "drop_path_rate": 0.1,
      "gradient_checkpointing": True,
      "learning_rate": 2e-5,
      "max_packed_tokens": 32768,
      "max_seq_length": 32768,
      "max_steps": 15000,
      "meta_path": "shell/data/debug_sft.json",
      "model_name_or_path": f"{folder}/internvl3_5_gpt_oss_20b_stage0_mlp_warmup",
      "num_images_expected": 96,
      "output_dir": f"{folder}/internvl3_5_gpt_oss_20b_stage1_pretrain",
      "replacement": True,
      "save_steps": 500,
      "save_total_limit": 100,
      "warmup_ratio": 0.03,
    },
  )
