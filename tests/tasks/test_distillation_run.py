"""Whole runs of distillation: the teacher's pass, what it leaves on disk, and what is refused."""

import json
import shutil

import numpy as np
import pytest

from tests.support.toy import CURVE, run_training

TEACHER = f"distillation.teacher={CURVE / 'init'}"
SETTINGS = (TEACHER, "distillation.top_k=12", "distillation.temperature=2.0", "distillation.weight=1.0")
SETTINGS += (
  "training.gradient_accumulation_steps=2",
  "training.per_device_train_batch_size=2",
  "loader.shuffle=True",
)
SETTINGS += ("training.max_steps=4", "training.learning_rate=2e-3", "training.warmup_ratio=0.0")
SAVES = ("training.save_steps=2", "training.save_strategy=steps")


def run(folder, name, *overrides, ok=True, **options):
  done = run_training(folder, folder / name, *SETTINGS, *overrides, **options)
  assert (done.returncode == 0) == ok, done.stderr[-4000:]
  return done


def history(folder, name):
  return json.loads((folder / name / "trainer_state.json").read_text())["log_history"][:4]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A whole run whose student is its teacher, and what it says: (folder, text)."""
  folder = tmp_path_factory.mktemp("finished")
  return folder, run(folder, "out", *SAVES, "distillation.weight=0.5").stderr


def test_a_student_that_is_its_teacher_has_labels_to_learn_and_nothing_else(finished):
  """The teacher's tokens stand in the places of their targets, in other rows than those that it was asked in."""
  folder, said = finished
  assert "is asked about 24 samples: 76 bytes for each supervised token" in said
  (first, *_, last) = history(folder, "out")
  # What float16 leaves of 0; then the labels take it elsewhere.
  assert first["losses/teacher"] < 1e-6 and first["losses/cross_entropy"] > 1
  np.testing.assert_allclose(first["loss"], 0.5 * first["losses/cross_entropy"], rtol=1e-5)
  assert last["losses/teacher"] > 1e-3
  names = {path.name for path in (folder / "out" / "teacher_logps").iterdir()}
  part = "part-00000000-0000"
  assert names == {"key.json", "parts.json", "samples.npy", f"{part}.npy", f"{part}.of.npy"}
  key = json.loads((folder / "out" / "teacher_logps" / "key.json").read_text())
  assert (key["top_k"], key["temperature"], key["samples"]) == (12, 2.0, 24)


@pytest.mark.slow
def test_another_student_learns_from_what_is_there(tmp_path, finished):
  cache = f"distillation.cache_dir={finished[0] / 'out' / 'teacher_logps'}"
  done = run(tmp_path, "drawn", cache, "runtime.random_init=True")
  assert "those in" in done.stderr and "is asked about" not in done.stderr
  found = history(tmp_path, "drawn")
  assert all(entry["loss"] == pytest.approx(entry["losses/teacher"]) for entry in found)
  assert found[-1]["losses/teacher"] < found[0]["losses/teacher"]


@pytest.mark.slow
def test_a_stopped_run_goes_on(tmp_path, finished):
  shutil.copytree(finished[0] / "out", tmp_path / "half")
  shutil.rmtree(tmp_path / "half" / "checkpoints" / "4")
  done = run(tmp_path, "half", *SAVES, "distillation.weight=0.5")
  assert "Resuming from the checkpoint of step 2" in done.stderr
  names = ("loss", "grad_norm", "losses/teacher", "losses/cross_entropy")
  for ours, theirs in zip(history(tmp_path, "half"), history(finished[0], "out"), strict=True):
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


def test_a_cache_of_other_settings_is_refused(tmp_path, finished):
  cache = f"distillation.cache_dir={finished[0] / 'out' / 'teacher_logps'}"
  done = run(tmp_path, "other", cache, "distillation.temperature=1.0", ok=False)
  said = done.stderr.strip().splitlines()[-1]
  assert "of another teacher: temperature is 2.0 there and 1.0 here (temperature differ)" in said


@pytest.mark.slow
def test_packed_rows(tmp_path):
  """Several samples a row, asked about in other rows than they are trained in."""
  packed = ("data.use_packed_ds=True", "data.max_packed_tokens=1024", "data.num_images_expected=24")
  run(tmp_path, "out", *packed, "training.per_device_train_batch_size=1", "loader.shuffle=True")
  assert history(tmp_path, "out")[0]["losses/teacher"] < 1e-6


@pytest.mark.slow
def test_on_a_mesh(tmp_path, finished):
  """Over rows, tokens and the vocabulary of eight devices, teacher and student."""
  mesh = ("mesh.data=2", "mesh.sequence=2", "mesh.tensor=2", "training.per_device_train_batch_size=1")
  run(tmp_path, "eight", *mesh, "distillation.weight=0.5", devices=8)
  for ours, theirs in zip(history(tmp_path, "eight"), history(finished[0], "out"), strict=True):
    np.testing.assert_allclose(ours["losses/teacher"], theirs["losses/teacher"], rtol=1e-3, atol=1e-6)
