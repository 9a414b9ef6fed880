"""Times steps: what both sides of `benchmarks/step.py` share."""

import json
import resource
import time
from collections.abc import Callable


def time_steps(step: Callable[[], float], steps: int) -> None:
  """Takes steps and prints a line of JSON, see `benchmarks.step.Timing`.

  Args:
    step: takes a step and returns its loss.
    steps: how many.
  """
  losses, seconds, busy = [], [], []
  for _ in range(steps):
    start, worked = time.perf_counter(), _worked()
    losses.append(step())
    seconds.append(time.perf_counter() - start)
    busy.append(_worked() - worked)
  print(json.dumps({"losses": losses, "seconds": seconds, "busy": busy}))


def _worked() -> float:
  """Seconds that cores have worked for this process, in it or for it in the kernel."""
  used = resource.getrusage(resource.RUSAGE_SELF)
  return used.ru_utime + used.ru_stime
