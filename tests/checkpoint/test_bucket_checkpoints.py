"""Checkpoints in buckets: complete or not there, checked by what the store says of its objects, copied to and fro."""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from internvl_jax import digests, lease
from internvl_jax.arguments import TrainingArguments
from internvl_jax.checkpoint.checkpointer import Checkpointer
from internvl_jax.errors import UserError
from internvl_jax.hf import saving
from internvl_jax.hf.files import INDEX
from internvl_jax.outputs import begin_run, check_output_dir, clear_output_dir
from internvl_jax.storage import paths
from internvl_jax.storage.paths import BucketPath
from tests.support.buckets import names_in, one_store
from tests.support.saver import state_of
from tests.support.toy import REPOSITORY

SAVER = Path(__file__).parents[1] / "support" / "saver.py"


def save(folder, *steps, keep=2):
  checkpointer = Checkpointer(folder, keep=keep)
  for step in steps:
    checkpointer.save(state_of(step, 1), loader={"next_step": step}, trainer={"log": step})
  checkpointer.wait()
  checkpointer.close()


def restored(folder, *then) -> int:
  """The step that a run goes on from, after a look at its numbers; the steps that it saves `then`."""
  checkpointer = Checkpointer(folder, keep=2)
  state, loader, trainer = checkpointer.restore(state_of(0, 1))
  step = int(state.step)
  jax.tree.map(np.testing.assert_array_equal, state, state_of(step, 1))
  assert loader == {"next_step": step} and trainer == {"log": step}
  for later in then:
    checkpointer.save(state_of(later, 1), loader={"next_step": later}, trainer={"log": later})
  checkpointer.close()
  return step


def test_complete_or_not_there(bucket):
  save(f"{bucket}/run", 1, 2, 3)
  assert {name.split("/")[1] for name in names_in(f"{bucket}/run")} == {"2", "3"}
  newest = BucketPath(f"{bucket}/run/checkpoints/3")
  # As if killed between the digests and the last word: all is there.
  (newest / "commit_success.txt").unlink()
  assert restored(f"{bucket}/run") == 3
  # A copy that is not whole stays, and is not taken.
  state, metadata = newest / "state" / "_METADATA", (newest / "state" / "_METADATA").read_bytes()
  for path in (newest / "commit_success.txt", state):
    path.unlink()
  assert restored(f"{bucket}/run") == 2 and newest.exists()
  state.write_bytes(metadata)
  assert restored(f"{bucket}/run") == 3
  # Killed before its digests: it is taken away.
  for name in ("commit_success.txt", digests.FILE):
    (newest / name).unlink()
  assert restored(f"{bucket}/run") == 2
  assert not newest.exists()


def halved(path: BucketPath) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: BucketPath) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 8
  path.write_bytes(bytes(content))


PARTS = ("state/ocdbt", "loader/metadata", "trainer/metadata", "state/_METADATA", digests.FILE)


def test_damage_is_named_and_the_one_before_is_taken(bucket, caplog):
  save(f"{bucket}/run", 1, 2)
  folder = BucketPath(f"{bucket}/run/checkpoints/2")
  found = paths.objects(folder)
  assert digests.find_damage(folder) == ""
  for part in PARTS:
    name = max((name for name in found if name.startswith(part)), key=lambda name: found[name].st_size)
    content = (folder / name).read_bytes()
    for damage in (halved, flipped, BucketPath.unlink):
      damage(folder / name)
      expected = digests.UNKNOWN if (part, damage) == (digests.FILE, BucketPath.unlink) else f"{name}: "
      assert digests.find_damage(folder).startswith(expected), (name, damage)
      (folder / name).write_bytes(content)
  assert digests.find_damage(folder) == ""
  flipped(folder / name)
  with caplog.at_level("WARNING"):
    assert restored(f"{bucket}/run") == 1
  assert f"{folder}: damaged ({name}: " in caplog.text
  # It is left where it is, until the run gets there again.
  assert set(names_in(str(folder))) == set(found)
  assert restored(f"{bucket}/run", 2) == 1
  assert restored(f"{bucket}/run") == 2


