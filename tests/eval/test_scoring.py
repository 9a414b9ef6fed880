"""What counts as the wanted answer, and how hits are added up."""

import numpy as np
import pytest

from internvl_jax.eval.scoring import Prompt, Question, score

NOTHING = Prompt(np.zeros(0, np.int32), np.zeros((0, 0, 0, 3), np.uint8))


def hit(answer, wanted, learned=None):
  scores = score([Question(NOTHING, wanted, {}, learned)], [answer], group_field=None)
  assert scores.predictions[0]["correct"] == bool(scores.accuracy)
  return bool(scores.accuracy)


@pytest.mark.parametrize("around", ["", " ", "\n", "\t \n"])
def test_white_space_around_either_answer_does_not_count(around):
  assert hit("two cats", f"{around}two cats{around}")
  assert hit(f"{around}two cats{around}", "two cats")
  assert hit("two cats", "other", f"{around}two cats{around}")
  assert not hit("two  cats", f"{around}two cats")


def test_all_else_counts():
  assert not hit("Red", "red") and not hit("red.", "red") and not hit("", "red") and not hit("<b>red", "red")


def test_the_answer_may_be_either_the_lines_or_that_of_its_tokens():
  assert hit("e\u0301", "e\u0301", "\u00e9") and hit("\u00e9", "e\u0301", "\u00e9")
  assert not hit("e", "e\u0301", "\u00e9")
  assert not hit("", "red") and hit("", "red", "")


def test_groups_and_predictions():
  records = [{"kind": "b", "id": 1}, {"kind": "a", "id": 2}, {"kind": "b", "id": 3}, {"id": 4}]
  questions = [Question(NOTHING, "yes", record) for record in records]
  scores = score(questions, [" yes", "no", "no", "yes"], group_field="kind")
  assert scores.summary() == {
    "accuracy": 0.5,
    "num_questions": 4,
    "by_group": {
      "(none)": {"accuracy": 1.0, "num_questions": 1},
      "a": {"accuracy": 0.0, "num_questions": 1},
      "b": {"accuracy": 0.5, "num_questions": 2},
    },
  }
  assert scores.predictions[0] == {
    "kind": "b",
    "id": 1,
    "prediction": "yes",
    "answer": "yes",
    "correct": True,
  }
  assert [line["correct"] for line in scores.predictions] == [True, False, False, True]
