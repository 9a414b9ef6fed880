"""What is wrong with the data or the checkpoint is said in one line that names file, line and cause."""

import json
import shutil

import jax
import pytest

from internvl_jax.errors import UserError
from internvl_jax.train.run import train
from tests.support.toy import CURVE, curve_config


@pytest.fixture
def data(tmp_path):
  """A copy of the toy's data, to be damaged."""
  shutil.copytree(CURVE / "data", tmp_path / "data")
  return tmp_path / "data"


def attempt(tmp_path, data, **changes):
  """The message that training on the damaged data ends with."""
  config = curve_config(tmp_path / "out")
  config.data.meta_path = str(data / "meta.json")
  for name, value in changes.items():
    leaf, field = name.split("__")
    setattr(getattr(config, leaf), field, value)
  with pytest.raises(UserError) as error:
    train(config)
  assert not (tmp_path / "out/model.safetensors").exists()
  return str(error.value)


def edit(data, line, change):
  lines = (data / "train.jsonl").read_text().splitlines()
  lines[line - 1] = change(lines[line - 1])
  (data / "train.jsonl").write_text("\n".join(lines) + "\n")


def edit_record(data, line, change):
  def apply(text):
    record = json.loads(text)
    change(record)
    return json.dumps(record)

  edit(data, line, apply)


def test_missing_image(tmp_path, data):
  edit_record(data, 2, lambda r: r.update(image="images/gone.png"))
  message = attempt(tmp_path, data)
  assert "train.jsonl:2" in message and "gone.png" in message and "not found" in message
  assert "\n" not in message


def test_corrupt_image(tmp_path, data):
  (data / "images/0.png").write_bytes((data / "images/0.png").read_bytes()[:60])
  message = attempt(tmp_path, data)
  assert "train.jsonl:2" in message and "0.png" in message and "cannot be decoded" in message
  assert "\n" not in message


def test_broken_json_line(tmp_path, data):
  edit(data, 3, lambda line: line[:-5])
  message = attempt(tmp_path, data)
  assert "train.jsonl:3" in message and "broken JSON" in message
  assert "\n" not in message


def test_more_placeholders_than_images(tmp_path, data):
  edit_record(data, 1, lambda r: r["conversations"][0].update(value="<image>\n<image>\nWhat?"))
  message = attempt(tmp_path, data)
  assert "train.jsonl:1" in message and "2 <image>" in message and "1 images" in message


def test_empty_dataset(tmp_path, data):
  (data / "train.jsonl").write_text("\n\n")
  message = attempt(tmp_path, data)
  assert "train.jsonl" in message and "empty" in message


def test_unknown_template(tmp_path, data):
  message = attempt(tmp_path, data, data__conv_style="internvl2.5")
  assert "internvl2.5" in message and "internvl2_5" in message


def test_tile_that_the_patches_do_not_divide(tmp_path, data):
  message = attempt(tmp_path, data, data__force_image_size=60)
  assert "60" in message and "patch_size=14" in message and "use 56" in message


def damaged_checkpoint(tmp_path, change, **changes):
  """The message for a checkpoint of which a file was changed."""
  folder = tmp_path / "init"
  shutil.copytree(CURVE / "init", folder)
  change(folder)
  return attempt(tmp_path, CURVE / "data", model__model_name_or_path=str(folder), **changes)


def what_is_in(folder):
  return {path: path.is_file() and (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_a_start_that_fails_changes_nothing_of_an_earlier_run(tmp_path, data):
  """Whatever it was asked to do there, and however late it fails."""
  (tmp_path / "out/checkpoints/3").mkdir(parents=True)
  for name in ("checkpoints/3/_CHECKPOINT_METADATA", "train_config.json", "model.safetensors.index.json"):
    (tmp_path / "out" / name).write_text("{}")
  before = what_is_in(tmp_path / "out")
  empty = {"data": {"root": "", "annotation": str(data / "empty.jsonl")}}
  (data / "empty.jsonl").write_text("")
  (data / "meta.json").write_text(json.dumps(empty))
  for overwrite in (False, True):
    assert "empty" in attempt(tmp_path, data, training__overwrite_output_dir=overwrite)
    assert what_is_in(tmp_path / "out") == before

  def widen(folder):
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["intermediate_size"] = 256
    (folder / "config.json").write_text(json.dumps(config))

  assert "mis-shaped" in damaged_checkpoint(tmp_path, widen, training__overwrite_output_dir=True)
  assert what_is_in(tmp_path / "out") == before


def test_truncated_weights(tmp_path):
  def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])

  message = damaged_checkpoint(tmp_path, cut)
  assert not (tmp_path / "out").exists()
  assert "model.safetensors" in message and "truncated" in message


def test_pickled_weights_are_not_read(tmp_path):
  def pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

  message = damaged_checkpoint(tmp_path, pickle)
  assert "pytorch_model.bin" in message and "never read" in message


def test_all_mismatches_are_reported_together(tmp_path):
  def widen(folder):
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["intermediate_size"] = 256
    config["llm_config"]["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))

  message = damaged_checkpoint(tmp_path, widen)
  assert message.count("mis-shaped: ") == 2 * 3
  assert "language_model.model.layers.0.mlp.gate_proj.weight is (128, 64), expected (256, 64)" in message
  assert message.count("left over: language_model.model.layers.2.") == 12


@pytest.mark.parametrize(
  ("part", "key", "value"),
  [
    ("llm_config", "model_type", "mamba"),
    ("llm_config", "use_sliding_window", True),
    ("vision_config", "hidden_act", "relu"),
  ],
)
def test_switches_that_would_be_ignored_are_refused(tmp_path, part, key, value):
  def switch(folder):
    config = json.loads((folder / "config.json").read_text())
    config[part][key] = value
    (folder / "config.json").write_text(json.dumps(config))

  message = damaged_checkpoint(tmp_path, switch)
  assert key in message and repr(value) in message and "config.json" in message


def test_eight_devices_are_simulated():
  assert jax.device_count() == 8, "tests rely on conftest.py's simulated devices"
