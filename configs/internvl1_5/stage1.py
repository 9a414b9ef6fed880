"""InternVL-Chat-V1.5, first stage: the projector, and in two sizes the ViT, learn on captions; the LLM is frozen.

Reproduces shell/internvl1.5/*/*_pretrain.sh: 2048 rows a step on 128 GPUs (2b, 4b) or 256 (26b, 40b).

  python -m internvl_jax.train --config configs/internvl1_5/stage1.py:26b --config.data.meta_path=my_meta.json

Sizes: 2b (Mini-InternVL, InternLM2-1.8B), 4b (Mini-InternVL, Phi-3), 26b (InternLM2-20B), 40b (Yi-34B).
"""

import sys
from pathlib import Path

from internvl_jax.config import TrainConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # A recipe is loaded by its path.
from _published import Launch, build, choose

SIZES = {
  "2b": {
    "vision_path": "./pretrained/InternViT-300M-448px",
    "llm_path": "./pretrained/internlm2-chat-1_8b",
    "conv_style": "internlm2-chat",
    "drop_path_rate": 0.1,
    "learning_rate": 2e-5,
    "weight_decay": 0.01,
  },
  "4b": {
    "vision_path": "./pretrained/InternViT-300M-448px",
    "llm_path": "./pretrained/Phi-3-mini-128k-instruct",
    "conv_style": "phi3-chat",
    "freeze_backbone": True,
    "learning_rate": 2e-4,
  },
  "26b": {
    "vision_path": "./pretrained/InternViT-6B-448px-V1-5",
    "llm_path": "./pretrained/internlm2-chat-20b",
    "conv_style": "internlm2-chat",
    "drop_path_rate": 0.2,
    "learning_rate": 1e-5,
  },
  "40b": {
    "vision_path": "./pretrained/InternViT-6B-448px-V1-5",
    "mlp_path": "./pretrained/InternViT-6B-448px-V1-2/mlp_projector/hermes_2_yi_34b.pth",
    "llm_path": "./pretrained/Nous-Hermes-2-Yi-34B",
    "conv_style": "Hermes-2",
    "freeze_backbone": True,
    "learning_rate": 1e-4,
  },
}
LAUNCHES = {
  "2b": Launch(devices=128, batch=2048, per_device=8),
  "4b": Launch(devices=128, batch=2048, per_device=8),
  "26b": Launch(devices=256, batch=2048, per_device=4),
  "40b": Launch(devices=256, batch=2048, per_device=2),
}
MODELS = {"2b": "internlm2_1_8b", "4b": "phi3_3_8b", "26b": "internlm2_20b", "40b": "hermes2_yi34b"}
CHOICES = tuple(SIZES)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `arg` is read by `_published.choose`, and stands for 26b if empty."""
  choice = choose(arg, CHOICES, default="26b")
  return build(
    choice,
    LAUNCHES[choice.size],
    {
      "dataloader_num_workers": 4,
      "freeze_llm": True,
      "max_seq_length": 4096,
      "meta_path": "path/to/pretrain/data.json",
      "num_train_epochs": 1,
      "output_dir": f"work_dirs/internvl_chat_v1_5_{MODELS[choice.size]}_dynamic_res_pretrain",
      "save_steps": 200,
      "save_total_limit": 3,
      "warmup_steps": 100,
    },
    SIZES[choice.size],
  )
