"""What counts as the wanted answer, how scores are added up, and what is written of them."""

import json

import pytest

from internvl_jax.eval.loss import TokenLoss
from internvl_jax.eval.scoring import Evaluation, Question, summary
from tests.support.held_out import NO_PROMPT, score_set


def hit(answer, wanted, learned=None):
  scores = score_set([Question(NO_PROMPT, wanted, {}, learned)], [answer])
  assert scores.predictions[0]["correct"] == bool(scores.metrics["accuracy"])
  return bool(scores.metrics["accuracy"])


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


RECORDS = [{"kind": "b", "id": 1}, {"kind": "a", "id": 2}, {"kind": "b", "id": 3}, {"id": 4}]


def test_groups_and_predictions():
  questions = [Question(NO_PROMPT, "yes", record) for record in RECORDS]
  scores = score_set(questions, [" yes", "no", "no", "yes"], group_field="kind")
  assert summary([scores]) == {
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
    "scores": {"accuracy": 1.0},
  }
  assert [line["correct"] for line in scores.predictions] == [True, False, False, True]
  logged = {"eval_accuracy": 0.5, "eval_accuracy_(none)": 1.0, "eval_accuracy_a": 0.0, "eval_accuracy_b": 0.5}
  assert scores.for_log() == logged


def test_several_metrics_of_a_named_set():
  """Several answers may be right; the loss is a mean over tokens, of groups, too."""
  questions = [
    Question(NO_PROMPT, "Two", record, answers=("Two", "2")) for record in ({"kind": "a"}, {"kind": "b"})
  ]
  losses = [TokenLoss(3.0, 1), TokenLoss(1.0, 3)]
  options = {"label": "vqa/", "group_field": "kind", "losses": losses}
  scores = score_set(questions, ["2", "two dogs"], "exact_match", "anls", "loss", **options)
  assert scores.metrics == {"exact_match": 0.5, "anls": 0.5, "loss": 1.0}
  assert scores.for_log()["eval_vqa/exact_match"] == 0.5
  assert scores.for_log()["eval_vqa/loss_a"] == 3.0 and scores.for_log()["eval_vqa/loss_b"] == 1 / 3
  assert summary([scores]) == {"test": scores.summary()}
  first, second = scores.predictions
  assert first["scores"] == {"exact_match": 1.0, "anls": 1.0, "loss": 3.0} and first["set"] == "test"
  assert second["scores"]["loss"] == 1 / 3 and "correct" not in second


def test_scores_are_told_beside_those_of_the_start():
  """By metric and by group; what the start was not scored by has no change."""
  questions = [Question(NO_PROMPT, "red", {"kind": kind}) for kind in "ab"]
  start = {"eval_vqa/accuracy": 0.75, "eval_vqa/accuracy_b": 0.25, "eval_other/anls": 0.5}
  options = {"label": "vqa/", "group_field": "kind", "start": start}
  scores = score_set(questions, ["red", "blue"], "accuracy", "contains", **options)
  changes = {"eval_vqa/accuracy_change": -0.25, "eval_vqa/accuracy_b_change": -0.25}
  logged = scores.for_log()
  assert {name: value for name, value in logged.items() if name.endswith("_change")} == changes
  assert logged["eval_vqa/accuracy"] == 0.5 and logged["eval_vqa/contains_a"] == 1.0
  assert scores.summary()["accuracy_change"] == -0.25 and "contains_change" not in scores.summary()
  assert scores.summary()["by_group"]["b"]["accuracy_change"] == -0.25
  told = "accuracy 0.5000 (-0.2500), contains 0.5000, a 1.0000, b 0.0000 (-0.2500), in brackets the change since the start"
  assert scores.line() == told


def test_a_set_without_answers_has_no_predictions(tmp_path):
  """A set of the loss alone writes its scores, and no line of predictions.jsonl."""
  questions = [Question(NO_PROMPT, "red", {})]
  scores = [
    score_set(questions, [""], "loss", label="a/", losses=[TokenLoss(2.0, 4)]),
    score_set(questions, ["red"], "contains", label="b/"),
  ]
  evaluation = Evaluation(sets=(), tokenizer=None, decoder=None, loss=None, shown_lines=())
  evaluation.write(scores, tmp_path)
  (line,) = map(json.loads, (tmp_path / "predictions.jsonl").read_text().splitlines())
  assert line == {"prediction": "red", "answer": "red", "scores": {"contains": 1.0}, "set": "test"}
  assert scores[0].metrics == {"loss": 0.5} and not scores[0].asked.generates and scores[1].asked.generates
