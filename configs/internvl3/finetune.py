"""Fine-tunes InternVL3 on your own data: up to 12 tiles an image, ViT frozen.

Reproduces shell/internvl3.0/2nd_finetune, on 8 GPUs (38b: 16, 78b: 32), 128 rows a step; of 14b and 78b, two GPUs
share rows. There is no script for LoRA; --config.model.use_llm_lora=16 --config.model.freeze_llm=True
--config.model.freeze_mlp=True makes one.

  python -m internvl_jax.train --config configs/internvl3/finetune.py:8b --config.data.meta_path=my_meta.json

Sizes: 1b, 2b, 8b, 9b, 14b, 38b, 78b.
"""

from internvl_jax.config import TrainConfig
from internvl_jax.recipes import choose, published

SIZES = {
  # size: drop path, learning rate, rows a device takes at once, GPUs, GPUs that share rows
  "1b": (0.0, 1e-5, 4, 8, 1),
  "2b": (0.0, 2e-5, 4, 8, 1),
  "8b": (0.0, 2e-5, 4, 8, 1),
  "9b": (0.0, 2e-5, 4, 8, 1),
  "14b": (0.1, 2e-5, 4, 8, 2),
  "38b": (0.2, 2e-5, 2, 16, 1),
  "78b": (0.4, 2e-5, 2, 32, 2),
}
CHOICES = tuple(SIZES)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `internvl_jax.recipes` says what `arg` may be, and it stands for 8b if empty."""
  choice = choose(arg, CHOICES, default="8b")
  drop_path, rate, per_device, gpus, sharing = SIZES[choice.size]
  config = published(choice, batch=128, devices=gpus, per_device=per_device, sharing=sharing)

  config.model.model_name_or_path = f"OpenGVLab/InternVL3-{choice.size.upper()}"
  config.model.freeze_backbone = True  # The ViT.
  config.model.drop_path_rate = drop_path

  config.data.meta_path = "./shell/data/internvl_1_2_finetune_custom.json"
  config.data.conv_style = "internvl2_5"
  config.data.max_seq_length = 16384
  config.data.dynamic_image_size = True
  config.data.max_dynamic_patch = 12
  config.data.use_thumbnail = True

  config.training.output_dir = (
    f"work_dirs/internvl_chat_v3/internvl3_{choice.size}_dynamic_res_2nd_finetune_full"
  )
  config.training.bf16 = True
  config.training.num_train_epochs = 1
  config.training.learning_rate = rate
  config.training.lr_scheduler_type = "cosine"
  config.training.warmup_ratio = 0.03
  config.training.weight_decay = 0.05
  config.training.group_by_length = True
  config.training.dataloader_num_workers = 4
  config.training.save_steps = 200
  config.training.save_total_limit = 1
  return config
