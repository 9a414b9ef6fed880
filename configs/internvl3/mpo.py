"""Mixed preference optimisation of InternVL3 on MMPR-v1.2.

Reproduces shell/internvl3.0/mpo, on 256 GPUs (38b, 78b: 512), one pair each. `data.meta_path` names preference data:
lines with question, chosen and rejected answer.

  python -m internvl_jax.train --config configs/internvl3/mpo.py:8b --config.data.meta_path=MMPR-v1.2/meta.json

Sizes: 1b, 2b, 8b, 9b, 14b, 38b, 78b.
"""

import sys
from pathlib import Path

from internvl_jax.config import TrainConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # A recipe is loaded by its path.
from _published import MPO, Launch, build, choose

SMALL = {"drop_path_rate": 0.1, "max_seq_length": 12288, "save_strategy": "no"}
LARGE = {"drop_path_rate": 0.4, "max_seq_length": 8192}
SIZES = {"1b": SMALL, "2b": SMALL, "8b": SMALL, "9b": SMALL, "14b": SMALL, "38b": LARGE, "78b": LARGE}
CHOICES = tuple(SIZES)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `arg` is read by `_published.choose`, and stands for 8b if empty."""
  choice = choose(arg, CHOICES, default="8b")
  devices = 512 if choice.size in ("38b", "78b") else 256
  return build(
    choice,
    Launch(devices=devices, batch=devices),
    MPO,
    {
      "conv_style": "internvl2_5",
      "dataloader_num_workers": 8,
      "learning_rate": 2e-7,
      "meta_path": "MMPR-v1.2/meta.json",
      "model_name_or_path": f"OpenGVLab/InternVL3-{choice.size.upper()}-Instruct",
      "num_train_epochs": 1,
      "output_dir": f"work_dirs/internvl_chat_v3_mpo/Internvl3-{choice.size.upper()}",
      "save_steps": 200,
      "save_total_limit": 100,
      "use_liger": True,
      "warmup_ratio": 0.03,
    },
    SIZES[choice.size],
  )
