"""Tasks whose batches depend on more than data, on several processes: the numbers of one, and what one writes all can read."""

import json

import pytest

from tests.support.hosts import Job, make_world

STEPS = ("training.max_steps=3", "training.save_strategy=steps", "training.save_steps=2")
NAMES = ("loss", "grad_norm")

GRPO = ("grpo.reward_funcs=('tests.tasks.grpo_reward:early_letters','exact_match')", "grpo.num_generations=3")
GRPO += (
  "grpo.max_completion_length=3",
  "grpo.beta=0.05",
  "grpo.num_iterations=2",
  "loader.sequence_buckets=(64,)",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  return make_world(tmp_path_factory.mktemp("world"))


def logged(world, *settings, out, processes):
  """What a run logs of its steps."""
  job = Job(world, *STEPS, *settings, out=out, processes=processes)
  assert job.wait() == [0] * processes, "\n".join(job.log(i)[-3000:] for i in range(processes))
  log = json.loads((world / out / "trainer_state.json").read_text())["log_history"]
  return [entry for entry in log if "loss" in entry]


def assert_same(ours, theirs, names, **tolerance):
  assert len(ours) == len(theirs) >= 3
  for name in names:
    found = [entry[name] for entry in ours]
    assert found == pytest.approx([entry[name] for entry in theirs], **tolerance), name


@pytest.mark.slow
def test_answers_of_two_processes(world):
  """Each scores its own answers; all learn from the same rewards, and decide together what is drawn."""
  two = logged(world, *GRPO, out="grpo_two", processes=2)
  one = logged(world, *GRPO, out="grpo_one", processes=1)
  told = ("reward", "reward_std", "rewards/early_letters/mean", "completions/mean_length", "kl", "entropy")
  assert_same(two, one, (*NAMES, *told), rel=1e-4, abs=1e-5)
  assert one[0]["rewards/early_letters/std"] > 0 and one[0]["grad_norm"] > 0
  assert two[0]["policy_ratio_deviation"] == two[2]["policy_ratio_deviation"] == 0


@pytest.mark.slow
def test_a_teacher_of_two_processes(world):
  """Each writes what its devices computed; both read all of it, and so does one process."""
  settings = (f"distillation.teacher={world / 'model'}", "distillation.top_k=12", "runtime.random_init=True")
  two = logged(world, *settings, out="distilled_two", processes=2)
  one = logged(world, *settings, out="distilled_one", processes=1)
  cache = f"distillation.cache_dir={world / 'distilled_two' / 'teacher_logps'}"
  there = logged(world, *settings, cache, out="distilled_again", processes=1)
  parts = [path.name for path in (world / "distilled_two" / "teacher_logps").glob("part-*")]
  assert len({name.split(".")[0] for name in parts}) == 2, parts
  for run in (two, there):
    assert_same(run, one, (*NAMES, "losses/teacher", "losses/cross_entropy"), rel=1e-4, abs=1e-5)
  assert one[0]["losses/teacher"] > 1e-3


@pytest.mark.slow
def test_flash_of_two_processes(world):
  """Which tiles are compressed is the data's, not a process's; the router's threshold is of all tiles."""
  for stage, model in (("consistency", world / "model"), ("router", world / "consistency_one")):
    settings = (f"flash.stage={stage}", f"model.model_name_or_path={model}", "flash.window=6")
    two = logged(world, *settings, out=f"{stage}_two", processes=2)
    one = logged(world, *settings, out=f"{stage}_one", processes=1)
    assert_same(two, one, NAMES, rel=1e-4, abs=1e-5)
    assert one[-1]["grad_norm"] > 0
