"""Mini-InternVL, adapted to a domain: InternVL2's small sizes, everything trains.

Reproduces shell/mini_internvl/domain_adaptation, on 8 GPUs: 64 packed rows of 16384 tokens a step (drivelm: 8).
Domains: bdd (driving, BDD-X), drivelm (driving, several views), medical, remote (remote sensing).

  python -m internvl_jax.train --config configs/mini_internvl/finetune.py:2b,drivelm

Sizes: 1b, 2b, 4b, each with one of the domains.
"""

import sys
from pathlib import Path

from internvl_jax.config import TrainConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # A recipe is loaded by its path.
from _published import PACKED, Launch, build, choose

SIZES = {
  "1b": {"conv_style": "Hermes-2", "num_train_epochs": 2},
  "2b": {"conv_style": "internlm2-chat", "num_train_epochs": 2},
  "4b": {"conv_style": "phi3-chat", "num_train_epochs": 1},
}
MODELS = {"1b": "qwen2_0_5b", "2b": "internlm2_1_8b", "4b": "phi3_3_8b"}
DOMAINS = {
  "bdd": {"max_steps": 240},
  "drivelm": {"max_steps": 15100},
  "medical": {"max_steps": 2200},
  "remote": {"max_steps": 2500},
}
SAVING = {
  "2b,bdd": {"save_steps": 72},
  "1b,remote": {"save_steps": 500},
  "2b,remote": {"save_steps": 500, "save_total_limit": 7},
}
CHOICES = tuple(f"{size},{domain}" for size in SIZES for domain in DOMAINS)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `arg` is read by `_published.choose`, and stands for 2b,drivelm if empty."""
  choice = choose(arg, CHOICES, default="2b,drivelm")
  size, domain = choice.size, choice.variant
  data = "./InternVL-Domain-Adaptation-Data/train_meta/internvl_1_2_finetune"
  return build(
    choice,
    Launch(devices=8, batch=8 if domain == "drivelm" else 64),
    PACKED,
    {
      "dataloader_num_workers": 8,
      "drop_path_rate": 0.1,
      "learning_rate": 1e-5,
      "loss_reduction_all_gather": True,
      "max_seq_length": 8192,
      "meta_path": f"{data}_{domain}.json",
      "model_name_or_path": f"./pretrained/InternVL2-{size.upper()}",
      "output_dir": f"work_dirs/domain_adaptation/internvl2_{size}_{MODELS[size]}_dynamic_res_finetune_{domain}",
      "save_steps": 700,
      "save_total_limit": 3,
      "warmup_ratio": 0.03,
      "weight_decay": 0.01,
    },
    SIZES[size],
    DOMAINS[domain],
    SAVING.get(f"{size},{domain}", {}),
  )
