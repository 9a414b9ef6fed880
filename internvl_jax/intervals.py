"""When a run logs, scores and saves, and which of its saved steps was the best."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

from internvl_jax.arguments import TrainingArguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Due:
  """What is due after which step, by Hugging Face's strategies: "no", "steps", "epoch".

  Attributes:
    training: the strategies and intervals.
    total_steps: of the run; an interval below 1 is a share of them.
    epoch_of: passes over the data after that many steps.
  """

  training: TrainingArguments
  total_steps: int
  epoch_of: Callable[[int], float]

  def logs(self, step: int) -> bool:
    """Whether an entry of the log is due after that step; after the last one it always is."""
    asked = self.training
    if step == self.total_steps or (step == 1 and asked.logging_first_step):
      return True
    return self._is_due(asked.logging_strategy, self.logging_steps, step)

  def scores(self, step: int) -> bool:
    """Whether the model is to be scored after that step."""
    strategies = {self.training.eval_strategy, self.training.evaluation_strategy} - {"no"}
    return any(self._is_due(strategy, self.eval_steps, step) for strategy in strategies)

  def saves(self, step: int) -> bool:
    """Whether a checkpoint is due after that step."""
    return self._is_due(self.training.save_strategy, self.save_steps, step)

  @property
  def logging_steps(self) -> int:
    """Steps from entry to entry."""
    return steps_of(self.training.logging_steps, self.total_steps)

  @property
  def eval_steps(self) -> int:
    """Steps from score to score; those of the log where none are set."""
    return steps_of(self.training.eval_steps or self.training.logging_steps, self.total_steps)

  @property
  def save_steps(self) -> int:
    """Steps from checkpoint to checkpoint."""
    return steps_of(self.training.save_steps, self.total_steps)

  def _is_due(self, strategy: str, every: int, step: int) -> bool:
    if strategy == "epoch":
      # As in the Trainer, a run ends its last epoch, wherever that stops.
      return step == self.total_steps or math.floor(self.epoch_of(step)) > math.floor(self.epoch_of(step - 1))
    return strategy == "steps" and step > 0 and step % every == 0


def steps_of(interval: float, total: int) -> int:
  """An interval in steps: below 1 it is a share of all steps, rounded up."""
  return max(1, math.ceil(total * interval)) if interval < 1 else int(interval)


@dataclasses.dataclass(frozen=True)
class Best:
  """What `load_best_model_at_end` goes by.

  Attributes:
    metric: name in the log, "eval_..." .
    greater: the greatest value is the best; else the least.
  """

  metric: str
  greater: bool

  def of(self, history: Iterable[dict[str, Any]], among: Collection[int]) -> tuple[int, float] | None:
    """The first step of those with the best value, and the value; None where none of them was scored.

    Args:
      history: entries of the log.
      among: the steps to choose from: those that are saved.
    """
    found = {
      entry["step"]: float(entry[self.metric])
      for entry in history
      if self.metric in entry and entry["step"] in among
    }
    # Of equal ones the first, as in the Trainer; a value that is no number never is the best.
    found = {step: value for step, value in found.items() if math.isfinite(value)}
    if not found:
      return None
    return min(found.items(), key=lambda item: (-item[1] if self.greater else item[1], item[0]))


def best_of(training: TrainingArguments, *, first: str | None) -> Best | None:
  """What the best model is known by; None without `load_best_model_at_end`.

  Args:
    training: names the metric or leaves it open.
    first: the first score of held-out sets; None where there are none, and pairs are judged.
  """
  if not training.load_best_model_at_end:
    return None
  name = (training.metric_for_best_model or first or "rewards/accuracies").removeprefix("eval_")
  greater = training.greater_is_better
  return Best(f"eval_{name}", not _is_loss(name) if greater is None else greater)


def _is_loss(name: str) -> bool:
  """Whether a score is a loss, of a set or of a group of it."""
  metric = name.rpartition("/")[2]
  return metric.endswith("loss") or metric.startswith("loss_")
