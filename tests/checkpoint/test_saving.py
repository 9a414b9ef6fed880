"""A checkpoint is complete or not there: under SIGKILL, and on a full disk."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from internvl_jax.outputs import newest_checkpoint
from tests.support import forked

SAVER = Path(__file__).parents[1] / "support" / "saver.py"


class Saver:
  """A process that saves until it is killed."""

  def __init__(self, folder, *arguments):
    self._log = folder / f"saver-{time.time_ns()}.txt"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(forked.REPOSITORY)}
    reads, writes = os.pipe()
    with self._log.open("w") as stderr, os.fdopen(writes, "w") as stdout:
      self.process = forked.start(
        [str(SAVER), str(folder), "8", *map(str, arguments)],
        environment=environment,
        stdout=stdout.fileno(),
        stderr=stderr.fileno(),
      )
    with os.fdopen(reads) as lines:
      self.first_line = lines.readline()

  def complaints(self):
    return self._log.read_text()


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_save_leaves_the_one_before(tmp_path, times):
  """Each start reads what the one before left, and compares all of it with what that step must hold."""
  random.seed(0)
  newest = unfinished = 0
  for _ in range(times):
    saver = Saver(tmp_path)
    assert saver.first_line == f"restored {newest}\n", saver.complaints()
    while newest_checkpoint(str(tmp_path)) in (None, newest):
      assert saver.process.poll() is None, saver.complaints()
      time.sleep(0.005)
    time.sleep(random.uniform(0, 0.5))
    saver.process.kill()
    assert saver.process.wait() == -signal.SIGKILL
    unfinished += any((tmp_path / "checkpoints").glob("*tmp*"))
    # What is chosen after the kill: a save that was under way may have been completed since the last look.
    assert newest_checkpoint(str(tmp_path)) > newest
    newest = newest_checkpoint(str(tmp_path))
  saver = Saver(tmp_path)
  assert saver.first_line == f"restored {newest}\n", saver.complaints()
  saver.process.kill()
  saver.process.wait()
  # Kills did meet saves under way: of a few, chance may have missed them all.
  assert unfinished >= 5 or times < 20
  # What was half-written is gone, so that kills do not fill the disk.
  assert len(list((tmp_path / "checkpoints").glob("*tmp*"))) <= 1


def test_a_full_disk_is_one_line_and_costs_no_checkpoint(tmp_path):
  saver = Saver(tmp_path, 3)
  assert saver.process.wait(120) == 1
  stderr = saver.complaints()
  # The file library's threads may complain about each other's end, in Python's own words.
  (error,) = [line for line in stderr.splitlines() if line.startswith("error:")]
  assert "orbax" not in stderr
  assert error.startswith(
    f"error: {tmp_path}/checkpoints: the checkpoint could not be written (file too large;"
  )
  assert "that of step 3 is complete and kept" in error
  kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal())
  assert kept == ["2", "3"]
