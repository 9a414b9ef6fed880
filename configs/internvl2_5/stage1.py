"""InternVL2.5, first stage: the projector warms up between a ViT and a language model, both frozen.

Reproduces shell/internvl2.5/stage1, on 512 GPUs with one packed row of 16384 tokens each.

  python -m internvl_jax.train --config configs/internvl2_5/stage1.py:8b --config.data.meta_path=my_meta.json

Sizes: 1b, 2b, 4b, 8b, 26b, 38b, 78b. Next: stage1_5.py for 8b and 26b, stage2.py for the others.
"""

import sys
from pathlib import Path

from internvl_jax.config import TrainConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # A recipe is loaded by its path.
from _published import PACKED, Launch, build, choose

VIT_300M = "./pretrained/InternViT-300M-448px-V2_5"
VIT_6B = "./pretrained/InternViT-6B-448px-V2_5"
SIZES = {
  "1b": {
    "vision_path": VIT_300M,
    "llm_path": "./pretrained/Qwen2.5-0.5B-Instruct",
    "weight_decay": 0.01,
  },
  "2b": {
    "vision_path": VIT_300M,
    "llm_path": "./pretrained/internlm2_5-1_8b-chat",
    "weight_decay": 0.01,
  },
  "4b": {
    "vision_path": VIT_300M,
    "llm_path": "./pretrained/Qwen2.5-3B-Instruct",
    "weight_decay": 0.01,
  },
  # These two continue with the ViTs of before, and their ViT learns in stage 1.5.
  "8b": {
    "vision_path": "./pretrained/InternViT-300M-448px",
    "llm_path": "./pretrained/internlm2_5-7b-chat",
  },
  "26b": {
    "vision_path": "./pretrained/InternViT-6B-448px-V1-5",
    "llm_path": "./pretrained/internlm2_5-20b-chat",
  },
  "38b": {"vision_path": VIT_6B, "llm_path": "./pretrained/Qwen2.5-32B-Instruct"},
  "78b": {"vision_path": VIT_6B, "llm_path": "./pretrained/Qwen2.5-72B-Instruct"},
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
  script = f"internvl2_5_{choice.size}_{MODELS[choice.size]}_dynamic_res_stage1"
  return build(
    choice,
    Launch(devices=512, batch=512),
    PACKED,
    {
      "conv_style": "internvl2_5",
      "dataloader_num_workers": 8,
      "freeze_backbone": True,
      "freeze_llm": True,
      "learning_rate": 2e-4,
      "loss_reduction_all_gather": True,
      "max_seq_length": 16384,
      "max_steps": 100000,
      "meta_path": "./path/to/pretrain/data/mixture.json",
      "output_dir": f"work_dirs/internvl_chat_v2_5/{script}",
      "save_steps": 100,
      "save_total_limit": 3,
      "warmup_steps": 100,
    },
    SIZES[choice.size],
  )
