"""Whole runs of ViCO's stages: an ordinary model becomes a Flash, its router is trained, and stopped runs go on."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from internvl_jax.models.flash import PARTS
from tests.support.toy import CURVE, log_history, run_training

SETTINGS = ("training.max_steps=4", "training.save_strategy=steps", "training.save_steps=2")
SETTINGS += ("training.gradient_accumulation_steps=1", "training.learning_rate=2e-3")


def run(folder, name, stage, *overrides):
  done = run_training(folder, folder / name, *SETTINGS, f"flash.stage={stage}", *overrides)
  assert done.returncode == 0, done.stderr[-4000:]
  return done.stderr


def router(folder):
  model = f"model.model_name_or_path={folder / 'consistency'}"
  return "router", model, "flash.percentile=60.0", "flash.window=6"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Both stages, with checkpoints after two steps and four."""
  folder = tmp_path_factory.mktemp("vico")
  run(folder, "consistency", "consistency", "training.per_device_train_batch_size=4")
  run(folder, "router", *router(folder))
  return folder


def tensors(folder):
  return load_file(folder / "model.safetensors")


def changed(one, other):
  return {name for name, value in other.items() if name not in one or not np.array_equal(one[name], value)}


def test_a_model_becomes_a_flash(finished):
  first, *_, last = log_history(finished / "consistency")[:4]
  assert 0 < first["kl"] == pytest.approx(first["loss"], rel=1e-3) and last["grad_norm"] > 0
  config = json.loads((finished / "consistency" / "config.json").read_text())
  assert config["flash_mode"] and config["flash_relative_threshold"] == 0.3
  before, after = tensors(CURVE / "init"), tensors(finished / "consistency")
  assert {name.partition(".")[0] for name in after.keys() - before.keys()} == set(PARTS)
  assert {"vision_model", "mlp1", "language_model"} <= {
    name.partition(".")[0] for name in changed(before, after)
  }


def test_the_router_trains_alone(finished):
  before, after = tensors(finished / "consistency"), tensors(finished / "router")
  moved = changed(before, after)
  assert before.keys() == after.keys() and {name.partition(".")[0] for name in moved} == {
    "gating",
    "pooling_before_gating",
  }
  assert not [name for name in moved if "attn3" in name or "norm4" in name]
  for entry in log_history(finished / "router")[:4]:
    assert 0 <= entry["router_accuracy"] <= 1 and 0 <= entry["compressible"] <= 1 and entry["change"] > 0


@pytest.mark.parametrize("stage", ["consistency", "router"])
def test_a_stopped_run_goes_on_to_the_bit(tmp_path, finished, stage):
  """With the same teacher, or with the same window."""
  shutil.copytree(finished / stage, tmp_path / stage)
  shutil.rmtree(tmp_path / stage / "checkpoints" / "4")
  asked = router(finished) if stage == "router" else (stage, "training.per_device_train_batch_size=4")
  assert "Resuming from the checkpoint of step 2" in run(tmp_path, stage, *asked)
  assert not changed(tensors(finished / stage), tensors(tmp_path / stage))
  for ours, theirs in zip(log_history(tmp_path / stage)[:4], log_history(finished / stage)[:4], strict=True):
    assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["consistency", "router"])
def test_the_same_on_four_devices(tmp_path, finished, stage):
  """Rows dealt to two shards of two devices: the same tiles are drawn, and a step's losses are the same."""
  asked = router(finished) if stage == "router" else (stage,)
  each = ("training.save_strategy=no", "data.loss_reduction_all_gather=True", "training.max_steps=2")
  for name, settings, devices in (
    ("one", ("training.per_device_train_batch_size=4",), 1),
    ("four", ("training.per_device_train_batch_size=1", "mesh.data=2", "mesh.fsdp=2"), 4),
  ):
    done = run_training(
      tmp_path,
      tmp_path / name,
      *SETTINGS,
      f"flash.stage={asked[0]}",
      *asked[1:],
      *settings,
      *each,
      devices=devices,
    )
    assert done.returncode == 0, done.stderr[-4000:]
  one, four = (log_history(tmp_path / name)[:2] for name in ("one", "four"))
  for ours, theirs in zip(four, one, strict=True):
    for key in ("loss", "grad_norm"):
      np.testing.assert_allclose(ours[key], theirs[key], rtol=2e-3)
