"""Whole runs of reinforcement: what is logged and written, and that a run that was stopped goes on bit for bit."""

import json
import shutil

import pytest

from tests.support.toy import log_history, run_training

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


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [1, 2])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, iterations):
  """From every checkpoint: before a rollout, and between the steps that learn from one."""
  again = f"grpo.num_iterations={iterations}"
  whole = run(tmp_path, "whole", again)
  assert whole[0]["rewards/early_letters/std"] > 0 and whole[-1]["kl"] > 0
  assert all(entry["rollout/logp_difference"] < 1e-6 for entry in whole)
  if iterations > 1:
    assert whole[0]["policy_ratio_deviation"] == whole[2]["policy_ratio_deviation"] == 0
    assert whole[1]["policy_ratio_deviation"] > 0
  lines = (tmp_path / "whole/evaluations/1/rollouts.jsonl").read_text().splitlines()
  assert len(lines) == 4 and set(json.loads(lines[0])["scores"]) == {"early_letters", "exact_match"}
  for taken in (1, 2):
    name = f"after_{taken}"
    shutil.copytree(tmp_path / "whole", tmp_path / name)
    for step in range(taken + 1, 5):
      shutil.rmtree(tmp_path / name / "checkpoints" / str(step))
    assert without_times(run(tmp_path, name, again)) == without_times(whole)


@pytest.mark.slow
def test_on_a_mesh(tmp_path):
  """The same answers and losses on eight devices as on one."""
  one = run(tmp_path, "one", steps=2)
  mesh = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "training.per_device_train_batch_size=1")
  eight = run(tmp_path, "eight", *mesh, steps=2, devices=8)
  for ours, theirs in zip(eight, one, strict=True):
    for name in ("loss", "grad_norm", "reward", "entropy", "completions/mean_length"):
      assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
