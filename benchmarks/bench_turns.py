"""Processes that take turns at the same work: each is stopped while it is not its turn."""

import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

TURN_SECONDS = 300
_TICK = 1 / os.sysconf("SC_CLK_TCK")

Turn = Callable[[Sequence[int], int], int]
"""Handles images of these indices, or so many rows of images; returns how many tiles that were."""

Prepare = Callable[[], contextlib.AbstractContextManager[Turn]]
"""Gets a process ready for its turns, in that process; picklable."""


class Lane:
  """A process of a contender, stopped outside its turns. Workers that it starts are stopped with it."""

  def __init__(self, prepare: Prepare, cores: Sequence[int]):
    context = multiprocessing.get_context("spawn")
    self._pipe, theirs = context.Pipe()
    self._process = context.Process(target=_serve, args=(theirs, prepare, tuple(cores)))
    self._process.start()

  def ready(self) -> None:
    """Waits until it is warm."""
    self.receive()
    self.pause()

  def send(self, indices: Sequence[int], rows: int) -> None:
    os.killpg(self._pid, signal.SIGCONT)
    self._pipe.send((list(indices), rows))

  def receive(self) -> Any:
    if not self._pipe.poll(TURN_SECONDS):
      raise TimeoutError(f"a contender did not answer within {TURN_SECONDS} s")
    return self._pipe.recv()

  def pause(self) -> None:
    os.killpg(self._pid, signal.SIGSTOP)

  def cpu_seconds(self) -> float:
    """CPU time so far, of the process and its workers."""
    return sum(_cpu_seconds(self._pid))

  def close(self) -> None:
    with contextlib.suppress(ProcessLookupError, BrokenPipeError):  # It may have failed.
      os.killpg(self._pid, signal.SIGCONT)
      self._pipe.send(None)
    self._process.join(TURN_SECONDS)

  @property
  def _pid(self) -> int:
    assert self._process.pid is not None
    return self._process.pid


def _cpu_seconds(group: int) -> Iterator[float]:
  for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):  # a process that ended meanwhile
      fields = stat.read_text().rpartition(")")[2].split()
      if int(fields[2]) == group:
        yield (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _serve(pipe: Any, prepare: Prepare, cores: tuple[int, ...]) -> None:
  os.setpgid(0, 0)
  os.sched_setaffinity(0, cores)
  with prepare() as turn:
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
      start = time.perf_counter()
      tiles = turn(*order)
      pipe.send((time.perf_counter() - start, tiles))


@dataclasses.dataclass
class Measured:
  """A turn of a contender, for each image."""

  images_per_second: float
  tiles_per_second: float
  cpu_seconds: float
  others: float
  """Cores that other processes of the machine took meanwhile."""


def take_turn(lanes: Sequence[Lane], indices: Sequence[int], rows: int) -> tuple[Measured, int]:
  """Lets a contender handle these images; returns also how many tiles they had."""
  before, busy, start = sum(lane.cpu_seconds() for lane in lanes), busy_seconds(), time.perf_counter()
  shares = [indices[i :: len(lanes)] for i in range(len(lanes))]
  for lane, share in zip(lanes, shares, strict=True):
    lane.send(share, rows)
  answers = [lane.receive() for lane in lanes]
  for lane in lanes:
    lane.pause()
  cpu = sum(lane.cpu_seconds() for lane in lanes) - before
  others = (busy_seconds() - busy - cpu) / (time.perf_counter() - start)
  # One lane may end before the other; it would go on with other images, so the rates add up.
  rate = sum(len(share) / seconds for share, (seconds, _) in zip(shares, answers, strict=True))
  tiles = sum(tiles for _, tiles in answers)
  return Measured(rate, rate * tiles / len(indices), cpu / len(indices), others), tiles


def busy_seconds() -> float:
  """CPU time that the machine has spent, or was denied by its host."""
  ticks = [int(field) for field in pathlib.Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
  idle, waiting = ticks[3:5]
  return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def compare(ours: Sequence[Measured], other: Sequence[Measured]) -> dict[str, Any]:
  """Ratios of the rate within each round, and of the CPU time of all rounds together."""
  pairs = list(zip(ours, other, strict=True))
  speed = [a.images_per_second / b.images_per_second for a, b in pairs]
  calm = [ratio for ratio, pair in zip(speed, pairs, strict=True) if max(m.others for m in pair) < 0.05]
  return {
    "rounds": speed,
    "median": statistics.median(speed),
    "quartiles": np.quantile(speed, (0.25, 0.75)).tolist(),
    "calm_rounds": len(calm),
    "calm_median": statistics.median(calm) if calm else None,
    # The kernel counts in ticks: a short turn may have taken none.
    "cpu": sum(b.cpu_seconds for b in other) / max(sum(a.cpu_seconds for a in ours), _TICK),
  }
