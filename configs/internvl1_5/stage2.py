"""InternVL-Chat-V1.5, second stage: everything trains, from what stage1.py left.

Reproduces shell/internvl1.5/*/*_finetune.sh: 1024 rows a step on 128 GPUs (2b, 4b) or 256 (26b, 40b). The script of
4b starts from the folder that it writes to; here it starts from stage1.py's, as the others do.

  python -m internvl_jax.train --config configs/internvl1_5/stage2.py:26b --config.data.meta_path=my_meta.json

Sizes: 2b (Mini-InternVL, InternLM2-1.8B), 4b (Mini-InternVL, Phi-3), 26b (InternLM2-20B), 40b (Yi-34B).
"""

import sys
from pathlib import Path

from internvl_jax.config import TrainConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # A recipe is loaded by its path.
from _published import Launch, build, choose

SMALL = {"drop_path_rate": 0.1, "learning_rate": 4e-5, "max_seq_length": 8192}
LARGE = {"drop_path_rate": 0.4, "learning_rate": 2e-5, "max_seq_length": 4096}
SIZES = {
  "2b": {**SMALL, "conv_style": "internlm2-chat", "weight_decay": 0.01},
  "4b": {**SMALL, "conv_style": "phi3-chat"},
  "26b": {**LARGE, "conv_style": "internlm2-chat"},
  "40b": {**LARGE, "conv_style": "Hermes-2"},
}
MODELS = {"2b": "internlm2_1_8b", "4b": "phi3_3_8b", "26b": "internlm2_20b", "40b": "hermes2_yi34b"}
DEVICES = {"2b": 128, "4b": 128, "26b": 256, "40b": 256}
CHOICES = tuple(SIZES)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `arg` is read by `_published.choose`, and stands for 26b if empty."""
  choice = choose(arg, CHOICES, default="26b")
  name = f"internvl_chat_v1_5_{MODELS[choice.size]}_dynamic_res"
  return build(
    choice,
    Launch(devices=DEVICES[choice.size], batch=1024, per_device=4),
    {
      "dataloader_num_workers": 4,
      "group_by_length": True,
      "meta_path": "path/to/finetune/data.json",
      "model_name_or_path": f"./work_dirs/{name}_pretrain",
      "num_train_epochs": 1,
      "output_dir": f"work_dirs/internvl_chat_v1_5/{name}_finetune",
      "save_steps": 200,
      "save_total_limit": 3,
      "warmup_ratio": 0.03,
    },
    SIZES[choice.size],
  )
