"""What is worth knowing of a run beside its metrics: where and how it was started, and what its data are like."""

import datetime
import json
import os
import shlex
import sys
from typing import Any

import jax
from absl import logging

import internvl_jax
from internvl_jax import consistency
from internvl_jax.config import FIELDS, TrainConfig, to_json
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.errors import redacted, redacted_json
from internvl_jax.outputs import FACTS_FILE, write_json
from internvl_jax.parallel import distributed
from internvl_jax.recipe_files import load_recipe
from internvl_jax.stopwatch import Row, Stopwatch
from internvl_jax.storage.paths import AnyPath


class RunFacts:
  """FACTS_FILE of a run: `starts`, one for each time that the command was started, and `data`, of each dataset.

  The first process writes it; for others, nothing happens.
  """

  def __init__(self, folder: AnyPath, config: TrainConfig, recipe: str | None):
    """Writes nothing yet.

    Args:
      folder: the run's output directory.
      config: all settings.
      recipe: what --config named; None where there was no recipe.
    """
    self._path, self._config, self._recipe = folder / FACTS_FILE, config, recipe
    self._facts: dict[str, Any] = {"starts": [], "data": []}

  def begin(self, step: int) -> None:
    """Adds this start, after `step` steps."""
    if not distributed.is_first():
      return
    if self._path.exists():
      self._facts = json.loads(self._path.read_text(encoding="utf-8"))
    self._facts["starts"].append({**_here(), "step": step, **_changes(self._config, self._recipe)})
    write_json(self._path, self._facts)

  def after_first_step(self, stopwatch: Stopwatch, loader: TrainLoader) -> None:
    """Adds how long the start took, and what the data are like; the devices are busy meanwhile."""
    if not distributed.is_first():
      return
    self._facts["starts"][-1] |= {
      "seconds_to_first_step": stopwatch.seconds,
      "phases": _seconds(stopwatch.rows()),
      "beside": _seconds(stopwatch.beside()),
    }
    try:
      self._facts["data"] = redacted_json(loader.size_counts())
    except Exception as error:  # Whatever it is, the run is more than its statistics.
      logging.warning("The data's sizes could not be counted (%s: %s)", type(error).__name__, error)
    write_json(self._path, self._facts)


def _seconds(rows: list[Row]) -> list[tuple[str, float]]:
  return [(row.name, row.seconds) for row in rows]


def _here() -> dict[str, Any]:
  """Where this process runs, and with what."""
  versions = {
    key.removeprefix("the version of "): value
    for key, value in consistency.programs().items()
    if value is not None and key.startswith("the version of ")
  }
  devices = jax.devices()
  return {
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "host": distributed.host_name(),
    "command": redacted(shlex.join([os.path.basename(sys.executable), *sys.orig_argv[1:]])),
    "processes": jax.process_count(),
    "devices": len(devices),
    "platform": devices[0].platform,
    "device_kind": devices[0].device_kind,
    "versions": {"internvl_jax": internvl_jax.__version__, **versions},
  }


def _changes(config: TrainConfig, recipe: str | None) -> dict[str, Any]:
  """The recipe, and the settings that differ from it, or from the defaults where there is none: [path, there, here]."""
  ours = to_json(config)
  theirs = to_json(load_recipe(recipe) if recipe else TrainConfig())
  pairs = ((path, *path.split(".")) for path in FIELDS)
  changed = [
    [path, theirs[leaf][name], ours[leaf][name]]
    for path, leaf, name in pairs
    if theirs[leaf][name] != ours[leaf][name]
  ]
  return {"recipe": recipe, "changed": changed}
