"""Accuracy: the answer is one that is wanted, to the letter, apart from case, or as a part of what the model says."""

from collections.abc import Sequence

from internvl_jax.eval.metrics.answered import Answered


def accuracy(answered: Sequence[Answered]) -> list[float]:
  """1 where the answer is that of the line's last turn to the letter, white space around both apart; the case counts.

  What the turn's tokens give back is accepted as well: a model cannot answer otherwise.
  """
  return [
    float(one.prediction in [text.strip() for text in one.spellings or one.answers]) for one in answered
  ]


def exact_match(answered: Sequence[Answered]) -> list[float]:
  """1 where the answer is a wanted one, white space around both and the case apart.

  As the reference scores OCR-VQA and AI2D (`evaluate_exact_match_accuracy` of its eval/vqa/evaluate_vqa.py).
  """
  return [float(one.prediction.lower() in [text.strip().lower() for text in one.answers]) for one in answered]


def contains(answered: Sequence[Answered]) -> list[float]:
  """1 where the model's answer has a wanted one in it, the case and line breaks apart.

  As OCRBench counts (arXiv:2305.07895), formulas apart, which it compares without any white space.
  """
  return [
    float(any(_one_line(text) in _one_line(one.prediction) for text in one.answers)) for one in answered
  ]


def _one_line(text: str) -> str:
  return text.lower().strip().replace("\n", " ")
