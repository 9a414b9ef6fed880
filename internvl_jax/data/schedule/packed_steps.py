"""Optimizer steps of packed rows: as the rows come, or balanced over devices within a window of steps."""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from internvl_jax.arguments import TrainingArguments
from internvl_jax.data.schedule import balance, packing
from internvl_jax.data.schedule.balance import Balance
from internvl_jax.data.schedule.order import Order, Places
from internvl_jax.data.schedule.packed_rows import CHUNK, RowStream, SizeOf, Skipped

# Micro-batches planned that nobody has asked for yet: those of other workers, which never will.
_KEPT = 4096

Report = Callable[[packing.PackStats], Any]
"""Is told after each packed row how full the rows are so far."""


def silent(stats: packing.PackStats) -> None:
  """A report to nobody."""
  del stats


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedPlan:
  """The inputs of the steps of packed rows; picklable, for worker processes.

  Attributes:
    order: the stream of samples.
    size_of: their sizes.
    packing: what a row may hold.
    shape: how the rows of a step are dealt.
    total_steps: of the run; the last window ends there, so that a run of one epoch sees every sample.
    balance: how rows are balanced; None: they are taken as they come.
    chunk: samples whose sizes are looked up at a time.
  """

  order: Order
  size_of: SizeOf
  packing: packing.PackSettings
  shape: StepShape
  total_steps: int
  balance: Balance | None = None
  chunk: int = CHUNK


class Evenness(NamedTuple):
  """How long devices wait for the slowest, by what rows cost: 1 is not at all.

  Attributes:
    steps: over which the two are taken.
    before: slowest over mean if the rows were taken as they come.
    after: as they are assigned.
  """

  steps: int
  before: float
  after: float


class PackedSteps(Protocol):
  """The steps of a run of packed rows, one after the other."""

  @property
  def balance(self) -> Balance | None:
    """How rows are balanced: as the plan says, or as the state did that was gone on from."""
    ...

  def next_rows(self, report: Report = silent) -> list[Places]:
    """The samples of each row of the next step, in the rows' places."""
    ...

  def skipped(self) -> Skipped:
    """Samples that were passed over for the step that `next_rows` gave last."""
    ...

  def evenness(self) -> Evenness | None:
    """How even the steps are that begin with the one that `next_rows` gave last; None where none is measured there."""
    ...

  def get_state(self) -> dict[str, Any]:
    """The state that the steps to come depend on beside their number, as JSON values."""
    ...


def open_steps(plan: PackedPlan, step: int, state: dict[str, Any] | None) -> PackedSteps:
  """The steps from one on.

  Args:
    plan: what they are a function of.
    step: that comes next.
    state: what `get_state` gave there; a run goes on as it began, with or without balance. None: rows begin anew.

  Raises:
    ValueError: the state is of other budgets, of another step, or of another version of packing or balancing.
  """
  if state is None:
    return StepsAsTheyCome(plan, None) if plan.balance is None else BalancedSteps(plan, plan.balance, step)
  if "balance" not in state:
    return StepsAsTheyCome(plan, state)
  if state["algorithm"] != balance.ALGORITHM:
    raise ValueError(
      f"state of other balancing: saved {state['algorithm']}, now {balance.ALGORITHM}; steps would have other rows"
    )
  return BalancedSteps(plan, Balance.from_json(state["balance"]), step, state)


class StepsAsTheyCome:
  """Steps of the rows of the stream in its order."""

  balance = None

  def __init__(self, plan: PackedPlan, state: dict[str, Any] | None):
    """Begins at the state of a `RowStream`."""
    self._rows = plan.shape.rows
    self._stream = RowStream(plan.order, plan.size_of, plan.packing, state, plan.chunk)
    self._decided = self._stream.decided

  def next_rows(self, report: Report = silent) -> list[Places]:
    """The next rows of the stream."""
    self._decided = self._stream.decided
    rows = []
    for _ in range(self._rows):
      rows.append(next(self._stream))
      report(self._stream.stats)
    return rows

  def skipped(self) -> Skipped:
    """Samples that the last step's rows passed over."""
    return self._stream.skipped(self._decided, self._stream.decided)

  def evenness(self) -> None:
    """Is not measured."""

  def get_state(self) -> dict[str, Any]:
    """The stream's."""
    return self._stream.get_state()


@dataclasses.dataclass
class _Window:
  """Steps whose rows are balanced together, and as far as they are planned.

  Attributes:
    first: its first step.
    steps: how many they are.
    begun: the state of the stream of rows before its first one.
    decided: places of the order, all samples before which are decided: at its beginning, and at its end.
    rows: in the order of the stream.
    assigned: int64 [steps, rows of a step]: the rows of each step, in their places.
    evenness: of its steps.
    skipped: what all of it passed over, once somebody has asked.
  """

  first: int
  steps: int
  begun: dict[str, Any]
  decided: tuple[int, int]
  rows: list[Places] = dataclasses.field(default_factory=list)
  assigned: np.ndarray | None = None
  evenness: Evenness | None = None
  skipped: Skipped | None = None

  @property
  def end(self) -> int:
    """The step after its last one."""
    return self.first + self.steps


