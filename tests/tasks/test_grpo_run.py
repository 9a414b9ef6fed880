"""Whole runs of reinforcement: what is logged and written, and that a run that was stopped goes on bit for bit."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from internvl_jax.outputs import checkpoint_steps
from tests.support import forked
from tests.support.toy import log_history, run_training, train_command

GRPO = ("grpo.reward_funcs=('tests.tasks.grpo_reward:early_letters','exact_match')", "grpo.num_generations=4")
GRPO += ("grpo.max_completion_length=4", "grpo.beta=0.05", "grpo.num_completions_to_print=1")
GRPO += ("training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=1")
GRPO += ("training.warmup_ratio=0.0", "training.save_steps=1", "training.save_strategy=steps")
GRPO += ("loader.tile_buckets=(16,)", "loader.sequence_buckets=(256,512)")


def run(folder, name, *overrides, steps=4, **options):
  done = run_training(folder, folder / name, *GRPO, f"training.max_steps={steps}", *overrides, **options)
  assert done.returncode == 0, done.stderr[-4000:]
  return log_history(folder / name)


def without_times(history):
  return [{name: value for name, value in entry.items() if "second" not in name} for entry in history]


def test_what_is_logged_and_written(tmp_path):
  history = run(tmp_path, "out", "training.save_strategy=no", steps=2)
  for entry in history:
    assert entry["rewards/early_letters/std"] > 0 and entry["grad_norm"] > 0
    assert entry["rollout/logp_difference"] == entry["rollout/redrawn_tokens"] == 0
    assert entry["rollout/decoder_difference"] > 0
  assert history[-1]["kl"] > 0
  lines = (tmp_path / "out/evaluations/1/rollouts.jsonl").read_text().splitlines()
  assert len(lines) == 4 and set(json.loads(lines[0])["scores"]) == {"early_letters", "exact_match"}


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [1, 2])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, iterations):
  """From every checkpoint: before a rollout, and between the steps that learn from one."""
  again = f"grpo.num_iterations={iterations}"
  whole = run(tmp_path, "whole", again)
  if iterations == 1:
    assert all(entry["rollout/logp_difference"] == 0 for entry in whole)
  else:
    assert whole[0]["policy_ratio_deviation"] == whole[2]["policy_ratio_deviation"] == 0
    assert whole[1]["policy_ratio_deviation"] > 0
  for taken in (1, 2):
    name = f"after_{taken}"
    shutil.copytree(tmp_path / "whole", tmp_path / name)
    for step in range(taken + 1, 5):
      shutil.rmtree(tmp_path / name / "checkpoints" / str(step))
    assert without_times(run(tmp_path, name, again)) == without_times(whole)


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
  """SIGKILL at some moment of a rollout or a step: the same log, and the same weights."""
  long = ("grpo.num_iterations=2", "grpo.exact_rollouts=True")
  whole = run(tmp_path, "whole", *long, steps=8)
  arguments, environment = train_command(tmp_path, tmp_path / "killed", *GRPO, "training.max_steps=8", *long)
  with (tmp_path / "stderr.txt").open("w") as stderr:
    process = forked.start(arguments, environment=environment, stderr=stderr.fileno())
  while len(checkpoint_steps(str(tmp_path / "killed"))) < 3:
    assert process.poll() is None, "ended before it could be killed"
    time.sleep(0.005)
  os.kill(process.pid, signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  assert not (tmp_path / "killed/model.safetensors").exists()
  assert without_times(run(tmp_path, "killed", *long, steps=8)) == without_times(whole)
  ours, theirs = (
    hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).digest()
    for name in ("killed", "whole")
  )
  assert ours == theirs


@pytest.mark.slow
def test_as_users_compile(tmp_path):
  """By XLA's own choices, with layers that keep what they compute: rollouts still have the step's numbers."""
  arguments, environment = train_command(
    tmp_path, tmp_path / "out", *GRPO, "training.max_steps=3", "model.grad_checkpoint=False"
  )
  environment = {name: value for name, value in environment.items() if name != "XLA_FLAGS"}
  command = [sys.executable, *arguments]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
  assert done.returncode == 0, done.stderr[-4000:]
  for entry in log_history(tmp_path / "out"):
    assert entry["rollout/logp_difference"] == 0
    assert entry["rollout/decoder_difference"] > 0


@pytest.mark.slow
def test_on_a_mesh(tmp_path):
  """The same answers and losses on eight devices as on one."""
  one = run(tmp_path, "one", steps=2)
  mesh = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "training.per_device_train_batch_size=1")
  eight = run(tmp_path, "eight", *mesh, steps=2, devices=8)
  for ours, theirs in zip(eight, one, strict=True):
    for name in ("loss", "grad_norm", "reward", "entropy", "completions/mean_length"):
      assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
