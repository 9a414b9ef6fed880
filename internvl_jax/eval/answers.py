"""Scoring a model's greedy answers by exact match.

"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from internvl_jax.eval.decoding import Prompt


@dataclasses.dataclass(frozen=True)
class Question:
  """A prompt, the answer wanted, and what the line of the jsonl says about it."""

  prompt: Prompt
  answer: str
  record: dict[str, Any]


def split_answer(input_ids: np.ndarray, labels: np.ndarray, ignore: int) -> np.ndarray:
  """The tokens of a supervised sample up to where its last answer begins.

  Args:
    input_ids: int [n].
    labels: int [n], `ignore` where not supervised.
    ignore: see `batch.IGNORE_INDEX`.
  """
  supervised = labels != ignore
  assert supervised.any(), "a question without an answer"
  end = np.flatnonzero(supervised)[-1] + 1
  before = np.flatnonzero(~supervised[:end])
  return input_ids[: before[-1] + 1 if len(before) else 0]


@dataclasses.dataclass(frozen=True)
class Scores:
  """Exact-match accuracy, in total and by group, and every answer given."""

  accuracy: float
  num_questions: int
  by_group: dict[str, dict[str, float | int]]
  predictions: list[dict[str, Any]]

  def summary(self) -> dict[str, Any]:
    """Everything but the single answers, for eval_results.json."""
    return {"accuracy": self.accuracy, "num_questions": self.num_questions, "by_group": self.by_group}


def score(questions: Sequence[Question], answers: Sequence[str], *, group_field: str | None) -> Scores:
  """Compares answers with what was wanted, white space around them apart.

  Args:
    questions: what was asked.
    answers: what came back, in the same order.
    group_field: entry of the records to report by, or None.
  """
  groups: dict[str, list[bool]] = collections.defaultdict(list)
  predictions, hits = [], []
  for question, answer in zip(questions, answers, strict=True):
    hit = answer.strip() == question.answer.strip()
    hits.append(hit)
    if group_field is not None:
      groups[str(question.record.get(group_field, "(none)"))].append(hit)
    predictions.append({**question.record, "prediction": answer.strip(), "answer": question.answer, "correct": hit})
  by_group = {name: {"accuracy": float(np.mean(g)), "num_questions": len(g)} for name, g in sorted(groups.items())}
  return Scores(float(np.mean(hits)), len(hits), by_group, predictions)


