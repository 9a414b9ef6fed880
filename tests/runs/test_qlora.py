"""Whole runs with adapters on quantized weights: how far from those on bfloat16, and resumed to the bit."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.toy import log_history, run_training

ADAPTERS = (
  *("model.use_llm_lora=8", "model.freeze_llm=True", "model.freeze_mlp=True", "model.freeze_backbone=True"),
  *("training.bf16=True", "training.learning_rate=0.003", "lora.dropout=0.0"),
)


def losses(folder, name, *overrides):
  done = run_training(folder, folder / name, *ADAPTERS, *overrides)
  assert done.returncode == 0, done.stderr
  return np.array([entry["loss"] for entry in log_history(folder / name) if "loss" in entry])


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "most"), [("int8", 0.01), ("nf4", 0.03)])
def test_it_learns_as_on_bfloat16(tmp_path, setting, most):
  """No step's loss is further off than about twice what docs/training.md says."""
  plain = losses(tmp_path, "plain")
  ours = losses(tmp_path, "ours", f"lora.quantize_base={setting}")
  assert 0 < np.abs(ours - plain).max() <= most
  assert plain[-1] < plain[0] - 0.5


@pytest.mark.slow
def test_a_run_resumes_to_the_bit_and_exports(tmp_path):
  quantized = (
    "lora.quantize_base=nf4",
    "training.save_steps=2",
    "training.lr_scheduler_type=constant",
  )
  losses(tmp_path, "resumed", *quantized, "training.max_steps=2")
  first = losses(tmp_path, "once", *quantized, "training.max_steps=4")
  again = losses(tmp_path, "resumed", *quantized, "training.max_steps=4")
  np.testing.assert_array_equal(again, first)
  for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
    ours, theirs = load_file(tmp_path / "resumed" / file), load_file(tmp_path / "once" / file)
    for key, value in theirs.items():
      np.testing.assert_array_equal(ours[key].view(np.uint8), value.view(np.uint8), err_msg=key)
  config = json.loads((tmp_path / "once/adapter/adapter_config.json").read_text())
  assert config["r"] == 8 and "quantize_base" not in config
