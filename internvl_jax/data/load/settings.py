"""Settings of the loader: what cannot work is refused before anything is read, and what rows and pools they allow."""

import typing

from internvl_jax.arguments import DataTrainingArguments, LoaderConfig, TrainingArguments
from internvl_jax.data.sample.fitting import Policy
from internvl_jax.data.schedule.packing import PackSettings, look_ahead_of
from internvl_jax.data.where import DataError


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


def pack_settings(data: DataTrainingArguments) -> PackSettings:
  """Returns the budgets of packed rows."""
  return PackSettings(
    max_tokens=data.max_packed_tokens,
    max_tiles=data.num_images_expected,
    look_ahead=look_ahead_of(data.max_buffer_size),
    allow_overflow=data.allow_overflow,
    over_long="drop",
  )


def longest_row(data: DataTrainingArguments, longest_sample: int) -> int:
  """Returns the most tokens of a row: of a packed one with `allow_overflow` the last sample may lie across the border."""
  if not data.use_packed_ds:
    return longest_sample
  return data.max_packed_tokens + (longest_sample if data.allow_overflow else 0)


def row_name(data: DataTrainingArguments, longest_sample: str) -> str:
  """Returns what the longest row is named after; `longest_sample` is what the longest sample is."""
  if data.use_packed_ds:
    return "data.max_packed_tokens" + (" and a sample beyond it" if data.allow_overflow else "")
  return longest_sample


def tile_sizes(data: DataTrainingArguments, loader: LoaderConfig, rows: int) -> tuple[int, ...]:
  """Returns the sizes of a shard's pool of tiles: the full budget of its rows alone in strict mode."""
  if data.use_packed_ds and data.strict_mode:
    return (data.num_images_expected * rows,)
  return loader.tile_buckets
