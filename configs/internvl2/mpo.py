"""Mixed preference optimisation of InternVL2-8B on MMPR.

Reproduces shell/internvl2.0_mpo, on 256 GPUs, one pair each. `data.meta_path` names preference data: lines with
question, chosen and rejected answer.

  python -m internvl_jax.train --config configs/internvl2/mpo.py:8b --config.data.meta_path=MMPR/meta.json

The one size is 8b.
"""

from internvl_jax.config import TrainConfig
from internvl_jax.recipes import choose, published

CHOICES = ("8b",)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `internvl_jax.recipes` says what `arg` may be, and it stands for 8b if empty."""
  choice = choose(arg, CHOICES, default="8b")
  config = published(choice, batch=256, devices=256)

  config.model.model_name_or_path = "ckpt/OpenGVLab/InternVL2-8B"
  config.model.drop_path_rate = 0.1

  config.data.meta_path = "MMPR/meta.json"
  config.data.conv_style = "internlm2-chat"
  config.data.max_seq_length = 6144
  config.data.dynamic_image_size = True
  config.data.max_dynamic_patch = 12
  config.data.use_thumbnail = True

  config.preference.loss_type = "sigmoid,bco_pair"
  config.preference.sigmoid_loss_weight = 0.8
  config.preference.bco_pair_loss_weight = 0.2
  config.preference.rpo_alpha = 1.0

  config.training.output_dir = "work_dirs/internvl_chat_v2_0/internvl2_8b_internlm2_7b_dynamic_res_mpo_full"
  config.training.bf16 = True
  config.training.num_train_epochs = 1
  config.training.learning_rate = 5e-6
  config.training.lr_scheduler_type = "cosine"
  config.training.warmup_ratio = 0.03
  config.training.weight_decay = 0.05
  config.training.dataloader_num_workers = 8
  config.training.save_strategy = "no"  # The final model alone.
  config.training.save_steps = 100
  config.training.save_total_limit = 100
  return config
