"""Samples shown at every evaluation, as files; `eval.shown` has their form."""

from collections.abc import Sequence

from internvl_jax.eval.shown import Shown, ShownFiles
from internvl_jax.metrics.writers import Writer
from internvl_jax.storage.paths import AnyPath


class ShownFilesWriter(Writer):
  """Writes shown samples to output_dir/evaluations."""

  def __init__(self, output_dir: AnyPath):
    """Sets it up; nothing is made before there is something to write."""
    self._files = ShownFiles(output_dir)

  def predictions(self, step: int, set_name: str, shown: Sequence[Shown]) -> None:
    """Writes <step>/<set>.jsonl and its pictures."""
    self._files.write(step, set_name, shown)