class BalancedSteps:
  """Steps whose rows cost the same on every device (`balance`), assigned window by window.

  With each step that is handed out, as many rows of the next window are planned, so that no step waits for a whole window
  but a run's first. The state is that of the stream at the beginning of a window, which is planned again by who resumes.

  Attributes:
    balance: how rows are balanced.
  """

  def __init__(self, plan: PackedPlan, settings: Balance, step: int, state: dict[str, Any] | None = None):
    """Goes to a step; see `open_steps`."""
    self._plan, self.balance, self._step = plan, settings, step
    packed = None if state is None else state["packed"]
    self._stream = RowStream(plan.order, plan.size_of, plan.packing, packed, plan.chunk)
    self._window: _Window | None = None
    self._coming = (
      self._begin(step) if state is None else self._begin(int(state["first"]), int(state["steps"]))
    )
    if not self._coming.first <= step < self._coming.end:
      raise ValueError(f"state of steps {self._coming.first} to {self._coming.end - 1}, not of {step}")

  def next_rows(self, report: Report = silent) -> list[Places]:
    """The rows of the next step."""
    if self._window is None or self._step >= self._window.end:
      self._window = self._completed(report)
      self._coming = self._begin(self._window.end)
    window = self._window
    assert window.assigned is not None
    chosen = window.assigned[self._step - window.first].tolist()
    self._step += 1
    if self._coming.first < self._plan.total_steps:
      self._plan_rows(self._plan.shape.rows, report)
    return [window.rows[row] for row in chosen]

  def skipped(self) -> Skipped:
    """An equal part of what the last step's window passed over."""
    window = self._window
    assert window is not None
    if window.skipped is None:
      window.skipped = self._stream.skipped(*window.decided)
    part = self._step - 1 - window.first
    return Skipped(*(np.array_split(indices, window.steps)[part] for indices in window.skipped))

  def evenness(self) -> Evenness | None:
    """That of the last step's window, if it is its first step."""
    window = self._window
    assert window is not None
    return window.evenness if self._step - 1 == window.first else None

  def get_state(self) -> dict[str, Any]:
    """The stream's at the beginning of the next step's window, and which steps those are; 0 steps are not begun."""
    window = self._window
    if window is None or self._step >= window.end:
      window = self._coming
    return {
      "algorithm": balance.ALGORITHM,
      "balance": self.balance.to_json(),
      "first": window.first,
      "steps": window.steps if self._step > window.first else 0,
      "packed": window.begun,
    }

  def _begin(self, first: int, steps: int = 0) -> _Window:
    """A window that begins with the next row of the stream."""
    rest = max(1, self._plan.total_steps - first)
    return _Window(
      first=first,
      steps=steps or min(self.balance.steps, rest),
      begun=self._stream.get_state(),
      decided=(self._stream.decided, self._stream.decided),
    )

  def _plan_rows(self, count: int, report: Report) -> None:
    """Plans so many of the coming window's rows, or those that it lacks."""
    coming = self._coming
    for _ in range(min(count, coming.steps * self._plan.shape.rows - len(coming.rows))):
      coming.rows.append(next(self._stream))
      report(self._stream.stats)

  def _completed(self, report: Report) -> _Window:
    """The coming window with all of its rows, assigned."""
    window = self._coming
    self._plan_rows(window.steps * self._plan.shape.rows, report)
    window.decided = window.decided[0], self._stream.decided
    self._assign(window)
    return window

  def _assign(self, window: _Window) -> None:
    """Assigns a window's rows to its steps and their devices: all that balance adds to planning."""
    shape = self._plan.shape
    sizes = self._plan.size_of(np.concatenate([row.indices for row in window.rows]))
    costs = self.balance.cost.of_rows(sizes, np.array([len(row.indices) for row in window.rows]))
    window.assigned = balance.assign(costs, shape.accumulation, shape.shards, shape.rows)
    window.assigned = balance.shuffled(window.assigned, self._plan.order.seed, window.first)
    totals = costs.sum(axis=1)
    before, after = (
      balance.slowest_over_mean(each, shape.accumulation, shape.shards)
      for each in (totals.reshape(window.assigned.shape), totals[window.assigned])
    )
    window.evenness = Evenness(window.steps, before, after)


class PlannedRows:
  """Rows by the number of their micro-batch, for workers that take every so-many-th, or threads that race.

  Each worker process plans all rows for itself, which takes far less than decoding its share of them.
  """

  def __init__(self, plan: PackedPlan, step: int, state: dict[str, Any]):
    """Begins with micro-batch 0 at a step, whose state it is."""
    self._arguments = (plan, step, state)
    self._shape = plan.shape
    self._lock = threading.Lock()
    self._begin()

  def __getitem__(self, element: int) -> list[Places]:
    with self._lock:
      if element not in self._planned and element < self._next:
        self._begin()
      while element not in self._planned:
        rows, each = self._steps.next_rows(), self._shape.micro_rows
        for start in range(0, len(rows), each):
          self._planned[self._next] = rows[start : start + each]
          self._next += 1
          self._planned.pop(self._next - _KEPT, None)
      return self._planned.pop(element)

  def _begin(self) -> None:
    self._steps = open_steps(*self._arguments)
    self._next = 0
    self._planned: dict[int, list[Places]] = {}

  def __reduce__(self) -> tuple:
    return PlannedRows, self._arguments