@one_store
def test_copies_between_a_disk_and_a_bucket(bucket, tmp_path):
  save(tmp_path / "run", 1)
  for path in (tmp_path / "run").rglob("*"):
    if path.is_file():
      paths.put(path, BucketPath(f"{bucket}/run") / path.relative_to(tmp_path / "run").as_posix())
  assert restored(f"{bucket}/run") == 1
  save(f"{bucket}/run", 2)
  shutil.rmtree(tmp_path / "run")
  for name in paths.objects(BucketPath(f"{bucket}/run")):
    (target := tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes((BucketPath(f"{bucket}/run") / name).read_bytes())
  assert restored(tmp_path / "run") == 2
  # Of a copy, too, what is cut off is seen.
  largest = max((tmp_path / "run/checkpoints/2").rglob("*"), key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:-1])
  assert restored(tmp_path / "run") == 1


@one_store
def test_a_run_begins_goes_on_and_begins_anew(bucket):
  training = TrainingArguments(output_dir=f"{bucket}/run")
  anew = TrainingArguments(output_dir=f"{bucket}/run", overwrite_output_dir=True)
  folder = BucketPath(f"{bucket}/run")
  assert check_output_dir(training) == "new"
  begin_run(folder, "new", {"a": 1})
  assert check_output_dir(training) == "overwrite"  # Nothing but its beginning.
  save(str(folder), 1)
  (folder / "notes.txt").write_text("mine")
  assert check_output_dir(training) == "resume" and check_output_dir(anew) == "overwrite"
  assert clear_output_dir(str(folder)) == ["checkpoints", "train_config.json"]
  assert names_in(str(folder)) == ["notes.txt"]
  with pytest.raises(UserError, match="is not empty and holds no complete checkpoint"):
    check_output_dir(training)


@one_store
def test_one_run_at_a_time(bucket, monkeypatch):
  folder, name = BucketPath(f"{bucket}/run"), "training.output_dir='it'"
  watched = []
  with lease.held(lease.Bucket(folder), name, wait=watched.append):
    monkeypatch.setattr(lease, "_space", lambda: "of another container")
    beat = lease.Bucket(folder).read()

    def meanwhile(seconds):
      watched.append(seconds)
      lease.Bucket(folder).write(beat._replace(beat=9))

    with (
      pytest.raises(UserError, match="it' is in use by process"),
      lease.held(lease.Bucket(folder), name, wait=meanwhile),
    ):
      pytest.fail("it is in use")
  assert watched == [lease.BEAT_SECONDS, lease.WATCH_SECONDS]
  assert names_in(str(folder)) == []


@one_store
def test_a_lease_of_a_process_that_was_killed_is_not_watched(bucket):
  folder = BucketPath(f"{bucket}/run")
  ended = subprocess.Popen([sys.executable, "-c", ""])
  ended.wait()
  place = lease.Bucket(folder)
  with lease.held(place, "it", wait=lambda seconds: None):
    dead = place.read()._replace(process=ended.pid)
  place.write(dead)
  waited = []
  with lease.held(lease.Bucket(folder), "it", wait=waited.append):
    pass
  assert waited == [lease.BEAT_SECONDS]


@one_store
def test_a_model_is_sent_file_by_file(bucket, tmp_path):
  tensors = {f"t{i}": np.full((4, 5), i, np.float32) for i in range(7)}
  count = saving.count_files((tensor.nbytes for tensor in tensors.values()), 200)
  (folder := BucketPath(f"{bucket}/model")).mkdir()
  (folder / "model-00001-of-00002.safetensors").write_text("an older one")
  for target in (tmp_path / "model", folder):
    saving.save(target, tensors.items(), files_in_all=count, shard_bytes=200)
  local = sorted(path.name for path in (tmp_path / "model").iterdir())
  assert names_in(str(folder)) == local and len(local) == count + 1 == 5
  for name in local:
    assert (folder / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
  assert INDEX in local


@pytest.mark.slow
def test_twenty_kills(bucket):
  """The saver compares what it restores, bit by bit, with what it has saved."""
  chosen = random.Random(0)
  steps = []
  for _ in range(20):
    process = subprocess.Popen(
      [sys.executable, str(SAVER), f"{bucket}/run", "1"],
      stdout=subprocess.PIPE,
      text=True,
      env=_environment(),
    )
    line = process.stdout.readline()
    assert line.startswith("restored "), line
    steps.append(int(line.split()[1]))
    time.sleep(chosen.uniform(0.3, 5.0))
    process.kill()
    process.wait()
  assert steps == sorted(steps) and steps[-1] >= 5, steps


def _environment():
  import os

  return os.environ | {"PYTHONPATH": str(REPOSITORY)}
