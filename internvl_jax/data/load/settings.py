"""Settings of the loader: what cannot work is refused before anything is read."""

import dataclasses
import typing
from collections.abc import Callable

import numpy as np

from internvl_jax.arguments import LoaderConfig, TrainingArguments
from internvl_jax.data.sample.fitting import Policy
from internvl_jax.data.schedule.balance import RowCost
from internvl_jax.data.source.hosts import ALONE, Hosts
from internvl_jax.data.where import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shards:
  """The data-parallel devices of a run, and this host's among them.

  Attributes:
    count: D, of all hosts.
    mine: those whose rows this host feeds; None: all.
    hosts: the processes that make a loader at the same time; each measures a part of the data for all.
    all_sum: adds an array over the hosts, each shard counted once. All hosts call it at the same time.
    row_cost: what packed rows cost a device, for `loader.balance_steps`; None: they are not balanced.
  """

  count: int = 1
  mine: range | None = None
  hosts: Hosts = ALONE
  all_sum: Callable[[np.ndarray], np.ndarray] = lambda counts: counts
  row_cost: RowCost | None = None

  @property
  def fed(self) -> range:
    """The shards whose rows this host feeds."""
    return range(self.count) if self.mine is None else self.mine

  @property
  def feeders(self) -> int:
    """Hosts among which the rows are dealt."""
    return self.count // len(self.fed)

  @property
  def are_split(self) -> bool:
    """Whether other hosts feed rows, or read the same data."""
    return len(self.fed) < self.count or self.hosts.count > 1


def check_settings(
  training: TrainingArguments, loader: LoaderConfig, tokens_per_tile: int, shards: Shards
) -> None:
  """Refuses what cannot work.

  Args:
    training: batch size, accumulation, epochs or steps, seeds, workers.
    loader: policies, prefetch.
    tokens_per_tile: image tokens of one tile.
    shards: the data-parallel devices.

  Raises:
    DataError: a value is out of its range.
  """
  fewest = (
    ("training.per_device_train_batch_size", training.per_device_train_batch_size, 1),
    ("training.gradient_accumulation_steps", training.gradient_accumulation_steps, 1),
    ("training.dataloader_num_workers", training.dataloader_num_workers, 0),
    ("loader.prefetch", loader.prefetch, 1),
    ("loader.balance_steps", loader.balance_steps, 0),
    ("training.seed", training.seed, 0),
    ("training.data_seed", training.data_seed or 0, 0),
    ("tokens_per_tile", tokens_per_tile, 1),
    ("data_shards", shards.count, 1),
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
  mine, count = shards.fed, shards.count
  if mine.step != 1 or not mine or mine.stop > count or count % len(mine):
    raise DataError(f"this host's shards {mine} are not an equal part of {count}; give every host as many")
