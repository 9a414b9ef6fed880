"""Fine-tunes InternVL-Chat-V1.5 and Mini-InternVL-Chat-V1.5 on your own data: up to 12 tiles an image, ViT frozen.

Reproduces shell/internvl1.5/2nd_finetune: in full on 8 GPUs, 128 rows a step; adapters of rank 16 (`lora`) on 2
GPUs, 16 rows.

  python -m internvl_jax.train --config configs/internvl1_5/finetune.py:26b,lora --config.data.meta_path=my_meta.json

Sizes: 2b, 4b (Mini-InternVL), 26b; each also with `lora`.
"""

import sys
from pathlib import Path

from internvl_jax.config import TrainConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # A recipe is loaded by its path.
from _published import Finetuning, choose, finetune

SMALL = {"drop_path_rate": 0.1, "learning_rate": 4e-5}
LARGE = {"drop_path_rate": 0.4, "learning_rate": 2e-5}
SIZES = {
  "2b": Finetuning(
    "./pretrained/Mini-InternVL-Chat-2B-V1-5",
    {**SMALL, "conv_style": "internlm2-chat", "weight_decay": 0.01},
  ),
  "4b": Finetuning("./pretrained/Mini-InternVL-Chat-4B-V1-5", {**SMALL, "conv_style": "phi3-chat"}),
  "26b": Finetuning(
    "./pretrained/InternVL-Chat-V1-5", {**LARGE, "conv_style": "internlm2-chat"}, per_device=2
  ),
}
MODELS = {"2b": "internlm2_1_8b", "4b": "phi3_3_8b", "26b": "internlm2_20b"}
CHOICES = (*SIZES, *(f"{size},lora" for size in SIZES))


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `arg` is read by `_published.choose`, and stands for 26b if empty."""
  choice = choose(arg, CHOICES, default="26b")
  script = f"internvl_chat_v1_5/internvl_chat_v1_5_{MODELS[choice.size]}_dynamic_res"
  return finetune(choice, SIZES[choice.size], script, {"max_dynamic_patch": 12, "max_seq_length": 4096})
