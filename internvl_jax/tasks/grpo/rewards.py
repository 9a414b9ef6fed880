"""Rewards of sampled answers: metrics of answers by name, formats, and functions of the user's. Numpy only.

"exact_match"                  a metric of `eval.metrics` that scores each answer by itself
"format:<think>.*</think>.+"   1 where the whole answer matches the regular expression, else 0
"my_rewards:shape_reward"      a function of a module, with TRL's arguments
"""

import dataclasses
import importlib
import inspect
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from internvl_jax.errors import UserError, did_you_mean
from internvl_jax.eval.metrics import METRICS
from internvl_jax.eval.metrics.answered import Answered

OF_WHOLE_SETS = frozenset(("cider", "mmmu"))
"""Metrics by which an answer's score depends on those beside it (CIDEr's rare words, MMMU's guesses): not rewards."""

REWARDS = {name: metric for name, metric in METRICS.items() if name not in OF_WHOLE_SETS}
"""The rewards by name, without those that are written with a colon."""

FORMAT = "format"
"""What is written before the regular expression of a format."""

_SHOWN = 80  # characters of what a function returned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """A sampled answer.

  Attributes:
    answered: its text, its question, and what is right.
    ids: its tokens.
  """

  answered: Answered
  ids: tuple[int, ...] = ()


Score = Callable[[Sequence[Completion]], Sequence[float | None]]
"""Gives each answer its reward; None: it has none by this function."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward:
  """A reward that was asked for.

  Attributes:
    name: as it was asked for.
    label: in the log, where modules and regular expressions have no place; numbered where several would be alike.
    score: gives the rewards.
  """

  name: str
  label: str
  score: Score

  def __call__(self, completions: Sequence[Completion]) -> Float[np.ndarray, " N"]:
    """The rewards of answers, float32 [N]; NaN where there is none. What a function raises is not caught.

    Raises:
      UserError: what a function returned are not rewards.
    """
    found = self.score(completions)
    if isinstance(found, np.ndarray):
      found = found.tolist()
    if not isinstance(found, list | tuple) or len(found) != len(completions):
      raise UserError(
        f"grpo.reward_funcs: {self.name} returned {_shown(found)} for {len(completions)} completions; return a list with a "
        "number, or None, for each"
      )
    return np.array([self._number(value, i) for i, value in enumerate(found)], np.float32)

  def _number(self, value: Any, i: int) -> float:
    if value is None:
      return math.nan
    # Arrays of one element, such as those of a list of PyTorch's, are numbers as well.
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
      raise UserError(
        f"grpo.reward_funcs: {self.name} returned {_shown(value)} for completion {i}; return a finite number, or None where "
        "there is no reward"
      )
    return float(value)


def open_rewards(names: Sequence[str]) -> tuple[Reward, ...]:
  """Opens the rewards that a config names, in order; functions are imported.

  Raises:
    UserError: a name that there is not or twice, a format that is no regular expression, or a function that cannot be had.
  """
  repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
  if repeated:
    raise UserError(f"grpo.reward_funcs: {', '.join(repeated)} is named twice; name it once, with its weight")
  opened = [_open(name) for name in names]
  labels = [reward.label for reward in opened]
  numbered = [
    label if labels.count(label) == 1 else f"{label}_{1 + labels[:i].count(label)}"
    for i, label in enumerate(labels)
  ]
  return tuple(
    dataclasses.replace(reward, label=label) for reward, label in zip(opened, numbered, strict=True)
  )


def rewards_of(rewards: Sequence[Reward], completions: Sequence[Completion]) -> Float[np.ndarray, "N F"]:
  """What each function gives each answer, float32 [N, F]; NaN where that is nothing."""
  return np.stack([reward(completions) for reward in rewards], axis=1)


def weighted_sum(values: Float[np.ndarray, "N F"], weights: Sequence[float] = ()) -> Float[np.ndarray, " N"]:
  """The reward of each answer, float32 [N]: the weighted sum of those that it has; NaN where it has none, as in TRL.

  Args:
    values: float [N, F], NaN where a function gives nothing.
    weights: F of them; empty: 1 each.
  """
  known = ~np.isnan(values)
  sums = np.where(known, values, 0.0) @ np.asarray(weights or np.ones(values.shape[1]), np.float64)
  return np.where(known.any(axis=1), sums, np.nan).astype(np.float32)


def _open(name: str) -> Reward:
  if name in REWARDS:
    metric = REWARDS[name]
    return Reward(name=name, label=name, score=lambda group: metric([one.answered for one in group]))
  before, colon, after = name.partition(":")
  if colon and before == FORMAT:
    return Reward(name=name, label=FORMAT, score=_format(name, after))
  if colon:
    return Reward(name=name, label=after, score=_TrlFunction(_imported(name, before, after)))
  known = (*REWARDS, f"{FORMAT}:REGULAR_EXPRESSION", "MODULE:FUNCTION")
  why = ", whose scores depend on the answers beside" if name in OF_WHOLE_SETS else ""
  raise UserError(f"grpo.reward_funcs: there is no reward {name!r}{why}{did_you_mean(name, known)}")


def _format(name: str, expression: str) -> Score:
  try:
    compiled = re.compile(expression, re.DOTALL)
  except re.error as error:
    raise UserError(f"grpo.reward_funcs: {name} is no regular expression: {error}") from error
  return lambda group: [float(compiled.fullmatch(one.answered.prediction) is not None) for one in group]


def _imported(name: str, module: str, function: str) -> Callable[..., Any]:
  try:
    found = importlib.import_module(module)
  except ModuleNotFoundError as error:
    # A module that the user's module wants is another matter.
    if error.name is None or not f"{module}.".startswith(f"{error.name}."):
      raise
    raise UserError(
      f"grpo.reward_funcs: {name}: there is no module {error.name!r}; put its folder into PYTHONPATH, or install it"
    ) from error
  if not hasattr(found, function):
    functions = [name for name, value in vars(found).items() if inspect.isfunction(value)]
    raise UserError(
      f"grpo.reward_funcs: {name}: {found.__file__} has no {function!r}{did_you_mean(function, functions)}"
    )
  called = getattr(found, function)
  if not callable(called):
    raise UserError(f"grpo.reward_funcs: {name} is {_shown(called)}, which is no function; name one")
  return called


@dataclasses.dataclass(frozen=True)
class _TrlFunction:
  """Calls a function as TRL does, with lists by name: prompts, completions, completion_ids, and the fields of the lines.

  A field that a line does not have is None. A function without `**kwargs` is given what it names.
  """

  function: Callable[..., Any]

  def __call__(self, completions: Sequence[Completion]) -> Any:
    own = {
      "prompts": [one.answered.question for one in completions],
      "completions": [one.answered.prediction for one in completions],
      "completion_ids": [list(one.ids) for one in completions],
    }
    records = [one.answered.record for one in completions]
    return self.function(**self._taken(own | _columns(records, reserved=own)))

  def _taken(self, arguments: dict[str, list[Any]]) -> dict[str, list[Any]]:
    parameters = inspect.signature(self.function).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
      return arguments
    return {name: values for name, values in arguments.items() if name in parameters}


def _columns(records: Sequence[Mapping[str, Any]], reserved: Mapping[str, Any]) -> dict[str, list[Any]]:
  names = dict.fromkeys(name for record in records for name in record if name not in reserved)
  return {name: [record.get(name) for record in records] for name in names}


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
