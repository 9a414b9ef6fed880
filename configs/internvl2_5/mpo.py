"""Mixed preference optimisation of InternVL2.5 on MMPR-v1.1.

Reproduces shell/internvl2.5_mpo, on 256 GPUs (38b, 78b: 512), one pair each. `data.meta_path` names preference data:
lines with question, chosen and rejected answer.

  python -m internvl_jax.train --config configs/internvl2_5/mpo.py:8b --config.data.meta_path=MMPR-v1.1/meta.json

Sizes: 1b, 2b, 4b, 8b, 26b, 38b, 78b.
"""

from internvl_jax.config import TrainConfig
from internvl_jax.recipes import choose, published

SIZES = {
  # size: drop path, GPUs, when checkpoints are saved, and every how many steps
  "1b": (0.1, 256, "no", 100),
  "2b": (0.1, 256, "no", 100),
  "4b": (0.1, 256, "no", 100),
  "8b": (0.1, 256, "no", 100),
  "26b": (0.4, 256, "no", 100),
  "38b": (0.4, 512, "steps", 200),
  "78b": (0.4, 512, "steps", 200),
}
CHOICES = tuple(SIZES)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `internvl_jax.recipes` says what `arg` may be, and it stands for 8b if empty."""
  choice = choose(arg, CHOICES, default="8b")
  drop_path, gpus, save_strategy, save_steps = SIZES[choice.size]
  config = published(choice, batch=gpus, devices=gpus)

  config.model.model_name_or_path = f"OpenGVLab/InternVL2_5-{choice.size.upper()}"
  config.model.drop_path_rate = drop_path
  config.model.use_liger = True

  config.data.meta_path = "MMPR-v1.1/meta.json"
  config.data.conv_style = "internvl2_5"
  config.data.max_seq_length = 8192
  config.data.dynamic_image_size = True
  config.data.max_dynamic_patch = 12
  config.data.use_thumbnail = True

  config.preference.loss_type = "sigmoid,bco_pair"
  config.preference.sigmoid_loss_weight = 0.8
  config.preference.bco_pair_loss_weight = 0.2
  config.preference.rpo_alpha = 1.0

  config.training.output_dir = f"work_dirs/internvl_chat_v2_5_mpo/Internvl2_5-{choice.size.upper()}-MPO"
  config.training.bf16 = True
  config.training.num_train_epochs = 1
  config.training.learning_rate = 1e-6
  config.training.lr_scheduler_type = "cosine"
  config.training.warmup_ratio = 0.03
  config.training.weight_decay = 0.05
  config.training.dataloader_num_workers = 8
  config.training.save_strategy = save_strategy
  config.training.save_steps = save_steps
  config.training.save_total_limit = 100
  return config
