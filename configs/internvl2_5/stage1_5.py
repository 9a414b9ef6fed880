"""InternVL2.5, stage 1.5: the ViT learns with the projector, under a frozen language model.

Reproduces shell/internvl2.5/stage1.5, on 512 GPUs: 1024 packed rows of 16384 tokens a step, from what stage1.py left.

  python -m internvl_jax.train --config configs/internvl2_5/stage1_5.py:8b --config.data.meta_path=my_meta.json

Sizes: 8b, 26b.
"""

import sys
from pathlib import Path

from internvl_jax.config import TrainConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # A recipe is loaded by its path.
from _published import PACKED, Launch, build, choose

MODELS = {"8b": "internlm2_5_7b", "26b": "internlm2_5_20b"}
SIZES = {"8b": {"drop_path_rate": 0.1}, "26b": {"drop_path_rate": 0.4}}
CHOICES = tuple(SIZES)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `arg` is read by `_published.choose`, and stands for 8b if empty."""
  choice = choose(arg, CHOICES, default="8b")
  script = f"work_dirs/internvl_chat_v2_5/internvl2_5_{choice.size}_{MODELS[choice.size]}_dynamic_res"
  return build(
    choice,
    Launch(devices=512, batch=1024),
    PACKED,
    {
      "conv_style": "internvl2_5",
      "dataloader_num_workers": 8,
      "freeze_llm": True,
      "learning_rate": 1e-5,
      "loss_reduction_all_gather": True,
      "max_seq_length": 16384,
      "max_steps": 100000,
      "meta_path": "./path/to/pretrain/data/mixture.json",
      "model_name_or_path": f"./{script}_stage1/",
      "output_dir": f"{script}_stage1_5",
      "save_steps": 100,
      "save_total_limit": 3,
      "warmup_steps": 100,
    },
    SIZES[choice.size],
  )
