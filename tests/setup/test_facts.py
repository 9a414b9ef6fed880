"""What is recorded of a run beside its metrics."""

import json
import sys

import numpy as np
import pytest

from internvl_jax.data.load.inspection import DatasetReport
from internvl_jax.data.load.size_counts import _counts
from internvl_jax.output_dir import output_folder
from internvl_jax.setup.facts import RunFacts
from internvl_jax.stopwatch import Stopwatch
from tests.support.toy import RECIPE, curve_config


class Loader:
  """A loader whose sizes are counted, or cannot be."""

  def __init__(self, found):
    self.found = found

  def size_counts(self):
    if isinstance(self.found, Exception):
      raise self.found
    return self.found


def started(config, step, loader, recipe=None):
  facts, stopwatch = RunFacts(output_folder(config), config, recipe), Stopwatch()
  with stopwatch.phase("weights"):
    facts.begin(step)
  stopwatch.stop(stopwatch._began + 100)
  facts.after_first_step(stopwatch, loader)
  return json.loads((output_folder(config) / "run_facts.json").read_text())


def test_each_start_is_recorded(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "internvl_jax.train", "--config", "a b.py"])
  config = curve_config(tmp_path)
  assert started(config, 0, Loader([{"name": "one"}]))["data"] == [{"name": "one"}]
  found = started(config, 7, Loader([]))
  first, second = found["starts"]
  assert (first["step"], second["step"], found["data"]) == (0, 7, [])
  assert first["seconds_to_first_step"] == pytest.approx(100) and "weights" in dict(first["phases"])
  assert (
    first["platform"] == "cpu"
    and first["versions"]["jax"]
    and first["command"].endswith("-m internvl_jax.train --config 'a b.py'")
  )
  assert first["recipe"] is None and ["training.logging_steps", 500.0, 1] in first["changed"]


def test_settings_are_compared_with_the_recipe(tmp_path):
  recipe = tmp_path / "mine.py"
  recipe.write_text(RECIPE)
  named = f"{recipe}:{tmp_path}"
  config = curve_config(tmp_path)
  config.training.learning_rate = 0.5
  config.data.meta_path = "s3://KEY:SECRET@bucket/meta.json"
  changed = {path: here for path, _, here in started(config, 0, Loader([]), named)["starts"][0]["changed"]}
  assert (
    set(changed) == {"training.learning_rate", "data.meta_path"} and "SECRET" not in changed["data.meta_path"]
  )


def test_data_that_cannot_be_counted_end_no_run(tmp_path, caplog):
  found = started(curve_config(tmp_path), 0, Loader(ValueError("no index")))
  assert found["data"] == [] and found["starts"][0]["phases"]


def test_counts_of_sizes():
  report = DatasetReport(
    *("one", 6, 5, 1, 1, 0, 0, 0), np.array([1, 100, 101, 1000, 1000]), np.array([0, 1, 1, 13, 13]), ["why"]
  )
  found = _counts(report)
  assert found["tokens"] == [[1, 1], [91, 2], [862, 2]] and found["tiles"] == [[0, 1], [1, 2], [13, 2]]
  assert (found["lines"], found["unreadable"], found["examples"]) == (6, 1, ["why"])
