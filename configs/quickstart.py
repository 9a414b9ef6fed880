"""A small InternVL from scratch on easy-VQA: the whole program on two CPU cores in a few minutes.

`python scripts/quickstart_data.py` writes the data, the tokenizer and the model's config. Measured accuracies
and times stand in docs/quickstart.md.

  python -m internvl_jax.train --config configs/quickstart.py

What differs from fine-tuning a published checkpoint: weights are drawn at random (`random_init`), so the rate
is a hundred times higher and Adam's second moment shorter; tiles are single and 64 pixels wide.
"""

from internvl_jax.config import TrainConfig


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `arg` is the folder that scripts/quickstart_data.py wrote to, by default "quickstart"."""
  folder = arg or "quickstart"
  config = TrainConfig()

  config.model.model_name_or_path = f"{folder}/init"
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

  config.training.output_dir = f"{folder}/output"
  config.training.do_train = True
  config.training.per_device_train_batch_size = 32
  config.training.max_steps = 3000
  config.training.learning_rate = 1.5e-3
  config.training.lr_scheduler_type = "cosine"
  config.training.warmup_ratio = 0.05
  config.training.adam_beta2 = 0.95
  config.training.logging_steps = 20
  config.training.save_steps = 500
  config.training.save_total_limit = 2
  config.training.report_to = "tensorboard"
  config.training.dataloader_num_workers = 0

  config.eval.annotation = f"{folder}/data/test.jsonl"
  config.eval.root = f"{folder}/data/images"
  config.eval.group_field = "type"
  config.eval.batch_size = 256
  config.eval.max_new_tokens = 2
  return config
