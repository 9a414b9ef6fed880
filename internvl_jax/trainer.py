"""The loop: evaluate, save, fetch, step, log, in this order.

The loader is advanced only after a save, so that a checkpoint's loader state names the very next batch. The host
is one step ahead of the devices: it hands them a step, then waits for the one before and logs it. Where steps are long
it is not, since a run that is told to stop has to end all that it has handed over: it puts the next batch together while
the devices work, but hands it over, and advances the loader, once they are through.
What only watches the loop is a callback (callbacks.py).
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from absl import logging

from internvl_jax.arguments import TrainingArguments
from internvl_jax.batch import Batch
from internvl_jax.callbacks import Callback
from internvl_jax.checkpoint.checkpointer import Checkpointer
from internvl_jax.compiler import compile_program
from internvl_jax.errors import UserError
from internvl_jax.intervals import Due
from internvl_jax.metrics.gauges import StepClock
from internvl_jax.metrics.run_log import RunLog
from internvl_jax.optim.learning_rate import Schedule
from internvl_jax.parallel import batches, distributed
from internvl_jax.state import TrainState
from internvl_jax.step import StepMetrics, TrainStep
from internvl_jax.stopwatch import Stopwatch
from internvl_jax.watchdog import Watchdog

COMPILE_SECONDS = 1800
"""How long processes wait for the last one to compile a program."""

LONG_STEP_SECONDS = 5.0
"""Beside a step of so long, the moment in which the devices wait for the host is nothing."""


class BatchSource(Protocol):
  """Where batches come from; the loader of data is one (`data.load.loader.TrainLoader`)."""

  def next(self, params: Mapping[str, jax.Array]) -> Batch:
    """The batch of the next step.

    Args:
      params: all parameters by path as they are before the step, for a source whose batches depend on them (rollouts).
        Their buffers are given away by the step.
    """
    ...

  def prefetch(self) -> None:
    """Puts the next batch together, where it does not depend on parameters.

    State and counters stay those before it, and an error is left to `next`.
    """
    ...

  def metrics(self) -> Mapping[str, float]:
    """Scalars of the batch that was handed out last, for the log; the same on all processes."""
    ...

  def get_state(self) -> dict[str, Any]: ...
  def counters(self) -> dict[str, Any]: ...


@dataclasses.dataclass
class CompiledSteps:
  """The jitted step, compiled before its first use for each shape of batch, and saying so.

  Attributes:
    step: what to compile.
    mesh: its devices.
    xla_options: `runtime.xla_options`.
    stopwatch: measures the parts of compiling.
  """

  step: TrainStep
  mesh: jax.sharding.Mesh
  xla_options: tuple[str, ...] = ()
  stopwatch: Stopwatch = dataclasses.field(default_factory=Stopwatch)
  _programs: dict[tuple, Any] = dataclasses.field(default_factory=dict)
  _begun: dict[tuple, concurrent.futures.Future] = dataclasses.field(default_factory=dict)

  def __call__(
    self, state: TrainState, frozen: dict[str, jax.Array], batch: Batch, learning_rate: float
  ) -> tuple[TrainState, StepMetrics]:
    """Takes one optimizer step; the state's buffers are given away.

    Args:
      state: before the step.
      frozen: parameters that do not train.
      batch: numpy arrays: of each field, the part of the rows and pools that belongs to this process's devices.
      learning_rate: of this step.
    """
    inputs = (state, frozen, batches.place_batch(batch, self.mesh), np.float32(learning_rate))
    shape = _shape(batch)
    if shape not in self._programs:
      begun = self._begun.pop(shape, None)
      program = self._compile(inputs) if begun is None else begun.result()
      # Collectives wait for their other side for half a minute only, and compilers are not equally fast everywhere.
      distributed.barrier(f"program {len(self._programs)} is compiled", seconds=COMPILE_SECONDS)
      self._programs[shape] = program
    return self._programs[shape](*inputs)

  def compile_beside(self, state: TrainState, frozen: dict[str, Any], batch: Batch) -> None:
    """Starts to compile for a shape of batch on a thread; `__call__` waits for it, and raises what goes wrong there.

    Args:
      state, frozen: shapes and shardings of what `__call__` will be given.
      batch: shapes of its batch, as they are on this process.
    """
    inputs = (state, frozen, batches.abstract_placed(batch, self.mesh), jax.ShapeDtypeStruct((), np.float32))
    thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="compile")
    self._begun[_shape(batch)] = thread.submit(self._compile, inputs)
    thread.shutdown(wait=False)

  def close(self) -> None:
    """Waits for what is being compiled and was not asked for."""
    for begun in self._begun.values():
      if error := begun.exception():
        logging.debug("A program that no batch has asked for: %s", error)

  def knows(self, batch: Batch) -> bool:
    """Whether the step is compiled for this shape of batch."""
    return _shape(batch) in self._programs

  def _compile(self, inputs: tuple) -> Any:
    batch: Batch = inputs[2]
    A, R, S = batch.rows.input_ids.shape
    start = time.perf_counter()
    shape = f"{A} x {R} rows of {S} tokens and {batch.rows.tiles.shape[2]} tiles a shard"
    hint = "" if self._programs else "; the first time takes a minute or two"
    logging.info("Compiling the step for %s%s", shape, hint)
    with self.stopwatch.phase("trace"):
      traced = jax.jit(self.step.__call__, donate_argnums=0).trace(*inputs)
    with self.stopwatch.phase("lower"):
      lowered = traced.lower()
    with self.stopwatch.phase("compile"):
      program = compile_program(lowered, self.mesh.devices.flat[0].platform, self.xla_options)
    logging.info("Compiled the step for %s in %.1f s", shape, time.perf_counter() - start)
    return program


def _shape(batch: Batch) -> tuple[tuple[int, ...], ...]:
  """What a program is compiled for: rows and pools; all else follows from them."""
  return batch.rows.input_ids.shape, batch.rows.tiles.shape


@dataclasses.dataclass(frozen=True)
class _InFlight:
  """A step that the devices work on.

  Attributes:
    step: steps taken before it.
    is_first: of this start.
    fetched_in: seconds that the host waited for its batch.
    dispatched: when the devices got it.
    timed: whether its time counts: not where a program was compiled for it.
    told: scalars of its batch.
    result: its metrics, and when the devices were through.
  """

  step: int
  is_first: bool
  fetched_in: float
  dispatched: float
  timed: bool
  told: Mapping[str, float]
  result: concurrent.futures.Future[tuple[StepMetrics, float]]


class Stop(Protocol):
  """Tells the loop to stop early, for example because of a signal."""

  def listen(self) -> None:
    """A step was taken, so that there is something to save: from now on `__call__` answers what stops the run."""
    ...

  def __call__(self, step: int) -> bool:
    """Whether to save and stop after `step` steps; the same answer on all hosts."""
    ...


@dataclasses.dataclass(kw_only=True)
class Trainer:
  """Runs optimizer steps until the last one, or until it is told to stop.

  Attributes:
    training: when to save, evaluate and stop.
    steps: the compiled step.
    schedule: the learning rate.
    source: batches of numpy arrays.
    checkpointer: where to save.
    log: where metrics go; it knows the length of the run.
    watchdog: is told what the loop does.
    stop: whether to stop early.
    evaluate: function (parameters, step) -> metrics to log, or None.
    scores_average: of an optimizer that keeps averages of the weights, score those (`checkpoint.export_average`).
    callbacks: are told what happens; in this order.
  """

  training: TrainingArguments
  steps: CompiledSteps
  schedule: Schedule
  source: BatchSource
  checkpointer: Checkpointer
  log: RunLog
  watchdog: Watchdog
  stop: Stop
  evaluate: Callable[[dict[str, jax.Array], int], dict[str, float]] | None = None
  scores_average: bool = True
  callbacks: Sequence[Callback] = ()

  def __post_init__(self):
    self._total_steps = self.log.total_steps
    self._due = Due(training=self.training, total_steps=self._total_steps, epoch_of=self.log.epoch)
    self._clock = StepClock()
    self._in_flight: _InFlight | None = None
    self._steps_are_long, self._ahead_in = False, 0.0
    # One thread that waits for the devices: when they are through is known without holding up the loop.
    self._waiter = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="step")

  def run(self, state: TrainState, frozen: dict[str, jax.Array]) -> TrainState:
    """Trains from `state` to the last step, or to where it was told to stop; everything is saved by then.

    Raises:
      UserError: all steps of the run were skipped, a callback ended it, or a checkpoint could not be written.
    """
    first = int(state.step)
    self.log.start(first)
    if first == 0 and self.training.eval_on_start and self.evaluate is not None:
      self._score(state, frozen, first)
    self._clock.restart(time.perf_counter())
    for step in range(first, self._total_steps):
      if self._steps_are_long:
        self._fetch_ahead(step)
        self._finish_step()
      if step > first and self._between_steps(state, frozen, step):
        break
      state = self._take_step(state, frozen, step, is_first=step == first)
      if step == first:
        self.stop.listen()
    self._finish_step()
    self._waiter.shutdown()
    self._end(state, frozen)
    return state

  def _end(self, state: TrainState, frozen: dict[str, jax.Array]) -> None:
    """Scores and saves the last step."""
    taken = int(state.step)
    for callback in self.callbacks:
      callback.end(taken)
    in_vain = taken == self._total_steps and 0 < taken <= self.log.skipped_steps
    if taken == self._total_steps and self.training.load_best_model_at_end and not in_vain:
      self._score_the_last(state, frozen, taken)
    if taken < self._total_steps or (self.training.save_strategy != "no" and not in_vain):
      self._save(state, taken)
    with self.watchdog.phase("save", taken):
      self.checkpointer.wait()
    self.log.save_state(taken, self.source.counters())
    if in_vain:
      raise UserError(
        f"nothing was trained and no model is written: loss or gradient was not finite in each of the {taken} steps; "
        "look at the samples that are named above and at training.learning_rate, then begin anew with "
        "training.overwrite_output_dir=True"
      )

  def _fetch_ahead(self, step: int) -> None:
    """Puts the next batch together while the devices work."""
    start = time.perf_counter()
    with self.watchdog.phase("data wait", step + 1):
      self.source.prefetch()
    self._ahead_in = time.perf_counter() - start

  def _take_step(
    self, state: TrainState, frozen: dict[str, jax.Array], step: int, *, is_first: bool
  ) -> TrainState:
    """Hands the devices a step, and takes in the one before."""
    start = time.perf_counter()
    with self.watchdog.phase("data wait", step + 1):
      batch = self.source.next({**frozen, **state.params})
    told = self.source.metrics()
    fetched_in, self._ahead_in = self._ahead_in + time.perf_counter() - start, 0.0
    if is_first:
      with self.watchdog.phase("compile", step + 1):
        for callback in self.callbacks:
          callback.first_batch(step, batch, {**frozen, **state.params})
    fresh = not self.steps.knows(batch)
    for callback in self.callbacks:
      callback.before_step(step + 1)
    with self.watchdog.phase("compile" if fresh else "step", step + 1):
      dispatched = time.perf_counter()
      state, metrics = self.steps(state, frozen, batch, self.schedule(step))
    self._finish_step()
    result = self._waiter.submit(_read, metrics)
    self._in_flight = _InFlight(step, is_first, fetched_in, dispatched, not fresh, told, result)
    return state

  def _finish_step(self) -> None:
    """Waits for the step in flight, if there is one, and logs it."""
    flight, self._in_flight = self._in_flight, None
    if flight is None:
      return
    with self.watchdog.phase("step", flight.step + 1):
      metrics, done = flight.result.result()
    metrics = metrics._replace(terms={**metrics.terms, **flight.told})
    if flight.is_first:
      for callback in self.callbacks:
        callback.after_first_step(done)
    times = self._clock.times(fetched_in=flight.fetched_in, dispatched=flight.dispatched, done=done)
    self._steps_are_long = times is not None and times.compute >= LONG_STEP_SECONDS
    taken = flight.step + 1
    self.log.add(taken, metrics, next_rate=self.schedule(taken), times=times if flight.timed else None)
    for callback in self.callbacks:
      callback.after_step(taken, metrics)

  def _between_steps(self, state: TrainState, frozen: dict[str, jax.Array], step: int) -> bool:
    """Evaluates and saves where it is time to; returns whether to stop."""
    self.checkpointer.check()
    if self.stop(step):
      return True
    evaluates, saves = self.evaluate is not None and self._due.scores(step), self._due.saves(step)
    if not (evaluates or saves):
      return False
    self._finish_step()
    if evaluates:
      self._score(state, frozen, step)
    if saves:
      start = time.perf_counter()
      self._save(state, step)
      self.log.add_save(time.perf_counter() - start)
    self._clock.restart(time.perf_counter())
    return False

  def _score(self, state: TrainState, frozen: dict[str, jax.Array], step: int) -> None:
    assert self.evaluate is not None
    with self.watchdog.phase("eval", step):
      params = state.model_params(average=self.scores_average)
      scores = self.evaluate({**frozen, **params}, step)
    self.log.record({**scores, "epoch": self.log.epoch(step), "step": step})

  def _score_the_last(self, state: TrainState, frozen: dict[str, jax.Array], step: int) -> None:
    """Scores the last step among those that the best model is looked for, unless a run before its restart did."""
    if self.evaluate is not None and self._due.scores(step) and not self.log.is_scored(step):
      self._score(state, frozen, step)

  def _save(self, state: TrainState, step: int) -> None:
    with self.watchdog.phase("save", step):
      self.checkpointer.save(state, loader=self.source.get_state(), trainer=self.log.state())
    self.log.save_state(step, self.source.counters())
    for callback in self.callbacks:
      callback.after_save(step)


def _read(metrics: StepMetrics) -> tuple[StepMetrics, float]:
  """Waits for the devices; returns the metrics' values, and when they were there."""
  jax.block_until_ready(metrics)
  done = time.perf_counter()
  return jax.tree.map(np.asarray, metrics), done
