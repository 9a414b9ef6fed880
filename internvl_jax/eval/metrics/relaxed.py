"""Relaxed accuracy of ChartQA (arXiv:2203.10244): numbers may be 5 % apart."""

from collections.abc import Sequence

from internvl_jax.eval.metrics.answered import Answered

TOLERANCE = 0.05


def relaxed_accuracy(answered: Sequence[Answered]) -> list[float]:
  """1 where the answer and a wanted number differ by at most 5 %, or where it is a wanted text apart from case.

  A percentage is a number by the hundred. The share is one of the model's answer, not of the wanted number as ChartQA
  defines it, and an answer of 0 is compared as a text: so does the reference's eval/vqa/evaluate_vqa.py, whose published
  numbers are made so.
  """
  return [float(any(_is_right(wanted, one.prediction) for wanted in one.answers)) for one in answered]


def _is_right(wanted: str, given: str) -> bool:
  number, target = _number(given), _number(wanted)
  if target is None or not number:
    return given.lower() == wanted.lower()
  return abs(number - target) / abs(number) <= TOLERANCE


def _number(text: str) -> float | None:
  try:
    return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
  except ValueError:
    return None
