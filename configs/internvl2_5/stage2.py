"""InternVL2.5, second stage: everything trains on instructions.

Reproduces shell/internvl2.5/stage2, on 512 GPUs with one packed row of 16384 tokens each, from what stage1.py (8b and
26b: stage1_5.py) left. The small sizes see the mixture several times.

  python -m internvl_jax.train --config configs/internvl2_5/stage2.py:8b --config.data.meta_path=my_meta.json

Sizes: 1b, 2b, 4b, 8b, 26b, 38b, 78b.
"""

import sys
from pathlib import Path

from internvl_jax.config import TrainConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # A recipe is loaded by its path.
from _published import PACKED, Launch, build, choose

SMALL = {"drop_path_rate": 0.1, "learning_rate": 4e-5}
LARGE = {"drop_path_rate": 0.4, "learning_rate": 2e-5}
ONCE = {"max_steps": 5500, "meta_path": "./path/to/finetune/data/mixture.json"}
TWICE = {"max_steps": 11000, "meta_path": "./path/to/finetune/data/mixture_2x.json"}
FOUR_TIMES = {"max_steps": 22000, "meta_path": "./path/to/finetune/data/mixture_4x.json"}
SIZES = {
  "1b": {**SMALL, **FOUR_TIMES, "weight_decay": 0.01},
  "2b": {**SMALL, **FOUR_TIMES, "weight_decay": 0.01},
  "4b": {**SMALL, **TWICE, "weight_decay": 0.01},
  "8b": {**SMALL, **ONCE},
  "26b": {**LARGE, **ONCE},
  "38b": {**LARGE, **ONCE, "use_liger": True},
  "78b": {**LARGE, **ONCE, "use_liger": True},
}
MODELS = {
  "1b": "qwen2_5_0_5b",
  "2b": "internlm2_5_1_8b",
  "4b": "qwen2_5_3b",
  "8b": "internlm2_5_7b",
  "26b": "internlm2_5_20b",
  "38b": "qwen2_5_32b",
  "78b": "qwen2_5_72b",
}
CHOICES = tuple(SIZES)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `arg` is read by `_published.choose`, and stands for 8b if empty."""
  choice = choose(arg, CHOICES, default="8b")
  script = f"work_dirs/internvl_chat_v2_5/internvl2_5_{choice.size}_{MODELS[choice.size]}_dynamic_res"
  before = "stage1_5" if choice.size in ("8b", "26b") else "stage1"
  return build(
    choice,
    Launch(devices=512, batch=512),
    PACKED,
    {
      "conv_style": "internvl2_5",
      "dataloader_num_workers": 8,
      "loss_reduction_all_gather": True,
      "max_seq_length": 16384,
      "model_name_or_path": f"./{script}_{before}/",
      "output_dir": f"{script}_stage2",
      "save_steps": 100,
      "save_total_limit": 3,
      "warmup_ratio": 0.03,
    },
    SIZES[choice.size],
  )
