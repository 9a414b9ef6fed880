"""TensorBoard's event files."""

import contextlib
from typing import Any

from tensorboardX import SummaryWriter

from internvl_jax.arguments import TrainingArguments
from internvl_jax.metrics.writers import Writer
from internvl_jax.storage.paths import AnyPath, Mirror, path_of


class TensorBoard(Writer):
  """Scalars for TensorBoard; files for a bucket are also kept on this machine, and sent again when they have grown."""

  def __init__(self, training: TrainingArguments, output_dir: AnyPath):
    """Opens an event file, a new one for each start of a run, in `training.logging_dir` or output_dir/tensorboard."""
    folder = path_of(training.logging_dir) if training.logging_dir else output_dir / "tensorboard"
    self._stack = contextlib.ExitStack()
    self._mirror = self._stack.enter_context(Mirror.of(folder))
    self._writer = SummaryWriter(str(self._mirror.folder))

  def add_entry(self, entry: dict[str, Any]) -> None:
    """Writes the values as scalars train/... or eval/... ."""
    prefix = "eval" if any(key.startswith("eval_") for key in entry) else "train"
    for key, value in entry.items():
      if key != "step":
        self._writer.add_scalar(f"{prefix}/{key.removeprefix('eval_')}", value, entry["step"])
    if self._mirror.is_due():
      self._writer.flush()
      self._mirror.send()

  def close(self) -> None:
    """Writes and sends what is left."""
    self._writer.close()
    self._stack.close()
