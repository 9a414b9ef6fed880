"""Calls a tracker's writer on a thread of its own, so that no tracker holds up a run or ends it."""

import importlib
import queue
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import logging

from internvl_jax.metrics.writers import TrackedRun, Writer

if TYPE_CHECKING:
  from internvl_jax.eval.shown import Shown

CLOSE_SECONDS = 120
"""How long the end of a run waits for a tracker to take what is left: a slow network's uploads, not a dead one's."""


class Background(Writer):
  """A tracker behind a queue. What it raises turns it off: one warning, and a remark at the end of the run.

  The library is imported there, too, beside what the run does.
  """

  def __init__(self, name: str, writer: str, run: TrackedRun):
    """Starts to open it.

    Args:
      name: of the tracker.
      writer: "module:class", see `TRACKERS`.
      run: what the class is made from.
    """
    self._name = name
    self._calls: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()
    self._remark: str | None = None
    # A daemon: a tracker that hangs does not keep the process from ending.
    self._thread = threading.Thread(
      target=self._work, args=(writer, run), name=f"tracker-{name}", daemon=True
    )
    self._thread.start()

  def start(self, step: int) -> None:
    self._calls.put(("start", (step,)))

  def add_entry(self, entry: dict[str, Any]) -> None:
    self._calls.put(("add_entry", (dict(entry),)))

  def predictions(self, step: int, set_name: str, shown: "Sequence[Shown]") -> None:
    self._calls.put(("predictions", (step, set_name, list(shown))))

  def save_results(self, results: dict[str, Any]) -> None:
    self._calls.put(("save_results", (dict(results),)))

  def fail(self, error: BaseException) -> None:
    self._calls.put(("fail", (error,)))

  def close(self) -> None:
    """Waits until the tracker has taken everything, but not for long."""
    if not self._thread.is_alive():
      return
    self._calls.put(("close", ()))
    self._thread.join(CLOSE_SECONDS)
    if self._thread.is_alive():
      self._remark = (
        f"{self._name} had not taken all metrics {CLOSE_SECONDS} s after the run's end, and was not waited for longer; "
        "trainer_state.json has all of them"
      )

  def remark(self) -> str | None:
    return self._remark

  def _work(self, writer: str, run: TrackedRun) -> None:
    """Opens the writer and passes it the calls; on the tracker's thread."""
    call = "open"
    try:
      module, _, name = writer.partition(":")
      opened: Writer = getattr(importlib.import_module(module), name)(run)
      while call != "close":
        call, arguments = self._calls.get()
        getattr(opened, call)(*arguments)
    except (
      Exception
    ) as error:  # Of any kind: libraries and networks fail in many ways, and the run has to go on.
      reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".removesuffix(": ")
      logging.warning(
        "%s failed (%s) and is off for the rest of this start; training goes on", self._name, reason
      )
      logging.debug("Where %s failed:", self._name, exc_info=error)
      self._remark = f"{self._name} failed ({reason}) and lacks metrics; trainer_state.json has all of them"
