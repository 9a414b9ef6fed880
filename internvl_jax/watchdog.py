"""Reports the phase and the stacks of a run that seems to hang.

A hang has no message of its own: a worker that waits for a file system, a collective whose other side never came.
The loop names each phase that it enters; a thread reports a phase that takes too long.
"""

import contextlib
import dataclasses
import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Iterator

from internvl_jax.stopwatch import Stopwatch


@dataclasses.dataclass
class _Phase:
  name: str
  step: int | None
  start: float
  reports: int = 0


class Watchdog:
  """Prints host, phase, step and stacks once a phase lasts too long, and again every such time.

  Use it as a context manager; outside of it nothing is watched.

  Attributes:
    stopwatch: measures the phases of the start.
  """

  def __init__(
    self,
    host: str,
    seconds: float,
    *,
    write: Callable[[str], None] | None = None,
    stopwatch: Stopwatch | None = None,
  ):
    """Sets it up.

    Args:
      host: how this process calls itself.
      seconds: how long a phase may last unremarked.
      write: takes the text in place of stderr.
      stopwatch: is told the phases, too; None: a new one.
    """
    self._host, self._seconds, self._write = host, seconds, write
    self.stopwatch = Stopwatch() if stopwatch is None else stopwatch
    self._phases: list[_Phase] = []
    self._stopped = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

  def __enter__(self) -> "Watchdog":
    self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._stopped.set()
    self._thread.join()

  @contextlib.contextmanager
  def phase(self, name: str, step: int | None = None) -> Iterator[None]:
    """Marks what the main thread does; of phases within each other the inner one counts.

    Once an inner phase is over, the outer one's time begins anew: it has not been waiting.
    """
    self._phases.append(_Phase(name, step, time.monotonic()))
    try:
      with self.stopwatch.phase(name):
        yield
    finally:
      # In this order: the thread that watches may look in between.
      for outer in self._phases[-2:-1]:
        outer.start, outer.reports = time.monotonic(), 0
      self._phases.pop()

  def _watch(self) -> None:
    # Often enough to be on time, seldom enough to cost nothing.
    while not self._stopped.wait(min(self._seconds / 10, 5.0)):
      for phase in self._phases[-1:]:
        lasted = time.monotonic() - phase.start
        if lasted >= self._seconds * (phase.reports + 1):
          phase.reports += 1
          self._report(phase, lasted)

  def _report(self, phase: _Phase, lasted: float) -> None:
    at = "" if phase.step is None else f" of step {phase.step}"
    text = f"{self._host} has been in phase {phase.name!r}{at} for {lasted:,.0f} s; its threads are at:"
    if self._write is not None:
      self._write(text)
      return
    print(text, file=sys.stderr, flush=True)
    # The main thread's stack comes last; it may be another one that everything waits for.
    faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
