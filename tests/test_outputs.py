"""How a run begins in an output directory that has something, and what is deleted there."""

from pathlib import Path

import pytest

from internvl_jax.arguments import TrainingArguments
from internvl_jax.errors import UserError
from internvl_jax.outputs import check_output_dir, clear_output_dir, newest_checkpoint


@pytest.fixture
def training(tmp_path):
  return TrainingArguments(output_dir=str(tmp_path / "out"))


def checkpoint(out: Path, step: str, complete=True):
  folder = out / "checkpoints" / step
  folder.mkdir(parents=True)
  if complete:
    (folder / "_CHECKPOINT_METADATA").write_text("{}")


def test_output_dir_new(training, tmp_path):
  assert check_output_dir(training) == "new"
  (tmp_path / "out").mkdir()
  assert check_output_dir(training) == "new"
  training.overwrite_output_dir = True
  assert check_output_dir(training) == "new"


def test_output_dir_resumes_from_the_newest_complete_checkpoint(training, tmp_path):
  out = tmp_path / "out"
  for step in ("9", "10"):
    checkpoint(out, step)
  checkpoint(out, "11", complete=False)
  (out / "checkpoints/11/state").mkdir()  # What a folder holds does not make it complete.
  checkpoint(out, "12.orbax-checkpoint-tmp")
  assert newest_checkpoint(str(out)) == 10
  assert check_output_dir(training) == "resume"
  training.overwrite_output_dir = True
  assert check_output_dir(training) == "overwrite"


@pytest.mark.parametrize("name", ["notes.txt", "checkpoints/3"])
def test_output_dir_without_a_checkpoint_is_refused(training, tmp_path, name):
  path = tmp_path / "out" / name
  path.parent.mkdir(parents=True)
  path.write_text("")
  with pytest.raises(UserError, match="holds no complete checkpoint"):
    check_output_dir(training)


def test_overwriting_deletes_only_what_a_run_wrote(training, tmp_path):
  out = tmp_path / "out"
  checkpoint(out, "5")
  theirs = [out / "notes.txt", out / "my_model.safetensors", out / "data" / "config.json"]
  ours = [out / "model-00001-of-00002.safetensors", out / "train_config.json", out / "tensorboard" / "events"]
  for path in theirs + ours:
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
  elsewhere = tmp_path / "elsewhere"
  elsewhere.mkdir()
  (elsewhere / "kept").write_text("")
  (out / "adapter").symlink_to(elsewhere)
  training.overwrite_output_dir = True
  assert check_output_dir(training) == "overwrite"
  deleted = clear_output_dir(str(out))
  assert deleted == [
    "adapter",
    "checkpoints",
    "model-00001-of-00002.safetensors",
    "tensorboard",
    "train_config.json",
  ]
  assert sorted(path.name for path in out.iterdir()) == ["data", "my_model.safetensors", "notes.txt"]
  assert (elsewhere / "kept").exists()
  assert all(path.exists() for path in theirs)


def test_a_log_beside_a_new_run_may_be_overwritten(training, tmp_path):
  """Launch scripts of the reference pipe their log into the output directory."""
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "training_log.txt").write_text("")
  training.overwrite_output_dir = True
  assert check_output_dir(training) == "overwrite"
  assert clear_output_dir(training.output_dir) == []


def test_a_model_that_no_run_wrote_is_not_overwritten(training, tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "model.safetensors").write_text("")
  training.overwrite_output_dir = True
  with pytest.raises(UserError, match=r"holds model.safetensors, but nothing shows"):
    check_output_dir(training)


def test_what_took_a_pass_over_the_data_is_kept(tmp_path):
  logps = tmp_path / "reference_logps"
  training = TrainingArguments(output_dir=str(tmp_path))
  logps.mkdir()
  assert check_output_dir(training) == "new"
  (tmp_path / "train_config.json").write_text("{}")
  assert check_output_dir(training) == "overwrite"
  assert clear_output_dir(str(tmp_path)) == ["train_config.json"] and logps.is_dir()


def test_a_run_stopped_before_its_first_checkpoint_begins_anew(tmp_path):
  training = TrainingArguments(output_dir=str(tmp_path))
  (tmp_path / "train_config.json").write_text("{}")
  (tmp_path / "tensorboard").mkdir()
  assert check_output_dir(training) == "overwrite"
  (tmp_path / "model.safetensors").write_text("finished")
  with pytest.raises(UserError, match="holds no complete checkpoint"):
    check_output_dir(training)
  (tmp_path / "model.safetensors").unlink()
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(UserError, match="holds no complete checkpoint"):
    check_output_dir(training)
