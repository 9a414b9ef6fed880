"""InternVL3.5, supervised fine-tuning of the pre-trained models: everything trains on instructions.

Reproduces internvl_chat_gpt_oss/shell/internvl3_5_qwen3/*_sft.sh and, for 20b, internvl3_5_gpt_oss/*_stage2_sft.sh: 512
packed rows of 32768 tokens a step. The scripts leave the number of nodes open; here it is one, of 8 GPUs (`devices=64`
for eight). Of 241b, two GPUs share rows.

  python -m internvl_jax.train --config configs/internvl3_5/sft.py:8b --config.data.meta_path=my_meta.json

Sizes: 1b, 2b, 4b, 8b, 14b, 38b (Qwen3), 30b, 241b (Qwen3-MoE), 20b (gpt-oss, from what pretrain.py left).
"""

import sys
from pathlib import Path

from internvl_jax.config import TrainConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # A recipe is loaded by its path.
from _published import PACKED, Launch, build, choose

_20B = "work_dirs/internvl3_5_gpt_oss_20b_pretrain/internvl3_5_gpt_oss_20b"
SIZES = {
  "1b": {"model_name_or_path": "OpenGVLab/InternVL3_5-1B-Pretrained"},
  "2b": {"model_name_or_path": "OpenGVLab/InternVL3_5-2B-Pretrained"},
  "4b": {"model_name_or_path": "OpenGVLab/InternVL3_5-4B-Pretrained"},
  "8b": {"model_name_or_path": "OpenGVLab/InternVL3_5-8B-Pretrained", "drop_path_rate": 0.1},
  "14b": {"model_name_or_path": "OpenGVLab/InternVL3_5-14B-Pretrained", "drop_path_rate": 0.1},
  "20b": {
    "model_name_or_path": f"{_20B}_stage1_pretrain",
    "output_dir": f"{_20B}_stage2_sft",
    "conv_style": "internvl3_5_gpt_oss",
    "drop_path_rate": 0.1,
  },
  "30b": {"model_name_or_path": "OpenGVLab/InternVL3_5-30B-A3B-Pretrained", "drop_path_rate": 0.1},
  "38b": {"model_name_or_path": "OpenGVLab/InternVL3_5-38B-Pretrained", "drop_path_rate": 0.4},
  "241b": {
    "model_name_or_path": "OpenGVLab/InternVL3_5-241B-A28B-Pretrained",
    "drop_path_rate": 0.4,
    "learning_rate": 2e-5,
  },
}
CHOICES = tuple(SIZES)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `arg` is read by `_published.choose`, and stands for 8b if empty."""
  choice = choose(arg, CHOICES, default="8b")
  script = f"internvl3_5_{choice.size}_sft"
  return build(
    choice,
    Launch(devices=8, batch=512, sharing=2 if choice.size == "241b" else 1),
    PACKED,
    {
      "conv_style": "internvl2_5",
      "dataloader_num_workers": 16,
      "gradient_checkpointing": True,
      "learning_rate": 8e-5,
      "max_packed_tokens": 32768,
      "max_seq_length": 32768,
      "max_steps": 8000,
      "meta_path": "shell/data/debug_sft.json",
      "num_images_expected": 96,
      "output_dir": f"work_dirs/{script}/{script}",
      "replacement": True,
      "save_steps": 500,
      "save_total_limit": 100,
      "warmup_ratio": 0.03,
    },
    SIZES[choice.size],
  )
