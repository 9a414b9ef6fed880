"""A LoRA run from the command line: what trains, what it leaves, and going on from that."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from internvl_jax import verification
from tests.support.toy import CURVE, log_history, run_training

SETTINGS = (
  "model.freeze_backbone=True",
  "model.freeze_llm=True",
  "model.freeze_mlp=True",
  "model.use_llm_lora=4",
  "training.max_steps=3",
  "training.save_strategy=no",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("lora")
  cache = f"runtime.compilation_cache_dir={folder / 'cache'}"
  done = run_training(folder, folder / "out", *SETTINGS, cache, "checkpoint.export_layout=hf")
  assert done.returncode == 0, done.stderr
  return folder, cache, done


def test_the_log_tells_what_trains_and_that_the_merge_is_right(run):
  _, _, done = run
  # 3 layers of q 64x64, k and v 64x32, o 64x64, gate and up 64x128, down 128x64, each with (in + out) * 4.
  adapters = 3 * 4 * (2 * 128 + 2 * 96 + 3 * 192)
  (line,) = [line for line in done.stderr.splitlines() if line.startswith("language_model")]
  assert line.split()[2:] == [f"{adapters:,}", f"{8 * adapters:,}"]
  assert "Merged the adapters: logits of a fixed input differ by at most" in done.stderr
  losses = [entry["loss"] for entry in log_history(run[0] / "out")]
  assert len(losses) == 3 and losses[2] != losses[0]


def test_the_merged_model_is_base_and_adapter(run):
  folder, _, _ = run
  assert json.loads((folder / "out/config.json").read_text())["model_type"] == "internvl"
  merged = verification.compute(str(folder / "out"), None)
  apart = verification.compute(str(folder / "out/adapter"), None)
  base = verification.compute(str(CURVE / "init"), None)
  np.testing.assert_allclose(merged["logits"], apart["logits"], rtol=0, atol=1e-4)
  assert np.abs(merged["logits"] - base["logits"]).max() > 1e-3
  weights = load_file(folder / "out/model.safetensors")
  start = load_file(CURVE / "init/model.safetensors")
  np.testing.assert_array_equal(
    weights["language_model.lm_head.weight"], start["language_model.lm_head.weight"]
  )
  np.testing.assert_array_equal(weights["multi_modal_projector.linear_1.weight"], start["mlp1.1.weight"])


def test_an_adapter_goes_on_training(run):
  """Its first loss is not the base model's, but where the adapter had got to."""
  folder, cache, _ = run
  base = log_history(folder / "out")[0]["loss"]
  model = f"model.model_name_or_path={folder / 'out/adapter'}"
  done = run_training(folder, folder / "on", *SETTINGS, cache, model, "training.max_steps=1")
  assert done.returncode == 0, done.stderr
  first = log_history(folder / "on")[0]["loss"]
  assert first < base - 1e-3
  config = json.loads((folder / "on/adapter/adapter_config.json").read_text())
  assert config["base_model_name_or_path"] == str((CURVE / "init").absolute()) and config["r"] == 4


def test_another_template_than_the_checkpoints_is_refused(run, tmp_path):
  folder, _, _ = run
  config = json.loads((folder / "out/adapter/adapter_config.json").read_text())
  assert config["peft_type"] == "LORA"
  copy = shutil.copytree(CURVE / "init", tmp_path / "model")
  raw = json.loads((copy / "config.json").read_text())
  (copy / "config.json").write_text(json.dumps(raw | {"template": "Hermes-2"}))
  done = run_training(tmp_path, tmp_path / "out", f"model.model_name_or_path={copy}")
  assert done.returncode == 1
  (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
  assert "data.conv_style='internvl2_5', but the checkpoint was trained with template 'Hermes-2'" in line
  assert "runtime.allow_other_template=True" in line
