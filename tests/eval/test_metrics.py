"""Metrics of answers: equal to the reference's own evaluation code on recorded answers, and what their rules say."""

import json

import numpy as np
import pytest

from internvl_jax.eval.metrics import METRICS
from internvl_jax.eval.metrics.answered import Answered
from internvl_jax.eval.metrics.edit_distance import edit_distance
from internvl_jax.eval.metrics.vqa import normalized
from internvl_jax.eval.metrics.words import words
from tests.support.toy import ASSETS

RECORDED = json.loads((ASSETS / "metrics.json").read_text())
OPEN_QUESTIONS = {"mmmu_open": "mmmu"}


def score(name, prediction, *answers, question="", **record):
  answered = Answered(prediction=prediction, answers=answers, question=question, record=record)
  return METRICS[name]([answered])[0]


@pytest.mark.parametrize("name", RECORDED["scores"])
def test_scores_are_those_of_the_reference(name):
  recorded = RECORDED["scores"][name]
  answered = [
    Answered(prediction=line["prediction"], answers=tuple(line.get("answers", ("",))), record=line)
    for line in RECORDED["answers"][recorded["on"]]
  ]
  scores = METRICS[OPEN_QUESTIONS.get(name, name)](answered)
  assert len(scores) == 200
  np.testing.assert_allclose(scores, recorded["each"], rtol=0, atol=1e-6)
  np.testing.assert_allclose(np.mean(scores), recorded["all"], rtol=0, atol=1e-6)
  # A comparison of zeros would say nothing.
  assert 0.1 < np.mean(np.array(recorded["each"]) > 0) < 0.95


def test_all_metrics_but_our_own_are_compared():
  assert {OPEN_QUESTIONS.get(name, name) for name in RECORDED["scores"]} == set(METRICS) - {"accuracy"}


def test_accuracy_is_to_the_letter():
  assert score("accuracy", "red", "blue", " red\n") == 1 and score("accuracy", "Red", "red") == 0
  learned = Answered(prediction="\u00e9", answers=("other",), spellings=("e\u0301", "\u00e9"))
  assert METRICS["accuracy"]([learned]) == [1]
  assert score("exact_match", "Red", "red") == 1


def test_one_answer_counts_as_that_of_all_people():
  assert score("vqa_accuracy", "Two dogs!", "2 dogs") == 1 and score("vqa_accuracy", "a cat", "2 dogs") == 0
  assert score("vqa_accuracy", "yes", *["yes"] * 3, *["no"] * 7) == pytest.approx(0.9)


@pytest.mark.parametrize(
  ("text", "form"),
  [
    ("The two dogs, isnt it?", "2 dogs isn't it"),
    ("1,000.", "1000"),
    ("3.5 m.", "3.5 m"),
    ("red/blue", "red blue"),
    ("red / blue", "red blue"),
    ("What's\nup", "what 's up"),
    ("None", "0"),
    ("." * 40, "." * 8),  # The benchmark's code removes the first 32.
  ],
)
def test_answers_are_normalized_as_the_benchmark_does(text, form):
  assert " ".join(normalized(text).split()) == form


@pytest.mark.parametrize(
  ("a", "b", "distance"), [("", "", 0), ("", "ab", 2), ("kitten", "sitting", 3), ("ab", "ba", 2)]
)
def test_edit_distance(a, b, distance):
  assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_less_than_half_similar_is_wrong():
  assert score("anls", "abcd", "abxy") == 0.5 and score("anls", "abcd", "axyz") == 0
  assert score("anls", "", "") == 1 and score("anls", " A  b ", "a b") == 1


def test_options_are_read_from_the_line_or_from_the_question():
  question = "Which animal?\nA. cat\n(B) a dog\nC: bird"
  assert Answered(prediction="", answers=(), question=question).options() == {
    "A": "cat",
    "B": "a dog",
    "C": "bird",
  }
  # A line that looks like an option by itself, and options that do not begin with A.
  assert Answered(prediction="", answers=(), question="A. cat?").options() == {}
  assert Answered(prediction="", answers=(), question="B. cat\nC. dog").options() == {}
  assert Answered(prediction="", answers=(), record={"options": {"a": 1, "b": 2}}).options() == {
    "a": "1",
    "b": "2",
  }
  assert score("choice", "it must be a dog", "B", question=question) == 1
  assert score("mmmu", "it must be (B)", "B", question=question) == 1


def test_the_letter_that_is_named_last_counts():
  for form in ("({})", "{}"):
    text = " or ".join(form.format(letter) for letter in "ABA")
    assert (
      score("mmmu", text, "A", options=["x", "y"]) == 1 and score("mmmu", text, "B", options=["x", "y"]) == 0
    )


def test_a_guess_does_not_depend_on_what_was_scored_before():
  asked = [Answered(prediction="?", answers=("A",), record={"options": ["x", "y"]})] * 20
  first = METRICS["mmmu"](asked)
  assert first == METRICS["mmmu"](asked) and 0 < sum(first) < 20
  assert sum(METRICS["choice"](asked)) == 0


def test_boxes_of_texts_are_compared_in_parts_of_the_image():
  wanted = "<ref>cat</ref><box>[[0, 0, 500, 1000]]</box>"
  assert score("iou", "[[0, 0, 500, 1000]]", wanted) == 1
  assert score("iou", "[[250, 0, 500, 1000]]", wanted) == score("iou", "[0.25, 0, 0.5, 1]", wanted) == 0.5
  assert score("iou_accuracy", "[[250, 0, 500, 1000]]", wanted) == 1
  assert (
    score("iou", "no box", wanted)
    == score("iou", "no box", "none")
    == score("iou", "[[a,b,c,d]]", wanted)
    == 0
  )
  pixels = {"bbox": [0, 0, 100, 50], "width": 200, "height": 50}
  assert score("iou", "[[0, 0, 500, 1000]]", "the cat", **pixels) == 1


def test_one_caption_by_itself_has_no_cider():
  assert score("cider", "a cat", "a cat") == 0
  two = [
    Answered(prediction=text, answers=(text,))
    for text in ("a cat sits on the mat", "two dogs run over grass")
  ]
  assert METRICS["cider"](two) == [pytest.approx(10)] * 2
  assert METRICS["rouge_l"](two) == [1, 1]


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("A dog's ball isn't here, can't go.", "a dog 's ball is n't here ca n't go"),
    ("the 80's and '90s", "the 80 's and '90s"),
    ("Mr. Smith's T-shirt & AT&T in the U.S.", "mr. smith 's t-shirt & at&t in the u.s."),
    ("5'2\" tall (red) — “STOP”", "5 2 tall -lrb- red -rrb- stop"),
    ("50% of $1,000.50 at 10:30am", "50 % of $ 1,000.50 at 10:30 am"),
    ("cannot gonna sun. No. 5", "can not gon na sun no. 5"),
    ("what?! ok... really!", "what ?! ok really"),
    ("<b>x</b> 北京 café 😀", "<b> x </b> 北京 café"),
    ("", ""),
  ],
)
def test_words_are_those_of_the_penn_treebank(text, expected):
  """As CoreNLP 3.4.1 divides them."""
  assert " ".join(words(text)) == expected
