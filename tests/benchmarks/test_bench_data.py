"""The measurement of the data room runs, on pixels that are the same for all."""

import json
import os
import pathlib
import sys

import pytest

from tests.support import forked

REPOSITORY = pathlib.Path(__file__).parents[2]


def run(*flags, tmp_path):
  result = tmp_path / "result.json"
  script = str(REPOSITORY / "benchmarks" / "bench_data.py")
  environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
  done = forked.run([script, f"--json={result}", *flags], environment=environment, folder=tmp_path)
  assert done.returncode == 0, done.stderr
  return done.stdout, json.loads(result.read_text())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_photographs(tmp_path):
  names = ["floor-1", "ours-1", "ours-all-processes"]
  text, result = run("--quick", f"--contenders={','.join(names)}", tmp_path=tmp_path)
  # The script compares them itself, with np.testing.assert_array_equal, before it measures.
  assert "the tiles of 6 photographs are the same to the pixel for all" in text
  assert list(result["turns"]) == names
  assert all(turn["images_per_second"] > 0 for turns in result["turns"].values() for turn in turns)
  assert list(result["ratios"]) == ["ours-1 / floor-1", "ours-all-processes / ours-1"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_lines(tmp_path):
  _, result = run("--lines=2000", tmp_path=tmp_path)
  assert result["lines"] == 2000 and result["second opening"]["seconds"] < 60
