"""The rule by which an InternVL3.5-Flash compresses tiles of a question: thresholds of its router's probabilities."""

import dataclasses
from typing import Protocol

import numpy as np

from internvl_jax.errors import UserError

AUTO, ALL, NONE = "auto", "all", "none"
"""What the setting `compress` may say apart from two thresholds: config.json's thresholds, every tile, no tile."""


class Thresholds(Protocol):
  """The thresholds of a model's config.json; `models.flash.FlashConfig` has them."""

  @property
  def relative_threshold(self) -> float: ...

  @property
  def absolute_threshold(self) -> float: ...


@dataclasses.dataclass(frozen=True)
class Rule:
  """Which tiles of a question are compressed, by their probabilities.

  Attributes:
    relative: a tile's probability must be above this quantile of the question's; None: of no matter.
    absolute: and at least this.
  """

  relative: float | None
  absolute: float

  def __call__(self, probabilities: np.ndarray) -> np.ndarray:
    """Which tiles are compressed, bool [t], by their probabilities, float32 [t]."""
    if not len(probabilities):
      return np.zeros(0, np.bool_)
    compressed = probabilities >= np.float32(self.absolute)
    return (
      compressed
      if self.relative is None
      else compressed & (probabilities > quantile(probabilities, self.relative))
    )


def quantile(values: np.ndarray, q: float) -> np.float32:
  """The q-quantile of float32 [n] with linear interpolation, in torch.quantile's steps: a tile may lie exactly on it."""
  ordered = np.sort(values.astype(np.float32))
  rank = np.float32(q) * np.float32(len(ordered) - 1)
  low, high = ordered[int(np.floor(rank))], ordered[int(np.ceil(rank))]
  share = rank - np.floor(rank)
  # torch.lerp goes from the nearer end, and rounds once.
  start, share = (low, share) if share < 0.5 else (high, share - np.float32(1))
  return np.float32(np.float64(start) + np.float64(share) * np.float64(high - low))


def rule_of(compress: str, flash: Thresholds | None, name: str = "compress") -> Rule | None:
  """The rule that the setting `compress` asks for; None compresses nothing.

  Args:
    compress: "auto", "all", "none", or the relative and the absolute threshold, "0.3,0.5".
    flash: the model's router, if it has one.
    name: what the user calls the setting.

  Raises:
    UserError: it is none of these, or the model has no router.
  """
  rule = read_rule(compress, name)
  if flash is None:
    if compress not in (AUTO, NONE):
      raise UserError(
        f"{name}={compress!r}: the model is no InternVL3.5-Flash and compresses no tiles; leave it out"
      )
    return None
  return Rule(flash.relative_threshold, flash.absolute_threshold) if compress == AUTO else rule


def read_rule(compress: str, name: str = "compress") -> Rule | None:
  """The rule that `compress` states itself; None for "auto" and "none".

  Raises:
    UserError: it is none of what it may be.
  """
  if compress in (AUTO, NONE):
    return None
  if compress == ALL:
    return Rule(None, 0.0)
  try:
    relative, absolute = map(float, compress.split(","))
  except ValueError:
    relative = absolute = np.nan
  if not (0 <= relative <= 1 and 0 <= absolute <= 1):
    raise UserError(
      f"{name}={compress!r}: must be 'auto', 'all', 'none', or the relative and the absolute threshold, from 0 to 1, as in "
      "'0.3,0.5'"
    )
  return Rule(relative, absolute)
