"""How a function is timed on a device."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
  """Seconds of one call: the median, the least and the most of several samples, each the mean of `calls` calls."""

  median: float
  least: float
  most: float
  samples: int
  calls: int

  @classmethod
  def of(cls, samples: list[float], calls: int) -> "Timing":
    """The summary of samples, each already the mean of so many calls."""
    return cls(
      median=statistics.median(samples),
      least=min(samples),
      most=max(samples),
      samples=len(samples),
      calls=calls,
    )

  def as_ms(self) -> dict[str, float]:
    """Milliseconds, as results keep them."""
    return {"ms": 1e3 * self.median, "ms_least": 1e3 * self.least, "ms_most": 1e3 * self.most}


def time_calls(
  function: Callable, *args: Any, samples: int = 7, sample_seconds: float = 0.03, most_calls: int = 50
) -> Timing:
  """Times a jitted function: compiled and warmed up before, and waited for after each sample.

  Calls of a sample follow each other without a pause, so that the host's part is hidden behind the device's, and find in
  the L2 cache what the call before left there: as much as fits, as between the layers of a model. Inputs are not donated:
  all calls read the same ones.

  Args:
    function: under `jax.jit`, or compiled.
    *args: on the device.
    samples: how many are taken.
    sample_seconds: what a sample takes at least, by as many calls as that needs.
    most_calls: of a sample.
  """
  for _ in range(2):
    jax.block_until_ready(function(*args))
  start = time.perf_counter()
  jax.block_until_ready(function(*args))
  calls = min(most_calls, max(1, math.ceil(sample_seconds / (time.perf_counter() - start))))
  seconds = []
  for _ in range(samples):
    start = time.perf_counter()
    for _ in range(calls):
      out = function(*args)
    jax.block_until_ready(out)
    seconds.append((time.perf_counter() - start) / calls)
  return Timing.of(seconds, calls)
