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
from internvl_jax.data.schedule.balance import Balance
from internvl_jax.data.schedule.grouping import GroupedOrder, LengthOf
from internvl_jax.data.schedule.order import (
  DrawnOrder,
  EpochOrder,
  Order,
  Places,
  ResampledOrder,
  total_steps,
)
from internvl_jax.data.schedule.packed_rows import SizeOf, Skipped
from internvl_jax.data.schedule.packed_steps import (
  Evenness,
  PackedPlan,
  PackedSteps,
  PlannedRows,
  Report,
  StepShape,
  open_steps,
  silent,
)


class MicroBatchRows(Protocol):
  """The rows of micro-batches by number, counted from where a cursor was; picklable, for worker processes."""

  def __getitem__(self, element: int) -> list[Places]:
    """The samples of each of the R rows of a micro-batch."""
    ...


class StepRows(NamedTuple):
  """The rows of an optimizer step.

  Attributes:
    rows: the samples of each of its A * R rows, of all hosts.
    skipped: samples before those of the next step that are in no row; where rows are balanced, an equal part of those of
      the window.
    evenness: where rows are balanced, how even the steps are that begin with this one; None elsewhere.
  """

  rows: list[Places]
  skipped: Skipped
  evenness: Evenness | None = None


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
    balance: how packed rows are balanced over devices; None: they are taken as they come.
    chunk: samples whose sizes are looked up at a time, where rows are packed.
  """

  order: Order
  shape: StepShape
  size_of: SizeOf
  packing: packing.PackSettings | None
  rows_per_epoch: int
  total_steps: int
  balance: Balance | None = None
  chunk: int = packed_rows.CHUNK

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
    """Facts that must be equal for the number of a step to mean the same samples: numbers for a checkpoint, by name."""
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
      state: what `Cursor.get_state` gave there. Without it, packed rows begin anew. With it, they are balanced or not as
        they were then.

    Raises:
      ValueError: the state is of other budgets, or of another version of the packing or the balancing.
    """
    return Cursor(self, step, state)

  def packed_plan(self) -> PackedPlan | None:
    """The inputs of packed rows; None where a row is one sample."""
    if self.packing is None:
      return None
    return PackedPlan(
      order=self.order,
      size_of=self.size_of,
      packing=self.packing,
      shape=self.shape,
      total_steps=self.total_steps,
      balance=self.balance,
      chunk=self.chunk,
    )


class Cursor:
  """A place between two steps of a schedule.

  Attributes:
    step: that comes next.
  """

  def __init__(self, schedule: Schedule, step: int, state: dict[str, Any] | None):
    self._schedule, self.step = schedule, step
    self._plan = schedule.packed_plan()
    self._packed: PackedSteps | None = None if self._plan is None else open_steps(self._plan, step, state)

  def next_rows(self, report: Report = silent) -> StepRows:
    """Goes on by a step.

    Args:
      report: is told after each packed row how full the rows are so far.
    """
    shape = self._schedule.shape
    start, self.step = self.step * shape.rows, self.step + 1
    if self._packed is None:
      return StepRows(_single(self._schedule.order.places(start, shape.rows)), packed_rows.NONE_SKIPPED)
    rows = self._packed.next_rows(report)
    return StepRows(rows, self._packed.skipped(), self._packed.evenness())

  @property
  def balance(self) -> Balance | None:
    """How packed rows are balanced from here on; None: they are taken as they come."""
    return None if self._packed is None else self._packed.balance

  def get_state(self) -> dict[str, Any] | None:
    """The state that the rows to come depend on beside the step, as JSON values; None where that is all."""
    return None if self._packed is None else self._packed.get_state()

  def micro_batches(self) -> MicroBatchRows:
    """The rows of all micro-batches from here on; this cursor may go on meanwhile."""
    schedule = self._schedule
    if self._plan is not None and self._packed is not None:
      return PlannedRows(self._plan, self.step, self._packed.get_state())
    return SingleRows(schedule.order, self.step * schedule.shape.accumulation, schedule.shape.micro_rows)


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
  balance: Balance | None = None,
) -> Schedule:
  """The schedule of a run.

  Args:
    order: the stream of samples.
    shape: how the rows of a step are dealt.
    training: says for how many epochs or steps.
    size_of: sizes of samples; asked only where rows are packed.
    packed: what a packed row may hold; None: a row is one sample.
    count_rows: counts the rows that an epoch's samples make, int64 [n] in their order, where rows are packed.
    balance: how packed rows are balanced, where several devices share a micro-batch; None: not at all.
  """
  rows = order.num_samples if packed is None else count_rows(order.places(0, order.num_samples).indices)
  steps = training.max_steps
  if steps <= 0:
    steps = total_steps(rows, training.num_train_epochs, shape.rows)
  return Schedule(
    order=order,
    shape=shape,
    size_of=size_of,
    packing=packed,
    rows_per_epoch=rows,
    total_steps=steps,
    balance=balance if shape.shards > 1 else None,
  )
