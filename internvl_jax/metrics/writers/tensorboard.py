"""TensorBoard's event files."""

import contextlib
from typing import Any

from tensorboardX import SummaryWriter

from internvl_jax.metrics.writers import TrackedRun, Writer, scalars
from internvl_jax.storage.paths import Mirror, path_of


class TensorBoard(Writer):
  """Scalars for TensorBoard; files for a bucket are also kept on this machine, and sent again when they have grown."""

  def __init__(self, run: TrackedRun):
    """Opens an event file, a new one for each start of a run, in `training.logging_dir` or output_dir/tensorboard."""
    named = run.training.logging_dir
    folder = path_of(named) if named else run.output_dir / "tensorboard"
    self._stack = contextlib.ExitStack()
    self._mirror = self._stack.enter_context(Mirror.of(folder))
    self._writer = SummaryWriter(str(self._mirror.folder))

  def add_entry(self, entry: dict[str, Any]) -> None:
    """Writes the values as scalars train/... or eval/... ."""
    for name, value in scalars(entry).items():
      self._writer.add_scalar(name, value, entry["step"])
    if self._mirror.is_due():
      self._writer.flush()
      self._mirror.send()

  def close(self) -> None:
    """Writes and sends what is left."""
    self._writer.close()
    self._stack.close()
