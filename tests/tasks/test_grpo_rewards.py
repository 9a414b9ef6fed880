"""Rewards by name: metrics, formats and functions; what is wrong with one is said in a line."""

import math
import sys
import types

import numpy as np
import pytest

from internvl_jax.errors import UserError
from internvl_jax.eval.metrics.answered import Answered
from internvl_jax.tasks.grpo.rewards import (
  OF_WHOLE_SETS,
  REWARDS,
  Completion,
  open_rewards,
  rewards_of,
  weighted_sum,
)


def completions(*texts, wanted="red", **record):
  return [
    Completion(
      answered=Answered(prediction=text, answers=(wanted,), question="what color?", record=record), ids=(i,)
    )
    for i, text in enumerate(texts)
  ]


@pytest.fixture
def module(monkeypatch):
  """A module of the user's, whose functions a test writes."""
  found = types.ModuleType("my_rewards")
  found.__file__ = "my_rewards.py"
  monkeypatch.setitem(sys.modules, "my_rewards", found)
  return found


def test_metrics_formats_and_functions_in_their_order(module):
  module.length = lambda completions, **fields: [len(text) for text in completions]
  rewards = open_rewards(["exact_match", r"format:<a>.*</a>", "my_rewards:length"])
  found = rewards_of(rewards, completions("Red", "<a>red\n</a>", "blue <a></a>"))
  np.testing.assert_array_equal(found, [[1, 0, 3], [0, 1, 11], [0, 0, 12]])
  assert [reward.label for reward in rewards] == ["exact_match", "format", "length"]


def test_each_metric_that_scores_answers_by_themselves_is_a_reward():
  """A score does not depend on the answers beside it."""
  line = {"options": {"A": "red", "B": "blue"}, "bbox": [0, 0, 50, 100], "width": 100, "height": 100}
  group = completions("A", "[[0, 0, 500, 1000]]", "A red car", wanted="A", **line)
  for name in REWARDS:
    (reward,) = open_rewards([name])
    together = reward(group)
    assert [reward([one])[0] for one in group] == together.tolist()
  assert open_rewards(["choice"])[0](group).tolist() == [1, 0, 1]
  assert open_rewards(["iou"])[0](group).tolist() == [0, 1, 0]
  for name in OF_WHOLE_SETS:
    with pytest.raises(UserError, match=f"{name}.*depend on the answers beside"):
      open_rewards([name])


def test_a_function_has_trls_arguments(module):
  seen = {}

  def every(prompts, completions, completion_ids, solution, **fields):
    seen.update(
      fields, prompts=prompts, completions=completions, completion_ids=completion_ids, solution=solution
    )
    return (0.5, None)

  module.every, module.few = every, lambda completions, solution: np.array([1, 2])
  group = completions("red", "blue", solution="x", prompts="of the line")
  group.append(completions("green", other=1)[0])
  rewards = open_rewards(["my_rewards:every", "my_rewards:few"])
  found = rewards_of(rewards, group[:2])
  np.testing.assert_array_equal(found, [[0.5, 1], [np.nan, 2]])
  assert seen == {
    "prompts": ["what color?"] * 2,
    "completions": ["red", "blue"],
    "completion_ids": [[0], [1]],
    "solution": ["x", "x"],
  }
  module.every = every
  with pytest.raises(UserError, match="for 3 completions"):
    rewards[0](group)
  assert seen["other"] == [None, None, 1]


def test_several_of_a_kind_are_numbered(module):
  module.exact_match = lambda completions: [0] * len(completions)
  names = ["format:a", "exact_match", "format:b", "my_rewards:exact_match"]
  labels = [reward.label for reward in open_rewards(names)]
  assert labels == ["format_1", "exact_match_1", "format_2", "exact_match_2"]
  with pytest.raises(UserError, match="exact_match is named twice"):
    open_rewards(["exact_match", "exact_match"])


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("exact_mach", "there is no reward 'exact_mach'; did you mean 'exact_match'?"),
    ("format:(a", "format:(a is no regular expression: missing )"),
    ("no_such.thing:f", "there is no module 'no_such'; put its folder into PYTHONPATH"),
    ("my_rewards:lenght", "my_rewards.py has no 'lenght'; did you mean 'length'?"),
    ("my_rewards:number", "my_rewards:number is 3, which is no function"),
  ],
)
def test_what_cannot_be_opened(module, name, said):
  def length(completions):
    return [len(completions)]

  module.length, module.number = length, 3
  with pytest.raises(UserError) as error:
    open_rewards([name])
  assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("returned", "said"),
  [
    ([1.0], "my_rewards:f returned [1.0] for 2 completions"),
    (None, "my_rewards:f returned None for 2 completions"),
    ({"a": 1}, "returned {'a': 1} for 2"),
    ([1, "good"], "my_rewards:f returned 'good' for completion 1"),
    ([1, math.nan], "my_rewards:f returned nan for completion 1"),
    ([math.inf, 0], "returned inf for completion 0"),
    ([[1.0], [2.0]], "returned [1.0] for completion 0"),
    (np.zeros((2, 2)), "returned [0.0, 0.0] for completion 0"),
  ],
)
def test_what_a_function_must_not_return(module, returned, said):
  module.f = lambda completions: returned
  with pytest.raises(UserError) as error:
    open_rewards(["my_rewards:f"])[0](completions("a", "b"))
  assert said in str(error.value) and "\n" not in str(error.value)


def test_what_a_function_raises_is_not_caught(module):
  def f(completions):
    raise KeyError("mine")

  module.f = f
  with pytest.raises(KeyError, match="mine"):
    open_rewards(["my_rewards:f"])[0](completions("a"))


def test_a_module_that_wants_another_keeps_its_error(tmp_path, monkeypatch):
  (tmp_path / "wants_another.py").write_text("import there_is_no_such\n")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ModuleNotFoundError, match="there_is_no_such"):
    open_rewards(["wants_another:f"])


def test_the_weighted_sum_is_of_the_rewards_that_an_answer_has():
  values = np.array([[1, 0.5], [np.nan, 2], [np.nan, np.nan]])
  np.testing.assert_array_equal(weighted_sum(values), [1.5, 2, np.nan])
  np.testing.assert_array_equal(weighted_sum(values, (2, -1)), [1.5, -2, np.nan])
