"""Mixed preference optimisation of InternVL3 on MMPR-v1.2.

Reproduces shell/internvl3.0/mpo, on 256 GPUs (38b, 78b: 512), one pair each. `data.meta_path` names preference data:
lines with question, chosen and rejected answer.

  python -m internvl_jax.train --config configs/internvl3/mpo.py:8b --config.data.meta_path=MMPR-v1.2/meta.json

Sizes: 1b, 2b, 8b, 9b, 14b, 38b, 78b.
"""

from internvl_jax.config import TrainConfig
from internvl_jax.recipes import choose, published

SIZES = {
  # size: drop path, longest answer with its question, GPUs, when checkpoints are saved
  "1b": (0.1, 12288, 256, "no"),
  "2b": (0.1, 12288, 256, "no"),
  "8b": (0.1, 12288, 256, "no"),
  "9b": (0.1, 12288, 256, "no"),
  "14b": (0.1, 12288, 256, "no"),
  "38b": (0.4, 8192, 512, "steps"),
  "78b": (0.4, 8192, 512, "steps"),
}
CHOICES = tuple(SIZES)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `internvl_jax.recipes` says what `arg` may be, and it stands for 8b if empty."""
  choice = choose(arg, CHOICES, default="8b")
  drop_path, longest, gpus, save_strategy = SIZES[choice.size]
  config = published(choice, batch=gpus, devices=gpus)

  config.model.model_name_or_path = f"OpenGVLab/InternVL3-{choice.size.upper()}-Instruct"
  config.model.drop_path_rate = drop_path
  config.model.use_liger = True

  config.data.meta_path = "MMPR-v1.2/meta.json"
  config.data.conv_style = "internvl2_5"
  config.data.max_seq_length = longest
  config.data.dynamic_image_size = True
  config.data.max_dynamic_patch = 12
  config.data.use_thumbnail = True

  config.preference.loss_type = "sigmoid,bco_pair"
  config.preference.sigmoid_loss_weight = 0.8
  config.preference.bco_pair_loss_weight = 0.2
  config.preference.rpo_alpha = 1.0

  config.training.output_dir = f"work_dirs/internvl_chat_v3_mpo/Internvl3-{choice.size.upper()}"
  config.training.bf16 = True
  config.training.num_train_epochs = 1
  config.training.learning_rate = 2e-7
  config.training.lr_scheduler_type = "cosine"
  config.training.warmup_ratio = 0.03
  config.training.weight_decay = 0.05
  config.training.dataloader_num_workers = 8
  config.training.save_strategy = save_strategy
  config.training.save_steps = 200
  config.training.save_total_limit = 100
  return config
