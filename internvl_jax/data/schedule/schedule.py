"""The schedule of a run: which samples each optimizer step sees, and in which rows.

Everything is decided from the number and the sizes of the samples, before any is read: a pure function of seed,
settings and sizes, the same on every host. The loader is an iterator over it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from internvl_jax.arguments import DataTrainingArguments, TrainingArguments
from internvl_jax.data.schedule import packed_rows, packing
from internvl_jax.data.schedule.grouping import GroupedOrder, LengthOf
from internvl_jax.data.schedule.order import (
  DrawnOrder,
  EpochOrder,
  Order,
  Places,
  ResampledOrder,
  total_steps,
)
from internvl_jax.data.schedule.packed_rows import PlannedRows, RowStream, SizeOf, Skipped


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
  """How the rows of an optimizer step are dealt to micro-batches and devices.

  Attributes:
    accumulation: A, micro-batches of a step.
    shards: D, data-parallel devices of all hosts.
    rows_per_shard: rows of a device in a micro-batch.
  """

  accumulation: int
  shards: int
  rows_per_shard: int

  @property
  def micro_rows(self) -> int:
    """R, rows of a micro-batch."""
    return self.shards * self.rows_per_shard

  @property
  def rows(self) -> int:
    """A * R, rows of a step."""
    return self.accumulation * self.micro_rows

  @classmethod
  def of(cls, training: TrainingArguments, shards: int) -> "StepShape":
    """The shape that the settings ask for, on so many data-parallel devices."""
    return cls(
      accumulation=training.gradient_accumulation_steps,
      shards=shards,
      rows_per_shard=training.per_device_train_batch_size,
    )


class MicroBatchRows(Protocol):
  """The rows of micro-batches by number, counted from where a cursor was; picklable, for worker processes."""

  def __getitem__(self, element: int) -> list[Places]:
    """The samples of each of the R rows of a micro-batch."""
    ...


class StepRows(NamedTuple):
  """What an optimizer step sees.

  Attributes:
    rows: the samples of each of its A * R rows, of all hosts.
    skipped: samples before those of the next step that are in no row.
  """

  rows: list[Places]
  skipped: Skipped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """The steps of a run.

  Attributes:
    order: the stream of samples.
    shape: how the rows of a step are dealt.
    size_of: sizes of samples, by `cursor` where rows are packed, and by `room`.
    packing: what a packed row may hold; None: a row is one sample.
    rows_per_epoch: rows that all samples make together.
    total_steps: optimizer steps of the run.
  """

  order: Order
  shape: StepShape
  size_of: SizeOf
  packing: packing.PackSettings | None
  rows_per_epoch: int
  total_steps: int

  @property
  def num_samples(self) -> int:
    """Samples of an epoch."""
    return self.order.num_samples

  @property
  def steps_per_epoch(self) -> int:
    """Optimizer steps that see all samples once, rounded up."""
    return total_steps(self.rows_per_epoch, 1, self.shape.rows)

  def epoch_of(self, step: int) -> float:
    """How many times the data have been seen after so many optimizer steps."""
    return step * self.shape.rows / self.rows_per_epoch

  def room(self, rows: list[Places], size_of: SizeOf | None = None) -> tuple[int, int]:
    """The tokens of the longest of a step's rows, and the tiles of the fullest shard in a micro-batch.

    Args:
      rows: of the step.
      size_of: sizes of samples; None: the schedule's own.
    """
    sizes = (size_of or self.size_of)(np.concatenate([row.indices for row in rows])).clip(0)
    owners = np.repeat(np.arange(len(rows)), [len(row.indices) for row in rows])
    tokens, tiles = (np.bincount(owners, column, len(rows)) for column in sizes.T)
    shards = tiles.reshape(self.shape.accumulation * self.shape.shards, -1).sum(-1)
    return int(tokens.max()), int(shards.max())

  def fingerprint(self) -> dict[str, int]:
    """What must be equal for the number of a step to mean the same samples: numbers for a checkpoint, by name."""
    return {
      "num_samples": self.num_samples,
      "global_batch": self.shape.rows,
      "order_seed": self.order.seed,
      "shuffle": int(self.order.shuffle),
      "order_checksum": self.order.checksum(),
    }

  def cursor(self, step: int = 0, state: dict[str, Any] | None = None) -> "Cursor":
    """Goes to the beginning, or to a later step.

    Args:
      step: that comes next.
      state: what `Cursor.get_state` gave there. Without it, packed rows begin anew.

    Raises:
      ValueError: the state is of other budgets, or of another version of the packing.
    """
    return Cursor(self, step, state)


class Cursor:
  """A place between two steps of a schedule.

  Attributes:
    step: that comes next.
  """

  def __init__(self, schedule: Schedule, step: int, state: dict[str, Any] | None):
    self._schedule, self.step = schedule, step
    self._stream: RowStream | None = None
    if schedule.packing is not None:
      self._stream = RowStream(schedule.order, schedule.size_of, schedule.packing, state)

  def next_rows(self, report: Callable[[packing.PackStats], Any] = lambda stats: None) -> StepRows:
    """Goes on by a step.

    Args:
      report: is told after each packed row how full the rows are so far.
    """
    shape = self._schedule.shape
    start, self.step = self.step * shape.rows, self.step + 1
    if self._stream is None:
      return StepRows(_single(self._schedule.order.places(start, shape.rows)), packed_rows.NONE_SKIPPED)
    decided, rows = self._stream.decided, []
    for _ in range(shape.rows):
      rows.append(next(self._stream))
      report(self._stream.stats)
    return StepRows(rows, self._stream.skipped(decided, self._stream.decided))

  def get_state(self) -> dict[str, Any] | None:
    """What the rows to come depend on beside the step, as JSON values; None where that is all."""
    return None if self._stream is None else self._stream.get_state()

  def micro_batches(self) -> MicroBatchRows:
    """The rows of all micro-batches from here on; this cursor may go on meanwhile."""
    schedule = self._schedule
    micro_rows = schedule.shape.micro_rows
    if self._stream is None or schedule.packing is None:
      return SingleRows(schedule.order, self.step * schedule.shape.accumulation, micro_rows)
    return PlannedRows(
      schedule.order, schedule.size_of, schedule.packing, self._stream.get_state(), micro_rows
    )


@dataclasses.dataclass(frozen=True, slots=True)
class SingleRows:
  """Rows of one sample each, by the number of their micro-batch.

  Attributes:
    order: the stream of samples.
    start: the micro-batch of the stream that is element 0.
    rows: R, rows of a micro-batch.
  """

  order: Order
  start: int
  rows: int

  def __getitem__(self, element: int) -> list[Places]:
    return _single(self.order.places((self.start + element) * self.rows, self.rows))


def _single(places: Places) -> list[Places]:
  """Rows of one sample each."""
  epochs, indices = places
  return [Places(epochs[i : i + 1], indices[i : i + 1]) for i in range(len(indices))]


def make_order(
  data: DataTrainingArguments,
  training: TrainingArguments,
  *,
  shuffle: bool,
  samples: tuple[int, ...],
  shape: StepShape,
  length_of: LengthOf,
) -> Order:
  """The order of the samples that the settings ask for.

  Args:
    data: how datasets are drawn.
    training: seeds, and whether lengths are grouped.
    shuffle: a new order every epoch.
    samples: of each dataset, an epoch.
    shape: how the rows of a step are dealt.
    length_of: how long samples are, where they are grouped by that; picklable.
  """
  seed = training.seed if training.data_seed is None else training.data_seed
  order: Order = EpochOrder(sum(samples), seed, shuffle)
  if data.replacement and data.use_packed_ds:  # As in the reference, of packed rows alone.
    order = DrawnOrder(samples, seed, data.use_data_resampling, shuffle)
  elif data.use_data_resampling:
    order = ResampledOrder(samples, seed, shuffle)
  if not training.group_by_length or data.use_packed_ds:  # packed rows are of one length already
    return order
  return GroupedOrder(order, length_of, shape.accumulation, shape.shards, shape.rows_per_shard)


def make_schedule(
  order: Order,
  shape: StepShape,
  training: TrainingArguments,
  size_of: SizeOf,
  packed: packing.PackSettings | None,
  count_rows: Callable[[np.ndarray], int],
) -> Schedule:
  """The schedule of a run.

  Args:
    order: the stream of samples.
    shape: how the rows of a step are dealt.
    training: says for how many epochs or steps.
    size_of: sizes of samples; asked only where rows are packed.
    packed: what a packed row may hold; None: a row is one sample.
    count_rows: counts the rows that an epoch's samples make, int64 [n] in their order, where rows are packed.
  """
  rows = order.num_samples if packed is None else count_rows(order.places(0, order.num_samples).indices)
  steps = training.max_steps
  if steps <= 0:
    steps = total_steps(rows, training.num_train_epochs, shape.rows)
  return Schedule(
    order=order, shape=shape, size_of=size_of, packing=packed, rows_per_epoch=rows, total_steps=steps
  )
