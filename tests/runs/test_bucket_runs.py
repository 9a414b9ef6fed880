"""Runs whose hosts share nothing but a bucket: trained, killed, gone on with, exported."""

import json
import shutil
import time

import numpy as np
import pytest
from safetensors.numpy import load

from internvl_jax.outputs import checkpoint_steps, is_complete
from internvl_jax.storage.paths import BucketPath
from tests.support.buckets import long_on_one, names_in
from tests.support.hosts import Job, assert_same_curve, history, make_world

HERE = (
  "model.model_name_or_path=model",
  "data.meta_path=meta.json",
  "loader.cache_dir=sizes",
  "training.max_steps=6",
  # Weights that nobody has written: each host draws its part of them.
  "runtime.random_init=True",
)
# Where there are no locks, a run waits at its start for another that comes at the same time.
QUICK = {"lease.BEAT_SECONDS": 1}
SAVING = (
  "training.save_strategy=steps",
  "training.save_steps=2",
  "training.save_total_limit=2",
  "training.report_to=tensorboard",
)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
  """The folders of two hosts, which have nothing in common."""
  first = make_world(tmp_path_factory.mktemp("first"))
  second = tmp_path_factory.mktemp("second") / "world"
  shutil.copytree(first, second)
  return first, second


@pytest.fixture(scope="module")
def straight(worlds):
  job = Job(worlds[0], *HERE, out="straight", folders=(worlds[0],))
  assert job.wait() == [0], job.log()
  return job.out


def run(worlds, out: str, *overrides, **options) -> Job:
  return Job(
    worlds[0],
    *HERE,
    *SAVING,
    f"training.output_dir={out}",
    *overrides,
    **{"folders": worlds, "processes": 2, "constants": QUICK} | options,
  )


@long_on_one
def test_hosts_that_share_a_bucket_alone(bucket, worlds, straight):
  out = f"{bucket}/runs/a"
  # Slow steps: the second save waits for the first, so that steps are left once that is complete.
  job = run(worlds, out, step_seconds=1)
  job.wait_for("step 2/6")
  while not any(is_complete(BucketPath(f"{out}/checkpoints/{step}")) for step in checkpoint_steps(out)):
    assert job.processes[0].poll() is None, job.log()
    time.sleep(0.1)
  # The one that the other met at, and that writes.
  job.processes[0].kill()
  assert 0 not in job.wait(120)
  assert "another task died" in job.log(1), job.log(1)
  assert not BucketPath(f"{out}/model.safetensors").exists()

  # The second one alone: what it needs of the first is in the bucket.
  again = run(worlds, out, processes=1, folders=worlds[1:])
  assert again.wait() == [0], again.log()
  assert "Resuming from the checkpoint of step" in again.log()
  log = json.loads(BucketPath(f"{out}/trainer_state.json").read_text())["log_history"]
  ours = [{key: entry[key] for key in ("step", "loss", "grad_norm", "learning_rate")} for entry in log]
  assert_same_curve(ours, history(straight), atol=1e-5)
  weights, theirs = (
    load(BucketPath(f"{out}/model.safetensors").read_bytes()),
    (straight / "model.safetensors").read_bytes(),
  )
  for name, value in load(theirs).items():
    np.testing.assert_allclose(weights[name], value, atol=1e-4, err_msg=name)
  names = names_in(out)
  assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} == {"4", "6"}
  assert "run.lease" not in names and any(name.startswith("tensorboard/events") for name in names)
  on_disk = {path.name for path in straight.iterdir() if path.is_file()}
  assert on_disk <= set(names)
  for world in worlds:
    assert not [path for path in world.iterdir() if ":" in path.name]
