"""The whole program: a recorded run is followed, and a killed one goes on as if nothing had happened."""

import json
import os
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from internvl_jax.conversion import convert
from internvl_jax.hf.model_config import HF
from internvl_jax.outputs import checkpoint_steps
from tests.support import forked
from tests.support.toy import CURVE, CURVE_INTERNLM2, log_history, run_training, train_command


@pytest.fixture(scope="module")
def recorded_run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("curve")
  done = run_training(folder, folder / "out", fresh=True)
  assert done.returncode == 0, done.stderr
  assert done.stderr.count("Compiling the step for") == 2  # For 12 tiles, and for 16.
  return folder / "out"


def test_follows_the_recorded_curve(recorded_run):
  assert_follows(recorded_run, CURVE)


def test_follows_the_recorded_curve_of_internlm2_with_accumulation(tmp_path):
  done = run_training(tmp_path, tmp_path / "out", "loader.tile_buckets=(8,)", curve=CURVE_INTERNLM2)
  assert done.returncode == 0, done.stderr
  assert_follows(tmp_path / "out", CURVE_INTERNLM2)


def test_follows_the_recorded_curve_from_the_other_layout(tmp_path):
  convert(str(CURVE / "init"), tmp_path / "hf", HF, lora="merge")
  here = (f"model.model_name_or_path={tmp_path / 'hf'}", "loader.tile_buckets=(16,)")
  done = run_training(tmp_path, tmp_path / "out", *here)
  assert done.returncode == 0, done.stderr
  assert_follows(tmp_path / "out", CURVE)


@pytest.mark.slow
def test_follows_the_recorded_curve_on_a_mesh(tmp_path):
  """Tokens, heads and tiles spread over four devices, from the checkpoint to the model that is saved."""
  done = run_training(tmp_path, tmp_path / "out", "mesh.sequence=2", "mesh.tensor=2", devices=4)
  assert done.returncode == 0, done.stderr
  assert_follows(tmp_path / "out", CURVE)
  assert "model.layers.0:3.self_attn.q_proj.kernel" in done.stderr  # The table of parameters.


def assert_follows(output_dir, curve):
  """The promised distance from a recorded run, step by step."""
  recorded = json.loads((curve / "expected.json").read_text())["log"]
  history = log_history(output_dir)
  assert len(history) == len(recorded) == 24
  for ours, theirs in zip(history, recorded, strict=True):
    step = theirs["step"]
    assert ours["step"] == step
    assert abs(ours["loss"] - theirs["loss"]) <= (1e-3 if step <= 10 else 5e-3), step
    np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=1e-2, err_msg=str(step))
    assert ours["learning_rate"] == theirs["learning_rate"], step


def test_leaves_a_report_and_what_it_is_made_of(recorded_run):
  (log,) = (recorded_run / "log").glob("*.jsonl")
  lines = [json.loads(line) for line in log.read_text().splitlines()]
  assert lines == [{"start": 0}, *log_history(recorded_run)]
  (start,) = json.loads((recorded_run / "run_facts.json").read_text())["starts"]
  assert start["seconds_to_first_step"] > 0 and start["changed"] == []
  assert start["recipe"].endswith(f"recipe.py:{recorded_run},curve")
  page = (recorded_run / "report.html").read_text()
  assert "24 of 24" in page and "finished" in page and "Changed from the recipe" in page


def test_leaves_a_model_that_stands_alone(recorded_run):
  source = CURVE / "init"
  trained, start = load_file(recorded_run / "model.safetensors"), load_file(source / "model.safetensors")
  assert {k: v.shape for k, v in trained.items()} == {k: v.shape for k, v in start.items()}
  assert sorted(k for k in start if (trained[k] == start[k]).all()) == []
  for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
    assert (recorded_run / name).read_bytes() == (source / name).read_bytes()
  config = json.loads((recorded_run / "config.json").read_text())
  original = json.loads((source / "config.json").read_text())
  assert config["llm_config"] == original["llm_config"]
  assert config["max_dynamic_patch"] == 6 and config["template"] == "internvl2_5"
  assert (recorded_run / "preprocessor_config.json").exists()
  state = json.loads((recorded_run / "trainer_state.json").read_text())
  assert state["global_step"] == state["max_steps"] == 24
  assert state["data"]["easy"]["samples"] == 96
  results = json.loads((recorded_run / "train_results.json").read_text())
  assert results["train_samples"] == 24 and results["epoch"] == state["epoch"]
  np.testing.assert_allclose(results["train_loss"], np.mean([e["loss"] for e in state["log_history"]]))


def test_every_log_entry_tells_how_fast_it_goes(recorded_run):
  """But those of steps that hold a compilation."""
  timed = [entry for entry in log_history(recorded_run) if "seconds_per_step" in entry]
  assert len(timed) >= 18
  for entry in timed:
    assert 0 <= entry["data_seconds_per_step"] < entry["seconds_per_step"]
    assert 0 < entry["compute_seconds_per_step"] <= entry["seconds_per_step"]
    assert entry["supervised_tokens_per_second"] > 0 and entry["tiles_per_second"] > 0


def test_an_output_directory_with_other_files_is_refused(tmp_path):
  out = tmp_path / "out"
  out.mkdir()
  (out / "thesis.tex").write_text("mine")
  done = run_training(tmp_path, out)
  assert done.returncode == 1
  errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
  assert len(errors) == 1 and str(out) in errors[0] and "overwrite_output_dir" in errors[0]
  assert "Traceback" not in done.stderr
  assert (out / "thesis.tex").read_text() == "mine"


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
  """SIGKILL at an arbitrary moment after some checkpoints, of which the newest is cut in half, too.

  Drop path and shuffling draw random numbers.
  """
  settings = ("training.max_steps=10", "model.drop_path_rate=0.2", "loader.shuffle=True")
  settings += (
    "loader.tile_buckets=(16,)",
    f"runtime.compilation_cache_dir={tmp_path / 'cache'}",
  )
  straight = tmp_path / "straight"
  assert run_training(tmp_path, straight, *settings, "training.save_strategy=no").returncode == 0

  settings += ("training.save_steps=2",)
  broken = tmp_path / "broken"
  arguments, environment = train_command(tmp_path, broken, *settings)
  with (tmp_path / "stderr.txt").open("w") as stderr:
    process = forked.start(arguments, environment=environment, stderr=stderr.fileno())
  # A checkpoint under way has a longer name; it gets this one when it is complete.
  while len(checkpoint_steps(str(broken))) < 2:
    assert process.poll() is None, "ended before it could be killed"
    time.sleep(0.005)
  os.kill(process.pid, signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  assert not (broken / "model.safetensors").exists()
  newest, before, *_ = checkpoint_steps(str(broken))
  files = [path for path in (broken / "checkpoints" / str(newest)).rglob("*") if path.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  os.truncate(largest, largest.stat().st_size // 2)

  again = run_training(tmp_path, broken, *settings)
  assert again.returncode == 0, again.stderr
  assert f"{broken}/checkpoints/{newest}: damaged" in again.stderr and "Traceback" not in again.stderr
  assert f"Resuming from the checkpoint of step {before}\n" in again.stderr
  for ours, theirs in zip(log_history(broken), log_history(straight), strict=True):
    for key in ("step", "loss", "grad_norm", "learning_rate", "epoch"):
      assert ours[key] == theirs[key], (key, ours, theirs)
  ours, theirs = load_file(broken / "model.safetensors"), load_file(straight / "model.safetensors")
  for name, value in theirs.items():
    np.testing.assert_array_equal(ours[name], value, err_msg=name)
