"""Settings of the loader that cannot work, refused before anything is read."""

import typing

from internvl_jax.arguments import LoaderConfig, TrainingArguments
from internvl_jax.data.errors import DataError
from internvl_jax.data.fitting import Policy


def check_settings(
  training: TrainingArguments,
  loader: LoaderConfig,
  tokens_per_tile: int,
  data_shards: int,
  my_shards: range,
) -> None:
  """Refuses what cannot work.

  Args:
    training: batch size, accumulation, epochs or steps, seeds, workers.
    loader: policies, prefetch.
    tokens_per_tile: image tokens of one tile.
    data_shards: data-parallel devices of all hosts.
    my_shards: those whose rows this host feeds.

  Raises:
    DataError: a value is out of its range.
  """
  fewest = (
    ("training.per_device_train_batch_size", training.per_device_train_batch_size, 1),
    ("training.gradient_accumulation_steps", training.gradient_accumulation_steps, 1),
    ("training.dataloader_num_workers", training.dataloader_num_workers, 0),
    ("loader.prefetch", loader.prefetch, 1),
    ("training.seed", training.seed, 0),
    ("training.data_seed", training.data_seed or 0, 0),
    ("tokens_per_tile", tokens_per_tile, 1),
    ("data_shards", data_shards, 1),
  )
  for name, value, least in fewest:
    if value < least:
      raise DataError(f"{name} must be {least} or more, got {value}")
  if training.max_steps <= 0 and training.num_train_epochs <= 0:
    raise DataError(
      f"nothing to train on: training.max_steps={training.max_steps} and "
      f"training.num_train_epochs={training.num_train_epochs}; set one of them above 0"
    )
  if loader.on_bad_sample not in ("error", "drop"):
    raise DataError(f"loader.on_bad_sample must be 'error' or 'drop', got {loader.on_bad_sample!r}")
  if loader.on_over_length not in (policies := typing.get_args(Policy)):
    raise DataError(
      f"loader.on_over_length must be one of {', '.join(policies)}, got {loader.on_over_length!r}"
    )
  if my_shards.step != 1 or not my_shards or my_shards.stop > data_shards or data_shards % len(my_shards):
    raise DataError(
      f"this host's shards {my_shards} are not an equal part of {data_shards}; give every host as many"
    )
