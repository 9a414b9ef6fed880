"""Mixed preference optimisation of InternVL3.5.

Reproduces internvl_chat_gpt_oss/shell/internvl3_5_qwen3/*_mpo.sh and, for 20b, internvl3_5_gpt_oss/*_stage3_mpo.sh: 256
pairs a step. The scripts leave the number of nodes open; here it is one, of 8 GPUs (`devices=64` for eight). They name
no loss either: their program sets it, to TRL's sigmoid, bco_pair and sft with weights 0.8, 0.2 and 1. That is the loss
of the generations before, where sft is called rpo_alpha, as it is here. `data.meta_path` names preference data: lines
with question, chosen and rejected answer.

  python -m internvl_jax.train --config configs/internvl3_5/mpo.py:8b --config.data.meta_path=my_meta.json

Sizes: 1b, 2b, 4b, 8b, 14b, 38b (Qwen3), 30b, 241b (Qwen3-MoE), 20b (gpt-oss, from what sft.py left).
"""

import sys
from pathlib import Path

from internvl_jax.config import TrainConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # A recipe is loaded by its path.
from _published import MPO, Launch, build, choose

_20B = "work_dirs/internvl3_5_gpt_oss_20b_pretrain/internvl3_5_gpt_oss_20b"
SIZES = {
  "1b": {"model_name_or_path": "OpenGVLab/InternVL3_5-1B-Instruct"},
  "2b": {"model_name_or_path": "OpenGVLab/InternVL3_5-2B-Instruct"},
  "4b": {"model_name_or_path": "OpenGVLab/InternVL3_5-4B-Instruct"},
  "8b": {"model_name_or_path": "OpenGVLab/InternVL3_5-8B-Instruct", "drop_path_rate": 0.1},
  "14b": {"model_name_or_path": "OpenGVLab/InternVL3_5-14B-Instruct", "drop_path_rate": 0.1},
  "20b": {
    "model_name_or_path": f"{_20B}_stage2_sft",
    "output_dir": "work_dirs/internvl3_5_gpt_oss_20b_mpo/internvl3_5_gpt_oss_20b_stage3_mpo",
    "conv_style": "internvl3_5_gpt_oss",
    "drop_path_rate": 0.1,
  },
  "30b": {"model_name_or_path": "OpenGVLab/InternVL3_5-30B-A3B-Instruct", "drop_path_rate": 0.1},
  "38b": {"model_name_or_path": "OpenGVLab/InternVL3_5-38B-Instruct", "drop_path_rate": 0.4},
  "241b": {"model_name_or_path": "OpenGVLab/InternVL3_5-241B-A28B-Instruct", "drop_path_rate": 0.4},
}
CHOICES = tuple(SIZES)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `arg` is read by `_published.choose`, and stands for 8b if empty."""
  choice = choose(arg, CHOICES, default="8b")
  script = f"internvl3_5_{choice.size}_mpo"
  return build(
    choice,
    Launch(devices=8, batch=256),
    MPO,
    {
      "conv_style": "internvl2_5",
      "dataloader_num_workers": 16,
      "gradient_checkpointing": True,
      "learning_rate": 2e-7,
      "max_seq_length": 16384,
      "meta_path": "shell/data/debug_mpo.json",
      "num_train_epochs": 1,
      "output_dir": f"work_dirs/{script}/{script}",
      "save_steps": 200,
      "save_total_limit": 50,
      "warmup_ratio": 0.03,
    },
    SIZES[choice.size],
  )
