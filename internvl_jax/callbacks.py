"""Callbacks of the training loop: what watches a run, and does not change what it computes.

A callback is an object with the methods of `Callback`, from which it may inherit those that do nothing; `train.py` lists
those of a run. The order of the loop (evaluate, save, fetch, step, log) is trainer.py's own.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Protocol

import jax
from absl import logging

from internvl_jax.batch import Batch
from internvl_jax.errors import UserError
from internvl_jax.metrics.run_log import RunLog
from internvl_jax.metrics.trace import Trace
from internvl_jax.parallel import distributed
from internvl_jax.step import StepMetrics
from internvl_jax.stopwatch import Stopwatch

UNMOVED_STEPS = 20
"""So many steps in a row without a gradient or an image are no chance: also of small batches, of mixed data."""

_OF_IMAGES = ("vision_model", "mlp1")


class Callback(Protocol):
  """Watches the loop, on every process of the run; all methods do nothing by default.

  Steps are counted as steps taken: 1 is the first one.
  """

  def first_batch(self, step: int, batch: Batch, params: dict[str, jax.Array]) -> None:
    """The first batch of this start is about to be trained on.

    Args:
      step: steps taken before it: 0 for a run that does not resume.
      batch: numpy arrays.
      params: all parameters by path.
    """

  def before_step(self, step: int) -> None:
    """The step is about to be handed to the devices."""

  def after_first_step(self, done: float) -> None:
    """The devices have finished the first step of this start.

    Args:
      done: when they had, as `time.perf_counter` counts.
    """

  def after_step(self, step: int, metrics: StepMetrics) -> None:
    """The devices have finished the step; it is in the log."""

  def after_save(self, step: int) -> None:
    """A checkpoint of this step was handed over; it may not be complete yet."""

  def end(self, step: int) -> None:
    """The loop is over after this step; it may still be scored and saved."""


@dataclasses.dataclass
class FirstBatch(Callback):
  """Logs the first batch of each start as text, with what is supervised.

  Attributes:
    show: function of a batch -> text.
  """

  show: Callable[[Batch], str]

  def first_batch(self, step: int, batch: Batch, params: dict[str, jax.Array]) -> None:
    """Logs it."""
    del step, params
    logging.info("First batch:\n%s", self.show(batch))


@dataclasses.dataclass
class Check(Callback):
  """Checks the parameters with the first batch of a run that does not resume.

  Attributes:
    check: function (parameters, batch); raises if something is wrong.
  """

  check: Callable[[dict[str, jax.Array], Any], None]

  def first_batch(self, step: int, batch: Batch, params: dict[str, jax.Array]) -> None:
    """Checks them."""
    if step == 0:
      self.check(params, batch)


@dataclasses.dataclass
class StartTimes(Callback):
  """Logs how long it took from the command to the first step, and what of it each phase did.

  Attributes:
    stopwatch: measures it.
    prints: whether to log the table, too.
    record: is called afterwards, on the first process.
  """

  stopwatch: Stopwatch
  prints: bool = False
  record: Callable[[], None] = lambda: None

  def after_first_step(self, done: float) -> None:
    """Logs it, of the first process for all."""
    self.stopwatch.stop(done)
    if not distributed.is_first():
      return
    logging.info("%s", self.stopwatch.line())
    if self.prints:
      logging.info("From the command to the first step:\n%s", "\n".join(self.stopwatch.table()))
    self.record()


@dataclasses.dataclass
class Profile(Callback):
  """Records a trace of some steps.

  Attributes:
    trace: knows which.
  """

  trace: Trace

  def before_step(self, step: int) -> None:
    """Starts it at its first step."""
    self.trace.before(step)

  def after_step(self, step: int, metrics: StepMetrics) -> None:
    """Ends it at its last step."""
    del metrics
    self.trace.after(step)

  def end(self, step: int) -> None:
    """Ends it where the run has ended before."""
    del step
    self.trace.stop()


@dataclasses.dataclass
class SkippedSteps(Callback):
  """Warns of steps that changed nothing, since loss or gradient was not finite, and ends a run of nothing else.

  Attributes:
    log: counts them.
    batch_samples: function of the steps taken before a batch -> its samples, as text.
    limit: so many in a row end the run.
  """

  log: RunLog
  batch_samples: Callable[[int], str]
  limit: int

  def after_step(self, step: int, metrics: StepMetrics) -> None:
    """Warns if it was skipped.

    Raises:
      UserError: too many were, in a row.
    """
    if not metrics.skipped:
      return
    what = f"step {step}: loss={metrics.loss}, grad_norm={metrics.grad_norm}: not finite"
    samples = f"its samples: {self.batch_samples(step - 1)}"
    if distributed.is_first():
      logging.warning("%s, so it changed nothing; %s", what, samples)
    if self.log.skipped_in_a_row >= self.limit:
      raise UserError(
        f"{what}, as in each of the last {self.log.skipped_in_a_row} steps (runtime.max_nonfinite_steps); lower "
        f"training.learning_rate, or look at {samples}"
      )


class Unmoved(Callback):
  """Warns, once each, of a gradient that stays zero, and of parts that train on images where there are none."""

  def __init__(self, parts: Collection[str], patience: int):
    """Sets it up.

    Args:
      parts: of the model, that have parameters that train.
      patience: steps in a row.
    """
    self._idle, self._patience = _idle_parts(parts), patience
    self._without_gradient = self._without_image = 0

  def after_step(self, step: int, metrics: StepMetrics) -> None:
    """Logs what there is to tell."""
    remark = self.remark(metrics)
    if remark is not None and distributed.is_first():
      logging.warning("step %d: %s", step, remark)

  def remark(self, metrics: StepMetrics) -> str | None:
    """Counts a step; returns what to tell of it."""
    self._without_gradient = 0 if float(metrics.grad_norm) else self._without_gradient + 1
    self._without_image = 0 if float(metrics.counts.image_tokens) else self._without_image + 1
    if self._without_gradient == self._patience:
      return (
        f"the gradient was zero in {self._patience} steps in a row, so nothing is learned: see which parameters train, in "
        "the table above, and whether these samples have anything to do with them"
      )
    if self._without_image == self._patience and self._idle:
      return _without_images(f"{self._patience} steps in a row had", self._idle)
    return None


def idle_on_text(paths: Iterable[str], has_images: Callable[[], bool]) -> str | None:
  """What to tell at the start of a run whose data have no image; None if nothing that trains needs any.

  Args:
    paths: the parameters that train.
    has_images: whether the data have any; asked only where something learns from them.
  """
  idle = _idle_parts({path.partition(".")[0] for path in paths})
  return _without_images("the data have", idle) if idle and not has_images() else None


def _idle_parts(trained: Collection[str]) -> list[str]:
  """Of the parts that train, those that get no gradient from text."""
  return [part for part in _OF_IMAGES if part in trained]


def _without_images(what: str, idle: Sequence[str]) -> str:
  return (
    f"{what} no image, and {' and '.join(idle)} learn from images alone: mix data with images in, or freeze "
    "(model.freeze_backbone, model.freeze_mlp)"
  )
