"""Measures where the time of a start goes: from the command to the first step, by phase.

A phase of the main thread counts without the phases inside of it, so that all of them and "other" add up to the whole.
What other threads do meanwhile is listed apart: it costs time only where the main thread waits for it.
"""

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

OTHER = "other"
"""What is in no phase."""

_NAMES = {"data wait": "first batch", "step": "first step"}
"""What phases of the loop are before there was a step."""

_WHOLE = "to the first step"

_SHOWN_SECONDS = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
  """Some of a phase.

  Attributes:
    name: of the phase.
    start, stop: seconds, as `time.perf_counter` counts them.
    cpu: seconds of processor time of all threads of the process; None in other threads than the main one.
  """

  name: str
  start: float
  stop: float
  cpu: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """A phase in the table.

  Attributes:
    name: of the phase.
    seconds: how long it took.
    cpu: processor time meanwhile; None in other threads than the main one.
  """

  name: str
  seconds: float
  cpu: float | None


class Stopwatch:
  """Adds up the phases of a start until `stop`; later ones are not kept."""

  def __init__(self, began: float | None = None):
    """Starts it.

    Args:
      began: when the start began, as `time.perf_counter` counts; None: now. What came before this call is a phase of its
        own, "config".
    """
    now = time.perf_counter()
    self._began = now if began is None else min(began, now)
    self._main = threading.get_ident()
    self._stack: list[str] = []
    self._since = now, time.process_time()
    self._done: float | None = None
    self._intervals: list[Interval] = []
    self._beside: list[Interval] = []
    if began is not None:
      self._intervals.append(Interval(name="config", start=self._began, stop=now, cpu=time.process_time()))

  @classmethod
  def of_process(cls) -> "Stopwatch":
    """A stopwatch that was started with the process: it counts the interpreter's start and all imports."""
    return cls(time.perf_counter() - _age())

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Counts the body, without phases inside of it."""
    if self._done is not None:
      yield
    elif threading.get_ident() != self._main:
      start = time.perf_counter()
      try:
        yield
      finally:
        self._beside.append(Interval(name=name, start=start, stop=time.perf_counter(), cpu=None))
    else:
      self._cut()
      self._stack.append(_NAMES.get(name, name))
      try:
        yield
      finally:
        self._cut()
        self._stack.pop()

  def _cut(self) -> None:
    """Ends an interval of the innermost phase; the next one begins."""
    now = time.perf_counter(), time.process_time()
    then, self._since = self._since, now
    if self._done is None:
      name = self._stack[-1] if self._stack else OTHER
      self._intervals.append(Interval(name=name, start=then[0], stop=now[0], cpu=now[1] - then[1]))

  def stop(self, done: float) -> None:
    """Ends the measurement.

    Args:
      done: when the first step was done.
    """
    if self._done is None:
      self._cut()
      self._done = done

  @property
  def seconds(self) -> float:
    """From the beginning to the first step, or to now."""
    return (time.perf_counter() if self._done is None else self._done) - self._began

  def rows(self) -> list[Row]:
    """The phases of the main thread, in the order in which they began; they add up to `seconds`."""
    rows = self._added(self._intervals)
    others = [row for row in rows if row.name == OTHER]
    return [row for row in rows if row.name != OTHER] + others

  def beside(self) -> list[Row]:
    """The phases of other threads, in the order in which they ended."""
    return self._added(self._beside)

  def _added(self, intervals: list[Interval]) -> list[Row]:
    until = self._began + self.seconds
    found: dict[str, Row] = {}
    for interval in intervals:
      seconds = max(0.0, min(interval.stop, until) - interval.start)
      # Of an interval that reaches beyond the end it is not known how much of its processor time lies before.
      cpu = None if interval.cpu is None else interval.cpu if interval.stop <= until else 0.0
      row = found.setdefault(interval.name, Row(name=interval.name, seconds=0.0, cpu=cpu and 0.0))
      found[interval.name] = Row(
        name=row.name, seconds=row.seconds + seconds, cpu=None if cpu is None else (row.cpu or 0.0) + cpu
      )
    return list(found.values())

  def line(self) -> str:
    """The start in a line: "First step after 17.2 s: imports 3.1, data 0.9, ...; beside them: compile 8.0"."""

    def listed(rows: list[Row]) -> str:
      return ", ".join(f"{row.name} {row.seconds:.1f}" for row in rows if row.seconds >= _SHOWN_SECONDS)

    beside = listed(self.beside())
    return f"First step after {self.seconds:.1f} s: {listed(self.rows())}{'; beside them: ' if beside else ''}{beside}"

  def table(self) -> list[str]:
    """The lines of a table: seconds and processor time of each phase."""
    rows, beside = self.rows(), self.beside()
    width = max(map(len, [_WHOLE, *(row.name for row in [*rows, *beside])])) + 2
    lines = [f"{'phase':<{width}}{'seconds':>9}{'CPU s':>9}"]
    lines += [f"{row.name:<{width}}{row.seconds:>9.2f}{row.cpu or 0.0:>9.2f}" for row in rows]
    cpu = sum(row.cpu or 0.0 for row in rows)
    lines.append(f"{_WHOLE:<{width}}{self.seconds:>9.2f}{cpu:>9.2f}")
    if beside:
      lines.append("beside them, in other threads:")
      lines += [f"{row.name:<{width}}{row.seconds:>9.2f}" for row in beside]
    return lines


def _age() -> float:
  """Seconds since this process was started; 0 where the system does not tell."""
  try:
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    uptime = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
    return max(0.0, uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
  except (OSError, ValueError, IndexError):
    return 0.0
