"""InternVL3.5 on gpt-oss-20b, from a ViT and a language model apart: the projector warms up, both are frozen.

Reproduces internvl_chat_gpt_oss/shell/internvl3_5_gpt_oss/*_stage0_mlp_warmup.sh: 256 packed rows of 32768 tokens a
step. The script leaves the number of nodes open; here it is one, of 8 GPUs (`devices=64` for eight).

  python -m internvl_jax.train --config configs/internvl3_5/warmup.py:20b --config.data.meta_path=my_meta.json

The one size is 20b. Next: pretrain.py.
"""

from internvl_jax.config import TrainConfig
from internvl_jax.recipes import choose, published

CHOICES = ("20b",)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `internvl_jax.recipes` says what `arg` may be, and it stands for 20b if empty."""
  choice = choose(arg, CHOICES, default="20b")
  config = published(choice, batch=256, devices=8)

  config.model.vision_path = "OpenGVLab/InternViT-300M-448px-V2_5"
  config.model.llm_path = "openai/gpt-oss-20b"
  config.model.freeze_backbone = True  # The ViT.
  config.model.freeze_llm = True
  config.model.drop_path_rate = 0.1

  config.data.meta_path = "shell/data/debug_sft.json"
  config.data.conv_style = "internvl3_5_gpt_oss"
  config.data.max_seq_length = 16384
  config.data.dynamic_image_size = True
  config.data.max_dynamic_patch = 12
  config.data.use_thumbnail = True
  config.data.use_packed_ds = True
  config.data.max_packed_tokens = 32768
  config.data.num_images_expected = 96
  config.data.strict_mode = False
  config.data.replacement = True
  config.data.loss_reduction = "square"

  config.training.output_dir = (
    "work_dirs/internvl3_5_gpt_oss_20b_pretrain/internvl3_5_gpt_oss_20b_stage0_mlp_warmup"
  )
  config.training.bf16 = True
  config.training.max_steps = 5000
  config.training.num_train_epochs = 1  # The steps go before it.
  config.training.learning_rate = 1e-3
  config.training.lr_scheduler_type = "cosine"
  config.training.warmup_ratio = 0.01
  config.training.weight_decay = 0.05
  config.training.gradient_checkpointing = True
  config.training.seed = 22110
  config.training.dataloader_num_workers = 16
  config.training.remove_unused_columns = False
  config.training.save_steps = 500
  config.training.save_total_limit = 20
  return config
