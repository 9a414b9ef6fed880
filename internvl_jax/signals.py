"""Ctrl-C and SIGTERM end a command in one line: no traceback, no process left behind, exit code 75.

A thread waits for both signals, which are blocked everywhere else. So it does not matter what the main thread is at,
be it an import or a compilation in C++; and worker processes inherit the block and are left to their parent, although
Ctrl-C reaches every process of a terminal.
"""

import contextlib
import multiprocessing
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

GOES_ON = "Stopped; the same command goes on"
"""The last line of a command that can be resumed."""

STOPPED = 75
"""Exit code of a command that was stopped by a signal: EX_TEMPFAIL of sysexits.h, "try again later"."""

_KINDS = (signal.SIGINT, signal.SIGTERM)

# Ctrl-C reaches both a launcher and what it started, and the launcher passes it on as the one signal or the other. Torchrun,
# mpirun and srun set these; the same signal within so many seconds was sent once.
_LAUNCHED = (
  "TORCHELASTIC_RUN_ID",
  "OMPI_COMM_WORLD_RANK",
  "PMI_RANK",
  "SLURM_STEP_ID",
  "RANK",
  "JAX_PROCESS_ID",
)
_PASSED_ON_SECONDS = 2.0

# Finalizers of queues take a lock that a worker which was killed may hold.
_CLEAN_SECONDS = 4.0


class _Watch:
  """Handles the signals that stop this process; there is one instance."""

  def __init__(self):
    self.thread: threading.Thread | None = None
    self.lock = threading.RLock()
    self.listener: Callable[[], None] | None = None
    self.first: tuple[float, int] | None = None
    self.last_line = "Stopped; the same command starts again"
    self.endings: list[Callable[[], None]] = []

  def receive(self, kind: int) -> None:
    """Takes in a signal, on the thread that waits for them."""
    now = time.monotonic()
    with self.lock:
      if self.first is None:
        self.first = now, kind
        if self.listener is not None:
          name = "Ctrl-C" if kind == signal.SIGINT else "SIGTERM"
          write_line("I", f"{name}: what is under way is ended and saved; another {name} ends at once")
          self.listener()
          return
      elif self._is_passed_on(now, kind):
        return
      self.end()

  def _is_passed_on(self, now: float, kind: int) -> bool:
    assert self.first is not None
    when, first = self.first
    several = kind != first or any(name in os.environ for name in _LAUNCHED)
    return several and now - when < _PASSED_ON_SECONDS

  def end(self) -> None:
    """Ends the process with its last line and exit code."""
    leave(STOPPED, lambda: write_line("W", self.last_line))


_watch = _Watch()


def watch() -> None:
  """Installs the signal handling of a command; call it from the main thread, before any other is started.

  A signal that is ignored, as a shell lets what it runs in the background ignore Ctrl-C, stays so.
  """
  if _watch.thread is not None or threading.current_thread() is not threading.main_thread():
    return
  kinds = [kind for kind in _KINDS if signal.getsignal(kind) is not signal.SIG_IGN]
  for kind in kinds:
    # Of one that a library has unblocked.
    signal.signal(kind, lambda number, _: _watch.receive(number))
  signal.pthread_sigmask(signal.SIG_BLOCK, kinds)
  _watch.thread = threading.Thread(target=_wait, args=(kinds,), name="signals", daemon=True)
  _watch.thread.start()


def is_watching() -> bool:
  """Whether `watch` was called in this process."""
  return _watch.thread is not None


def _wait(kinds: list[signal.Signals]) -> None:
  while True:
    _watch.receive(signal.sigwait(kinds))


@contextlib.contextmanager
def listening(listener: Callable[[], None]) -> Iterator[None]:
  """Leaves the first signal to `listener`, which is called on another thread; the second one ends the process."""
  with _watch.lock:
    _watch.listener = listener
  try:
    yield
  finally:
    with _watch.lock:
      _watch.listener = None


def set_last_line(text: str) -> None:
  """Sets the line that is printed when the process is stopped."""
  _watch.last_line = text


@contextlib.contextmanager
def cleaned_up(function: Callable[[], None]) -> Iterator[None]:
  """Calls the function where the process is ended in the body by `leave`, which no `finally` sees.

  It may be called from any thread, and should take no more than a moment.
  """
  _watch.endings.append(function)
  try:
    yield
  finally:
    _watch.endings.remove(function)


def end_as_told() -> None:
  """Ends the process as a signal without a listener does."""
  with _watch.lock:
    _watch.end()


_leaving = threading.Lock()


def leave(code: int, last_words: Callable[[], None] = lambda: None) -> NoReturn:
  """Ends the process at once, after its workers: nothing is written after the last line, no other process is waited for.

  Python's own way out would join threads that wait for other hosts or decode on, each with a message. Where another
  thread is ending the process already, its line is the last.
  """
  _leaving.acquire()
  sys.stdout.flush()
  sys.stderr.flush()
  # Those who miss the workers would complain.
  stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 2)
  for worker in multiprocessing.active_children():
    worker.kill()
  cleaner = threading.Thread(target=_clean, daemon=True)
  cleaner.start()
  cleaner.join(_CLEAN_SECONDS)
  if not cleaner.is_alive():
    _dismiss_tracker()
  os.dup2(stderr, 2)
  last_words()
  sys.stderr.flush()
  os._exit(code)


def _clean() -> None:
  for function in reversed(_watch.endings):
    function()
  # Takes the names of semaphores and of shared memory out of /dev/shm; else a helper of Python's does so, with a warning.
  multiprocessing.util._run_finalizers(0)  # pyright: ignore[reportAttributeAccessIssue]


def _dismiss_tracker() -> None:
  """Ends Python's helper, which would complain of a name that another thread is at taking away."""
  tracker = multiprocessing.resource_tracker._resource_tracker
  pid = getattr(tracker, "_pid", None)
  if pid is not None:
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, signal.SIGKILL)


def write_line(level: str, text: str) -> None:
  """Writes a line as the log has them, without its locks: the main thread may hold one."""
  begin = "\r\033[K" if sys.stderr.isatty() else ""  # Over a progress bar.
  os.write(2, f"{begin}{time.strftime('%H:%M:%S')} {level} {text}\n".encode())
