"""Reads what a run has written to its output directory; what is not there is empty."""

import bisect
import contextlib
import dataclasses
import json
import time
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from internvl_jax.errors import UserError
from internvl_jax.metrics.writers import scalars
from internvl_jax.outputs import CONFIG_FILE, EVALUATIONS, FACTS_FILE, LEASE_FILE, LOG_FOLDER
from internvl_jax.storage.paths import AnyPath

_STALE_SECONDS = 60
"""Many heartbeats of a lease, on a disk whose clock is nearly right."""


@dataclasses.dataclass
class Series:
  """Values of a metric.

  Attributes:
    steps: ascending.
    values: one for each.
  """

  steps: array = dataclasses.field(default_factory=lambda: array("q"))
  values: array = dataclasses.field(default_factory=lambda: array("d"))

  def add(self, step: int, value: float) -> None:
    """Adds a value; what was there of this step and later ones is replaced."""
    if self.steps and self.steps[-1] >= step:
      self.drop_after(step - 1)
    self.steps.append(step)
    self.values.append(value)

  def drop_after(self, step: int) -> None:
    """Forgets what came later."""
    keep = bisect.bisect_right(self.steps, step)
    del self.steps[keep:], self.values[keep:]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFiles:
  """A run's files, as JSON values.

  Attributes:
    folder: the run's output directory.
    config: train_config.json.
    state: trainer_state.json without the log.
    results: train_results.json.
    scores: eval_results.json.
    facts: run_facts.json.
    series: the log, by the names that trackers have ("train/loss").
    is_running: a run holds the directory.
    shown: {set: {step: lines}} of the samples shown at evaluations.
  """

  folder: AnyPath
  config: dict[str, Any]
  state: dict[str, Any]
  results: dict[str, Any]
  scores: dict[str, Any]
  facts: dict[str, Any]
  series: Mapping[str, Series]
  is_running: bool
  shown: dict[str, dict[int, list[dict[str, Any]]]]

  def picture(self, name: str) -> bytes | None:
    """The content of a picture of `shown`; None where it is not there."""
    try:
      return (self.folder / EVALUATIONS / name).read_bytes()
    except FileNotFoundError:
      return None


def read_run(folder: AnyPath) -> RunFiles:
  """Reads all of it.

  Raises:
    UserError: there is no run.
  """
  if not (folder / CONFIG_FILE).exists():
    raise UserError(f"{folder} is no output directory of a run: there is no {CONFIG_FILE}")
  state = _json(folder / "trainer_state.json")
  history = state.pop("log_history", [])
  return RunFiles(
    folder=folder,
    config=_json(folder / CONFIG_FILE),
    state=state,
    results=_json(folder / "train_results.json"),
    scores=_json(folder / "eval_results.json"),
    facts=_json(folder / FACTS_FILE),
    series=read_series(folder / LOG_FOLDER, history),
    is_running=_is_held(folder / LEASE_FILE),
    shown=_read_shown(folder / EVALUATIONS),
  )


def _is_held(path: AnyPath) -> bool:
  """Whether a run renews its lease; one that a crash has left is old. Of a bucket, only that there is one is known."""
  if not isinstance(path, Path):
    return path.exists()
  try:
    return time.time() - path.stat().st_mtime < _STALE_SECONDS
  except FileNotFoundError:
    return False


def read_series(folder: AnyPath, history: list[dict[str, Any]]) -> dict[str, Series]:
  """The log as series, from the files of each start, and from the history for what those do not have.

  Args:
    folder: of the starts' files; need not be there.
    history: trainer_state.json's.
  """
  found: dict[str, Series] = {}
  files = sorted(folder.glob("*.jsonl"), key=lambda path: path.name) if folder.exists() else []
  entries = (entry for path in files for entry in _lines(path))
  first = next(entries, None)
  # A run that began with a version without these files.
  until = None if first is None else first.get("start", 0)
  for entry in history:
    if until is None or entry["step"] <= until:
      _add(found, entry)
  for entry in entries:
    if "start" in entry:
      for series in found.values():
        series.drop_after(entry["start"])
    else:
      _add(found, entry)
  return found


def _add(found: dict[str, Series], entry: dict[str, Any]) -> None:
  step = entry["step"]
  for name, value in scalars(entry).items():
    found.setdefault(name, Series()).add(step, value)


def _lines(path: AnyPath) -> Iterator[dict[str, Any]]:
  """The lines of a file of JSON, without one that is only half written."""
  with contextlib.ExitStack() as stack:
    on_disk = isinstance(path, Path)  # Line by line: of a million entries, a file has 400 MB.
    lines = stack.enter_context(path.open(encoding="utf-8")) if on_disk else path.read_text().split("\n")
    for line in lines:
      with contextlib.suppress(json.JSONDecodeError):
        yield json.loads(line)


def _read_shown(folder: AnyPath) -> dict[str, dict[int, list[dict[str, Any]]]]:
  found: dict[str, dict[int, list[dict[str, Any]]]] = {}
  steps = [path for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
  for path in sorted(steps, key=lambda path: int(path.name)):
    for file in sorted(path.glob("*.jsonl"), key=lambda path: path.name):
      found.setdefault(file.name.removesuffix(".jsonl"), {})[int(path.name)] = list(_lines(file))
  return found


def _json(path: AnyPath) -> dict[str, Any]:
  """The content of a file; empty where it is not there."""
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return {}
