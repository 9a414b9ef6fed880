"""Where the time of a step goes, and the rates that are logged: throughput, MFU, peak memory."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from internvl_jax.batch import BatchCounts
from internvl_jax.metrics.mfu import UsefulFlops


@dataclasses.dataclass(frozen=True)
class StepTimes:
  """How long a step took.

  Attributes:
    whole: seconds from the end of the step before to the end of this one.
    data: of them, seconds in which the devices were idle because the batch was not ready.
    compute: seconds in which they computed.
  """

  whole: float
  data: float
  compute: float


class StepClock:
  """Measures steps that overlap: the host is a step ahead of the devices, so its waits are not theirs."""

  def __init__(self):
    """A clock that has not seen the start of any step."""
    self._last: float | None = None

  def restart(self, now: float | None) -> None:
    """Starts the next step at `now`; None: leaves it out, since what came before is not over."""
    self._last = now

  def times(self, *, fetched_in: float, dispatched: float, done: float) -> StepTimes | None:
    """The times of the step that is done; None if its start was not seen.

    Args:
      fetched_in: seconds that the host waited for the batch.
      dispatched: when the step was handed to the devices.
      done: when they had finished it.
    """
    start, self._last = self._last, done
    if start is None:
      return None
    idle = max(0.0, dispatched - start)
    return StepTimes(done - start, min(idle, fetched_in), done - max(dispatched, start))


@dataclasses.dataclass(frozen=True)
class Gauges:
  """What turns counts and seconds into rates.

  Attributes:
    useful: FLOPs that a batch needs.
    peak: FLOP/s of all devices together; None where it is not known.
    devices: this host's, to ask for their memory.
  """

  useful: UsefulFlops
  peak: float | None
  devices: Sequence[Any]

  def peak_memory(self) -> int | None:
    """Most bytes that were ever in use on one of this host's devices; None where the backend does not report it."""
    found = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in self.devices]
    return max((value for value in found if value is not None), default=None)


class Window:
  """Sums over the steps since the last log entry."""

  def __init__(self):
    """An empty window."""
    self.losses: list[float] = []
    self.terms: dict[str, list[float]] = {}
    self.skipped = 0
    self.steps = 0
    self.supervised = self.tiles = self.flops = 0.0
    self.whole = self.data = self.compute = 0.0
    self.save_pause = 0.0

  def add_times(self, counts: BatchCounts, times: StepTimes, useful: UsefulFlops) -> None:
    """Adds a step whose time is known."""
    self.steps += 1
    self.supervised += float(counts.supervised)
    self.tiles += float(counts.image_tokens) / useful.tokens_per_tile
    self.flops += useful.of(counts)
    self.whole += times.whole
    self.data += times.data
    self.compute += times.compute

  def rates(self, gauges: Gauges) -> dict[str, Any]:
    """The rates of these steps, by their names in the log; empty where no step was timed."""
    if not self.steps:
      return {}
    found = {
      "supervised_tokens_per_second": self.supervised / self.whole,
      "tiles_per_second": self.tiles / self.whole,
      "seconds_per_step": self.whole / self.steps,
      "data_seconds_per_step": self.data / self.steps,
      "compute_seconds_per_step": self.compute / self.steps,
    }
    if gauges.peak is not None:
      found["mfu"] = self.flops / self.whole / gauges.peak
    return found
