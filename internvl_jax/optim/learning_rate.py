"""Learning-rate schedules, as Hugging Face's Trainer has them."""

import dataclasses
import inspect
import json
import math
from collections.abc import Callable

from internvl_jax.arguments import TrainingArguments
from internvl_jax.errors import UserError

Schedule = Callable[[int], float]
"""Learning rate of the optimizer step with that index, counted from 0."""


@dataclasses.dataclass(frozen=True)
class _Ramp:
  """What the schedules are made of: the peak, and the lengths of warm-up and of the whole run in steps."""

  peak: float
  warmup: int
  total: int

  def warm(self, step: int) -> float:
    return step / max(1, self.warmup)

  def progress(self, step: int) -> float:
    return (step - self.warmup) / max(1, self.total - self.warmup)


def _constant(ramp: _Ramp, step: int) -> float:
  return 1.0


def _linear(ramp: _Ramp, step: int) -> float:
  return max(0.0, (ramp.total - step) / max(1, ramp.total - ramp.warmup))


def _cosine(ramp: _Ramp, step: int, *, num_cycles: float = 0.5) -> float:
  return max(0.0, 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * ramp.progress(step))))


def _cosine_with_restarts(ramp: _Ramp, step: int, *, num_cycles: int = 1) -> float:
  progress = ramp.progress(step)
  if progress >= 1.0:
    return 0.0
  return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((num_cycles * progress) % 1.0))))


def _cosine_with_min_lr(
  ramp: _Ramp,
  step: int,
  *,
  num_cycles: float = 0.5,
  min_lr: float | None = None,
  min_lr_rate: float | None = None,
) -> float:
  if (min_lr is None) == (min_lr_rate is None):
    raise UserError("training.lr_scheduler_kwargs: cosine_with_min_lr takes one of min_lr and min_lr_rate")
  floor = float(min_lr_rate or 0.0) if min_lr is None else min_lr / ramp.peak
  factor = 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * ramp.progress(step)))
  return max(0.0, factor * (1 - floor) + floor)


def _polynomial(ramp: _Ramp, step: int, *, lr_end: float = 1e-7, power: float = 1.0) -> float:
  if step > ramp.total:
    return lr_end / ramp.peak
  remaining = 1 - ramp.progress(step)
  return ((ramp.peak - lr_end) * remaining**power + lr_end) / ramp.peak


def _inverse_sqrt(ramp: _Ramp, step: int, *, timescale: int | None = None) -> float:
  timescale = timescale or ramp.warmup or 10_000
  return 1.0 / math.sqrt((step + timescale - ramp.warmup) / timescale)


SCHEDULES: dict[str, Callable[..., float]] = {
  "constant": _constant,
  "constant_with_warmup": _constant,
  "linear": _linear,
  "cosine": _cosine,
  "cosine_with_restarts": _cosine_with_restarts,
  "cosine_with_min_lr": _cosine_with_min_lr,
  "polynomial": _polynomial,
  "inverse_sqrt": _inverse_sqrt,
}
"""Factor of the peak learning rate after warm-up, by lr_scheduler_type."""


def make_schedule(training: TrainingArguments, total_steps: int) -> Schedule:
  """The learning rate over the run, in float64 on the host, so that what is logged is what is used.

  As in transformers, the first step of a warm-up has rate 0.

  Raises:
    UserError: an unknown schedule, or arguments that it does not take.
  """
  name = training.lr_scheduler_type
  if name not in SCHEDULES:
    raise UserError(f"training.lr_scheduler_type={name!r} is unknown; use one of {sorted(SCHEDULES)}")
  kwargs = _schedule_arguments(training)
  ramp = _Ramp(training.learning_rate, _warmup_steps(training, total_steps), total_steps)
  factor = SCHEDULES[name]

  def schedule(step: int) -> float:
    return ramp.peak * (ramp.warm(step) if step < ramp.warmup else factor(ramp, step, **kwargs))

  try:
    schedule(ramp.warmup)
    schedule(total_steps)
  except ZeroDivisionError:
    raise UserError(
      f"training.learning_rate={training.learning_rate:g} and training.lr_scheduler_kwargs={training.lr_scheduler_kwargs!r} "
      f"make {name!r} divide by 0; raise what is 0 there, or take 'constant'"
    ) from None
  return schedule


def _warmup_steps(training: TrainingArguments, total_steps: int) -> int:
  if training.lr_scheduler_type == "constant":
    return 0
  return (
    training.warmup_steps if training.warmup_steps > 0 else math.ceil(total_steps * training.warmup_ratio)
  )


def warmup_remark(training: TrainingArguments, total_steps: int) -> str | None:
  """A line for the log where the warm-up is not over when the run is; None where it is."""
  warmup = _warmup_steps(training, total_steps)
  if not 0 < total_steps <= warmup:
    return None
  of_ratio = training.warmup_steps <= 0
  setting = f"warmup_ratio={training.warmup_ratio:g}" if of_ratio else f"warmup_steps={training.warmup_steps}"
  return (
    f"training.{setting} makes a warm-up of {warmup} steps, and the run has {total_steps}: the learning rate ends at "
    f"{(total_steps - 1) / warmup:.0%} of training.learning_rate={training.learning_rate:g}; lower it, or train longer"
  )


def _schedule_arguments(training: TrainingArguments) -> dict[str, float]:
  """The arguments of the schedule, all of them numbers that it takes.

  Raises:
    UserError: they are not.
  """
  name, kwargs = training.lr_scheduler_type, json.loads(training.lr_scheduler_kwargs or "{}")
  parameters = inspect.signature(SCHEDULES[name]).parameters.values()
  taken = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
  for key, value in kwargs.items():
    where = f"training.lr_scheduler_kwargs={training.lr_scheduler_kwargs!r}"
    if key not in taken:
      raise UserError(f"{where}: {name!r} has no argument {key!r}; it takes {', '.join(taken) or 'none'}")
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise UserError(f"{where}: {key} must be a number, not {value!r}")
  return kwargs
