"""The measurement of balance runs: a table for two mixtures, and the planner's time."""

import json
import os
import pathlib
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).parents[2]


def run(*flags, tmp_path):
  result = tmp_path / "result.json"
  command = [sys.executable, REPOSITORY / "benchmarks" / "bench_balance.py", f"--json={result}", *flags]
  environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  return done.stdout, json.loads(result.read_text())


def test_bench_balance(tmp_path):
  text, result = run("--steps=64", "--sizes", "2.5-1b", "--shards", "8", tmp_path=tmp_path)
  found = result["balance"]
  assert [one["mixture"] for one in found] == ["recorded", "heavy"] and "as they come" in text
  for one in found:
    assert one["before"] > 1.05 and one["after"] <= 1.02 and one["fill"] > 0.995
    assert one["padded_after"] < one["padded_before"] and max(one["speeds"]) < one["before"]
