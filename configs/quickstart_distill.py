"""Distillation of the quickstart's model into one of half its size, on two CPU cores.

`scripts/quickstart_distill.sh` runs all of it, and trains the same student on the labels alone to compare.
`scripts/quickstart_data.py` writes the student's config. Measured numbers stand in docs/distillation.md.

  python -m internvl_jax.train --config configs/quickstart_distill.py

What differs from configs/quickstart.py: the model, its teacher, and that it takes fewer steps.
"""

from internvl_jax.config import TrainConfig


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `arg` is the folder that the quickstart wrote to, by default "quickstart"."""
  folder = arg or "quickstart"
  config = TrainConfig()

  config.model.model_name_or_path = f"{folder}/student"
  config.model.grad_checkpoint = False
  config.runtime.random_init = True
  config.runtime.scan_unroll = 3

  config.data.meta_path = f"{folder}/data/meta.json"
  config.data.conv_style = "internvl2_5"
  config.data.force_image_size = 64
  config.data.normalize_type = "imagenet"
  config.data.max_seq_length = 64
  config.loader.sequence_buckets = (48, 64)
  config.loader.tile_buckets = (32,)

  config.distillation.teacher = f"{folder}/output"
  config.distillation.cache_dir = f"{folder}/teacher_logps"
  config.distillation.top_k = 8
  config.distillation.temperature = 2.0

  config.training.output_dir = f"{folder}/output_distill"
  config.training.do_train = True
  config.training.per_device_train_batch_size = 32
  config.training.max_steps = 1000
  config.training.learning_rate = 1.5e-3
  config.training.lr_scheduler_type = "cosine"
  config.training.warmup_ratio = 0.05
  config.training.adam_beta2 = 0.95
  config.training.logging_steps = 20
  config.training.save_steps = 500
  config.training.save_total_limit = 1
  config.training.report_to = "tensorboard"
  config.training.dataloader_num_workers = 0

  config.eval.annotation = f"{folder}/data/test.jsonl"
  config.eval.root = f"{folder}/data/images"
  config.eval.group_field = "type"
  config.eval.batch_size = 256
  config.eval.max_new_tokens = 2
  return config
