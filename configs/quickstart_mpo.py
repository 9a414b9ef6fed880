"""Preference optimisation of the quickstart's model: right answers against wrong ones, on two CPU cores.

`scripts/quickstart_mpo.sh` runs all of it; `scripts/quickstart_data.py` writes the pairs. Measured numbers stand
in docs/preference.md.

  python -m internvl_jax.train --config configs/quickstart_mpo.py

The losses and their weights are those of the published recipes (configs/internvl3/mpo.py). What differs: the
model is small and its answers are single words, so that the rate is higher and pairs are many a step.
"""

from internvl_jax.config import TrainConfig


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `arg` is the folder that the quickstart wrote to, by default "quickstart"."""
  folder = arg or "quickstart"
  config = TrainConfig()

  config.model.model_name_or_path = f"{folder}/output"
  config.model.grad_checkpoint = False
  config.runtime.scan_unroll = 3

  config.data.meta_path = f"{folder}/preferences/meta.json"
  config.data.conv_style = "internvl2_5"
  config.data.force_image_size = 64
  config.data.max_seq_length = 64
  config.loader.sequence_buckets = (56, 128)
  config.loader.tile_buckets = (32,)

  config.preference.loss_type = "sigmoid,bco_pair"
  config.preference.sigmoid_loss_weight = 0.8
  config.preference.bco_pair_loss_weight = 0.2
  config.preference.rpo_alpha = 1.0
  config.preference.eval_meta_path = f"{folder}/preferences/held_out.json"

  config.training.output_dir = f"{folder}/output_mpo"
  config.training.do_train = True
  config.training.per_device_train_batch_size = 32
  config.training.num_train_epochs = 1
  config.training.learning_rate = 5e-5
  config.training.lr_scheduler_type = "cosine"
  config.training.warmup_ratio = 0.03
  config.training.weight_decay = 0.05
  config.training.logging_steps = 10
  config.training.save_steps = 100
  config.training.save_total_limit = 1
  config.training.report_to = "tensorboard"
  config.training.dataloader_num_workers = 0

  config.eval.annotation = f"{folder}/data/test.jsonl"
  config.eval.root = f"{folder}/data/images"
  config.eval.group_field = "type"
  config.eval.batch_size = 256
  config.eval.max_new_tokens = 2
  return config
