"""The commands `convert` and `verify --against`, as a newcomer runs them."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from internvl_jax import conversion, signals
from internvl_jax.hf import model_config as layouts
from tests.support import forked
from tests.support.toy import ASSETS, CURVE

INIT = CURVE / "init"


def run(folder, module, *flags):
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
  return forked.run(
    ["-m", f"internvl_jax.{module}", *map(str, flags)], environment=environment, folder=folder
  )


def error_of(done):
  assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
  (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
  return line


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  folder = tmp_path_factory.mktemp("converted") / "hf"
  done = run(folder.parent, "convert", "--src", INIT, "--dst", folder, "--layout=hf")
  assert done.returncode == 0, done.stderr
  return folder


def test_the_folder_stands_alone(converted):
  names = {path.name for path in converted.iterdir()}
  assert names >= {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
  }
  config = json.loads((converted / "config.json").read_text())
  assert config["model_type"] == "internvl" and config["text_config"]["model_type"] == "qwen2"
  assert config["image_token_id"] == 5 and config["image_seq_length"] == 4
  assert {value.dtype for value in load_file(converted / "model.safetensors").values()} == {np.dtype("f4")}


def test_the_two_layouts_are_one_model(converted, tmp_path):
  done = run(tmp_path, "verify", "--model", INIT, "--against", converted)
  assert done.returncode == 0, done.stderr
  assert "logits           largest difference 0.000e+00" in done.stdout


def test_another_model_is_told_apart(converted, tmp_path):
  for path in converted.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  tensors = load_file(tmp_path / "model.safetensors")
  tensors["language_model.model.layers.1.mlp.up_proj.weight"] *= 1.01
  save_file(tensors, tmp_path / "model.safetensors")
  done = run(tmp_path, "verify", "--model", converted, "--against", tmp_path)
  assert done.returncode == 1 and "largest difference" in done.stdout


def test_what_is_told_when_it_is_stopped(tmp_path, monkeypatch):
  """Its folder is not written to again, so before the same command that has to go."""
  usual = signals._Watch().last_line
  monkeypatch.setattr(signals._watch, "last_line", usual)
  assert usual == "Stopped; the same command starts again"
  monkeypatch.setattr(conversion.export, "save_model", lambda *args, remedy, **more: told.append(remedy))
  told, dst = [], tmp_path / "new"
  conversion.convert(str(INIT), dst, layouts.layout_named("hf"), lora="merge")
  anew = f"remove {dst}, which is not complete, and start the same command again"
  assert signals._watch.last_line == f"Stopped; {anew}" and told == [f"make room, {anew}"]


def test_mistakes(converted, tmp_path):
  line = error_of(run(tmp_path, "convert", "--src", INIT, "--dst", converted, "--layout=hf"))
  assert f"--dst={converted} is there and not empty; name a new folder" in line
  line = error_of(
    run(tmp_path, "convert", "--src", INIT, "--dst", tmp_path / "x", "--layout=hf", "--lora=peft")
  )
  assert "has no adapters; use --lora=merge" in line
  line = error_of(
    run(tmp_path, "convert", "--src", tmp_path / "none", "--dst", tmp_path / "x", "--layout=hf")
  )
  assert "no such folder; give a checkpoint's folder or its hub id" in line
  assert not (tmp_path / "x").exists()
  assert "--inputs is needed" in error_of(run(tmp_path, "verify", "--model", INIT))
  bad = dict(np.load(ASSETS / "qwen2/io.npz"))
  np.savez(tmp_path / "io.npz", **{**bad, "input_ids": bad["input_ids"] + 1000})
  line = error_of(
    run(
      tmp_path,
      "verify",
      "--model",
      ASSETS / "qwen2",
      "--inputs",
      tmp_path / "io.npz",
      "--outputs",
      tmp_path / "o",
    )
  )
  assert "input_ids has ids from" in line and "a vocabulary of 512" in line
