"""Mixed preference optimisation of InternVL2-8B on MMPR.

Reproduces shell/internvl2.0_mpo, on 256 GPUs, one pair each. `data.meta_path` names preference data: lines with
question, chosen and rejected answer.

  python -m internvl_jax.train --config configs/internvl2/mpo.py:8b --config.data.meta_path=MMPR/meta.json

The one size is 8b.
"""

import sys
from pathlib import Path

from internvl_jax.config import TrainConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # A recipe is loaded by its path.
from _published import MPO, Launch, build, choose

CHOICES = ("8b",)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `arg` is read by `_published.choose`, and stands for 8b if empty."""
  return build(
    choose(arg, CHOICES, default="8b"),
    Launch(devices=256, batch=256),
    MPO,
    {
      "conv_style": "internlm2-chat",
      "dataloader_num_workers": 8,
      "drop_path_rate": 0.1,
      "learning_rate": 5e-6,
      "max_seq_length": 6144,
      "meta_path": "MMPR/meta.json",
      "model_name_or_path": "ckpt/OpenGVLab/InternVL2-8B",
      "num_train_epochs": 1,
      "output_dir": "work_dirs/internvl_chat_v2_0/internvl2_8b_internlm2_7b_dynamic_res_mpo_full",
      "save_steps": 100,
      "save_strategy": "no",
      "save_total_limit": 100,
      "warmup_ratio": 0.03,
    },
  )
