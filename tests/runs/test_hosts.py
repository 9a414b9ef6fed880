"""Runs of several processes: the same numbers as one, and an end that loses nothing, whoever dies when.

All runs train the same model on the same four devices, which belong to one, two or four processes.
"""

import shutil
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from internvl_jax.outputs import checkpoint_steps, newest_checkpoint
from tests.support.hosts import Job, assert_same_curve, history, make_world

SAVING = ("training.save_strategy=steps", "training.save_steps=4")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def straight(world):
  """The run that nothing happens to."""
  job = Job(world, out="straight")
  assert job.wait() == [0], job.log()
  return job.out


def test_two_processes_measure_half_stop_together_and_go_on(world, straight, monkeypatch):
  """They go on without the checkpoint of their stop, of which what one has written is damaged."""
  (headers := world / "headers").mkdir()
  monkeypatch.setenv("HEADERS", str(headers))
  # So the next batch is ready, and not trained, where it stops.
  long = {"trainer.LONG_STEP_SECONDS": 0.1}
  caches = {i: (f"loader.cache_dir={world}/cache{i}",) for i in range(2)}
  job = Job(world, *SAVING, out="two", processes=2, step_seconds=0.3, only=caches, constants=long)
  job.wait_for("step 5/12")
  # Of 30 lines 22 have an image, which lie in eight blocks.
  counts = [len((headers / str(i)).read_text()) for i in range(2)]
  assert sum(counts) == 22 and min(counts) >= 10, counts
  indexes = [next((world / f"cache{i}").glob("*/sizes.npy")).parent for i in range(2)]
  for name in ("sizes.npy", "blocks.npy"):
    assert (indexes[0] / name).read_bytes() == (indexes[1] / name).read_bytes(), name
  monkeypatch.delenv("HEADERS")
  start = time.monotonic()
  # One is told; both stop.
  job.processes[1].send_signal(signal.SIGTERM)
  assert job.wait(60) == [75, 75], job.log()
  assert time.monotonic() - start < 60
  taken = newest_checkpoint(str(job.out))
  assert taken is not None and 5 < taken < 12
  assert f"the same command goes on from step {taken}" in job.log()
  assert [entry["step"] for entry in history(job.out)] == list(range(1, taken + 1))
  assert not (job.out / "model.safetensors").exists()

  assert go_on_without(job, "ocdbt.process_1", processes=2) == (taken, 4)
  assert_same_curve(history(job.out), history(straight), atol=1e-5)
  assert_same_model(job.out, straight)


@pytest.mark.slow
def test_the_first_of_two_processes_dies_and_one_goes_on(world, straight):
  """The one that the others met at, and that writes."""
  job = Job(world, *SAVING[:1], "training.save_steps=2", out="two_killed", processes=2, step_seconds=0.3)
  assert_dies(job, 0)
  alone = Job(world, *SAVING, out="two_killed")
  assert alone.wait() == [0], alone.log()
  assert "Resuming from the checkpoint of step" in alone.log()
  assert_same_curve(history(alone.out), history(straight), atol=1e-5)


def assert_dies(job, one):
  """Kills a process of the job once there are two checkpoints; the others end in time, in words."""
  job.wait_for("step 4/12")
  while len(checkpoint_steps(str(job.out))) < 2:
    time.sleep(0.02)
  start = time.monotonic()
  job.processes[one].kill()
  codes = job.wait(60)
  assert time.monotonic() - start < 60
  assert codes.pop(one) == -signal.SIGKILL and 0 not in codes
  for i in set(range(len(job.processes))) - {one}:
    assert "ends; the others follow" in job.log(i) or "another task died" in job.log(i), job.log(i)


def go_on_without(job, folder, processes):
  """The run goes on after one number of the newest checkpoint was changed, in what one process wrote.

  Each process wrote numbers of its own; whichever finds one changed, all go on from the same step.

  Returns:
    The step of that checkpoint, and that of the one before.
  """
  newest, before, *_ = checkpoint_steps(str(job.out))
  written = job.out / "checkpoints" / str(newest) / "state" / folder / "d"
  largest = max(written.iterdir(), key=lambda path: path.stat().st_size)
  damaged = bytearray(largest.read_bytes())
  damaged[-9] ^= 4
  largest.write_bytes(damaged)
  again = Job(job.world, *SAVING, out=job.out.name, processes=processes)
  assert again.wait() == [0] * processes, again.log()
  assert f"checkpoints/{newest}: damaged (state/{folder}/d/{largest.name}: not the bytes" in again.log()
  assert f"Resuming from the checkpoint of step {before}" in again.log() and "damaged" not in again.log(1)
  return newest, before


def assert_same_model(out, straight):
  """What the first process has written holds the shards of all."""
  ours, theirs = load_file(out / "model.safetensors"), load_file(straight / "model.safetensors")
  assert ours.keys() == theirs.keys()
  for name, value in theirs.items():
    np.testing.assert_allclose(ours[name], value, atol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["Data:", "Compiling the step"])
