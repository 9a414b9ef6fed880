"""trainer_state.json and train_results.json, in Hugging Face's schema, and the log's entries as they come."""

import contextlib
import datetime
import json
from typing import Any, TextIO

from internvl_jax.metrics.writers import Writer
from internvl_jax.outputs import LOG_FOLDER, write_json
from internvl_jax.storage.paths import AnyPath, Mirror


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


class LogFiles(Writer):
  """A line of JSON for each entry, in a file for each start: log/<time>.jsonl, whose first line is {"start": step}.

  trainer_state.json is complete, but as old as the last save; this is there at once. A start that goes on from an earlier
  step replaces what was logged after it.
  """

  def __init__(self, output_dir: AnyPath):
    """Sets it up; `start` opens the file."""
    self._folder = output_dir / LOG_FOLDER
    self._opened = contextlib.ExitStack()
    self._mirror: Mirror | None = None
    self._file: TextIO | None = None

  def start(self, step: int) -> None:
    """Opens this start's file."""
    self._folder.mkdir(parents=True, exist_ok=True)
    self._mirror = self._opened.enter_context(Mirror.of(self._folder))
    now = datetime.datetime.now(datetime.UTC)
    path = self._mirror.folder / f"{now:%Y%m%dT%H%M%S%f}.jsonl"
    self._file = self._opened.enter_context(path.open("w", encoding="utf-8"))
    self.add_entry({"start": step})

  def add_entry(self, entry: dict[str, Any]) -> None:
    """Writes a line; readers see it at once."""
    if self._file is None or self._mirror is None:
      return
    self._file.write(json.dumps(entry) + "\n")
    self._file.flush()
    if self._mirror.is_due():
      self._mirror.send()

  def close(self) -> None:
    """Sends what is left."""
    self._opened.close()
    self._file = None
