"""How an input may end: well, or with what `frontdoor` tells a user; in time, and in bounded memory."""

import contextlib
import faulthandler
import os
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from internvl_jax import cli

PACKAGE = Path(cli.__file__).parent
SECONDS = 20
GIBIBYTES = 4


class Overtime(BaseException):
  """Not an Exception: whoever catches all of those must not swallow it."""


class Failure(NamedTuple):
  """An input that ended badly, and how to run it again."""

  number: int
  what: str
  error: BaseException | str

  def __str__(self) -> str:
    if isinstance(self.error, str):
      return f"#{self.number} {self.what[:400]}\n  {self.error}"
    kind, place = type(self.error).__name__, place_of(self.error)
    return f"#{self.number} {self.what[:400]}\n  {kind} in {place}: {str(self.error)[:200]}"


def place_of(error: BaseException) -> str:
  """Returns the innermost function of ours that an exception came through."""
  frames = [f for f in traceback.extract_tb(error.__traceback__) if str(PACKAGE) in f.filename]
  if not frames:
    return "no function of ours"
  return f"{Path(frames[-1].filename).relative_to(PACKAGE.parent)}:{frames[-1].lineno} {frames[-1].name}"


@contextlib.contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
  """Ends what takes longer by an exception, and what does not listen by the process's end."""

  def give_up(signum: int, frame: Any) -> None:
    raise Overtime(f"more than {seconds:g} s")

  before = signal.signal(signal.SIGALRM, give_up)
  faulthandler.dump_traceback_later(3 * seconds, exit=True)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    faulthandler.cancel_dump_traceback_later()
    signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def bounded_memory(gibibytes: int = GIBIBYTES) -> Iterator[None]:
  """Refuses this process more memory than it has and so much."""
  before = resource.getrlimit(resource.RLIMIT_AS)
  now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
  resource.setrlimit(resource.RLIMIT_AS, (now + (gibibytes << 30), before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_AS, before)


def ends_well(call: Callable[[], Any], seconds: float = SECONDS) -> BaseException | str | None:
  """Runs a call and returns what is wrong about its end; None for a result, or a message to the user."""
  try:
    with limited(seconds):
      call()
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as error:
    message = cli.explain(error) if isinstance(error, Exception) else None
    if message is None:
      return error
    return wrong_with(message)
  return None


def wrong_with(message: str) -> str | None:
  """Returns what is wrong with a message to the user."""
  if not message.strip():
    return "an empty message"
  lines = message.splitlines()
  if len(lines) > 40 or max(map(len, lines)) > 2000:
    return f"a message of {len(lines)} lines, {len(message)} characters: {message[:200]}"
  if not message.replace("\n", "").isprintable():
    return f"a message that cannot be printed: {message[:200]!r}"
  if "MemoryError" in message or "Traceback" in message:
    return f"a message that explains nothing: {message[:300]}"
  return None


def generator(kind: str, number: int, seed: int) -> np.random.Generator:
  """Returns the generator of one input: the same whichever others are run."""
  return np.random.default_rng([seed, number, *kind.encode()])


def report(failures: list[Failure], shown: int = 12) -> str:
  """Returns the first failures in words."""
  more = f"\n... and {len(failures) - shown} more" if len(failures) > shown else ""
  return (
    f"{len(failures)} ended badly (one alone: --fuzz-only N):\n"
    + "\n".join(map(str, failures[:shown]))
    + more
  )
