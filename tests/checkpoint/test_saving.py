"""A checkpoint is complete or not there: under SIGKILL, and on a full disk."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from internvl_jax.outputs import newest_checkpoint
from tests.support.toy import REPOSITORY

SAVER = Path(__file__).parents[1] / "support" / "saver.py"


def start(folder, *arguments):
  command = [sys.executable, str(SAVER), str(folder), "8", *map(str, arguments)]
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(REPOSITORY)}
  return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_save_leaves_the_one_before(tmp_path, times):
  """Each start reads what the one before left, and compares all of it with what that step must hold."""
  random.seed(0)
  newest = unfinished = 0
  for _ in range(times):
    process = start(tmp_path)
    assert process.stdout.readline() == f"restored {newest}\n", process.communicate()
    while newest_checkpoint(str(tmp_path)) in (None, newest):
      assert process.poll() is None, process.communicate()
      time.sleep(0.005)
    time.sleep(random.uniform(0, 0.5))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    unfinished += any((tmp_path / "checkpoints").glob("*tmp*"))
    # What is chosen after the kill: a save that was under way may have been completed since the last look.
    assert newest_checkpoint(str(tmp_path)) > newest
    newest = newest_checkpoint(str(tmp_path))
  process = start(tmp_path)
  assert process.stdout.readline() == f"restored {newest}\n", process.communicate()
  process.kill()
  process.wait()
  # Kills did meet saves under way: of a few, chance may have missed them all.
  assert unfinished >= 5 or times < 20
  # What was half-written is gone, so that kills do not fill the disk.
  assert len(list((tmp_path / "checkpoints").glob("*tmp*"))) <= 1


def test_a_full_disk_is_one_line_and_costs_no_checkpoint(tmp_path):
  process = start(tmp_path, 3)
  _, stderr = process.communicate(timeout=120)
  assert process.returncode == 1
  # The file library's threads may complain about each other's end, in Python's own words.
  (error,) = [line for line in stderr.splitlines() if line.startswith("error:")]
  assert "orbax" not in stderr
  assert error.startswith(
    f"error: {tmp_path}/checkpoints: the checkpoint could not be written (file too large;"
  )
  assert "that of step 3 is complete and kept" in error
  kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal())
  assert kept == ["2", "3"]
