"""InternVL-Chat-V1.2, second stage: everything trains, from a ViT, a projector and a language model apart.

Reproduces shell/internvl1.2/hermes2_yi34b, on 64 GPUs: images are squeezed into one tile.

  python -m internvl_jax.train --config configs/internvl1_2/stage2.py:40b --config.data.meta_path=my_meta.json

The one size is 40b (InternViT-6B and Nous-Hermes-2-Yi-34B).
"""

from internvl_jax.config import TrainConfig
from internvl_jax.recipes import choose, published

CHOICES = ("40b",)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `internvl_jax.recipes` says what `arg` may be, and it stands for 40b if empty."""
  choice = choose(arg, CHOICES, default="40b")
  config = published(choice, batch=512, devices=64, per_device=8)

  config.model.vision_path = "./pretrained/InternViT-6B-448px-V1-2"
  config.model.mlp_path = "./pretrained/InternViT-6B-448px-V1-2/mlp_projector/hermes_2_yi_34b.pth"
  config.model.llm_path = "./pretrained/Nous-Hermes-2-Yi-34B"
  config.model.drop_path_rate = 0.4

  config.data.meta_path = "./shell/data/internvl_1_2_finetune.json"
  config.data.conv_style = "Hermes-2"
  config.data.max_seq_length = 2048
  config.data.dynamic_image_size = False  # Images are squeezed into one tile.

  config.training.output_dir = (
    "work_dirs/internvl_chat_v1_2/internvl_chat_v1_2_hermes2_yi34b_448_res_finetune"
  )
  config.training.bf16 = True
  config.training.num_train_epochs = 1
  config.training.learning_rate = 1e-5
  config.training.lr_scheduler_type = "cosine"
  config.training.warmup_ratio = 0.03
  config.training.weight_decay = 0.05
  config.training.group_by_length = True
  config.training.dataloader_num_workers = 4
  config.training.save_steps = 200
  config.training.save_total_limit = 3
  return config
