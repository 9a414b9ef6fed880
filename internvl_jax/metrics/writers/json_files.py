"""trainer_state.json and train_results.json, in Hugging Face's schema."""

from typing import Any

from internvl_jax.metrics.writers import Writer
from internvl_jax.outputs import write_json
from internvl_jax.storage.paths import AnyPath


class JsonFiles(Writer):
  """The log history and the results of a run, as Hugging Face's Trainer writes them."""

  def __init__(self, output_dir: AnyPath):
    """Sets it up; the files are in `output_dir`."""
    self._state, self._results = output_dir / "trainer_state.json", output_dir / "train_results.json"

  def save_state(self, state: dict[str, Any]) -> None:
    """Writes trainer_state.json."""
    write_json(self._state, state)

  def save_results(self, results: dict[str, Any]) -> None:
    """Writes train_results.json; one that a start before this one has written stays where this one took no step."""
    if "train_runtime" in results or not self._results.exists():
      write_json(self._results, results)