def test_one_that_is_stopped_before_the_first_step_stops_all(world, text):
  job = Job(world, *SAVING, out="early", processes=2)
  job.wait_for(text)
  for process in job.processes:
    process.send_signal(signal.SIGINT)  # As a terminal does.
  assert job.wait(60) == [75, 75], job.log() + job.log(1)
  for i in (0, 1):
    assert job.log(i).splitlines()[-1].endswith("W Stopped; the same command goes on"), job.log(i)
  job = Job(world, *SAVING, out="early", processes=2)
  job.wait_for(text)
  job.processes[1].send_signal(signal.SIGTERM)
  assert job.wait(60) == [75, 75], job.log() + job.log(1)


@pytest.mark.slow
def test_processes_that_share_rows(world):
  """Tokens, heads and tiles over the four devices of two processes, which feed the same rows."""
  mesh = ("mesh.data=1", "mesh.fsdp=1", "mesh.sequence=2", "mesh.tensor=2")
  batch = ("training.max_steps=6", "training.per_device_train_batch_size=4", "loader.tile_buckets=(4,)")
  job = Job(world, *mesh, *batch, out="shared", processes=2, devices=4)
  assert job.wait() == [0, 0], job.log() + job.log(1)
  assert "tokens and 4 tiles a shard" in job.log()
  alone = Job(world, *mesh, *batch, out="shared_alone", devices=4)
  assert alone.wait() == [0], alone.log()
  assert_same_curve(history(job.out), history(alone.out), atol=1e-5)


@pytest.mark.slow
def test_a_supervised_run_that_is_told_to_stop_asks_to_be_started_again(world):
  short = (*SAVING, "training.max_steps=10")
  job = Job(world, *short, out="supervised", step_seconds=0.5, launcher="supervised.sh")
  job.wait_for("step 3/10")
  job.processes[0].send_signal(signal.SIGTERM)
  assert job.wait(60) == [75], job.log()
  again = Job(world, *short, out="supervised", launcher="supervised.sh")
  assert again.wait() == [0], again.log()
  assert "Resuming from the checkpoint of step" in again.log() and (again.out / "config.json").is_file()


@pytest.mark.slow
def test_processes_started_on_one_machine(world, straight, monkeypatch):
  monkeypatch.setenv("LOG_DIR", str(world / "launch_logs"))
  job = Job(world, *SAVING, out="local", launcher="local.sh", arguments=("2",), devices=2)
  assert job.wait() == [0], job.log()
  assert_same_curve(history(job.out), history(straight), atol=1e-5)
  assert (world / "launch_logs/process1.log").is_file()


@pytest.mark.slow
def test_one_of_four_processes_dies_and_one_or_two_go_on(world, straight):
  job = Job(world, SAVING[0], "training.save_steps=2", out="four", processes=4, step_seconds=0.3)
  assert_dies(job, 2)

  shutil.copytree(job.out, job.out.with_name("four_then_one"))
  alone = Job(world, *SAVING, out="four_then_one")
  assert alone.wait() == [0], alone.log()
  assert "Resuming from the checkpoint of step" in alone.log()
  assert_same_curve(history(alone.out), history(straight), atol=1e-5)

  go_on_without(job, "ocdbt.process_3", processes=2)
  assert_same_curve(history(job.out), history(straight), atol=1e-5)
  assert_same_model(job.out, straight)


def test_ctrl_c_in_the_middle_of_a_step_loses_none(world, straight):
  job = Job(world, *SAVING, "runtime.profile_steps=(2,3)", out="alone", step_seconds=0.5)
  job.wait_for("step 4/12")
  time.sleep(0.15)
  start = time.monotonic()
  job.processes[0].send_signal(signal.SIGINT)
  assert job.wait(60) == [75], job.log()
  assert time.monotonic() - start < 60
  taken = newest_checkpoint(str(job.out))
  assert taken is not None and f"Stopped; the same command goes on from step {taken}" in job.log()
  assert [entry["step"] for entry in history(job.out)] == list(range(1, taken + 1))
  assert list((job.out / "profile").rglob("*.xplane.pb"))

  again = Job(world, *SAVING, out="alone")
  assert again.wait() == [0], again.log()
  assert f"Resuming from the checkpoint of step {taken}" in again.log()
  assert history(job.out) == history(straight)


@pytest.mark.slow
def test_one_that_hangs_is_named_and_ends_the_others(world):
  """Its connections stay open, so that only its silence tells: what a dead host is like on accelerators."""
  job = Job(world, "runtime.hang_seconds=12", out="hung", processes=2, step_seconds=0.3)
  job.wait_for("step 3/12")
  start = time.monotonic()
  job.processes[1].send_signal(signal.SIGSTOP)
  assert job.processes[0].wait(60) != 0
  assert time.monotonic() - start < 60
  job.kill()
  assert "(process 0 of 2) has been in phase 'step' of step" in job.log(0)
  assert "stopped sending heartbeats" in job.log(0)
