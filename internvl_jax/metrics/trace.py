"""An XProf trace of some steps."""

import contextlib
from collections.abc import Sequence

import jax
from absl import logging

from internvl_jax.storage.paths import AnyPath, Mirror


class Trace:
  """Records an XProf trace of some steps, for TensorBoard's profile plugin; a callback of the trainer."""

  def __init__(self, folder: AnyPath, steps: Sequence[int]):
    """Sets it up.

    Args:
      folder: where it is written.
      steps: the first and the last step, counted from 1; empty for no trace.
    """
    self._folder = folder
    self._first, self._last = steps or (0, 0)
    self._running = False
    self._stack = contextlib.ExitStack()

  def before(self, step: int) -> None:
    """The step is about to be handed to the devices."""
    if self._first <= step <= self._last and not self._running:
      jax.profiler.start_trace(str(self._stack.enter_context(Mirror.of(self._folder)).folder))
      self._running = True

  def after(self, step: int) -> None:
    """The devices have finished the step."""
    if self._running and step >= self._last:
      self.stop()

  def stop(self) -> None:
    """Writes the trace, if one is being recorded."""
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
      self._stack.close()
      logging.info("Wrote a trace to %s", self._folder)
