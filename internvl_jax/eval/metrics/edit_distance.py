"""ANLS, the average normalized Levenshtein similarity of DocVQA and InfographicVQA (arXiv:1907.00490)."""

from collections.abc import Sequence

from internvl_jax.eval.metrics.answered import Answered

THRESHOLD = 0.5
"""Less similar answers count as wrong."""


def anls(answered: Sequence[Answered]) -> list[float]:
  """1 - edit distance / length, of the wanted answer nearest to the model's; 0 below `THRESHOLD`.

  Case and repeated white space are no difference; lengths are those of the texts as they are, as in the reference's
  eval/vqa/infographicsvqa_eval.py.
  """
  return [_similarity(one) for one in answered]


def _similarity(one: Answered) -> float:
  nearest = 1 - min(_distance(wanted, one.prediction) for wanted in one.answers)
  return nearest if nearest >= THRESHOLD else 0.0


def _distance(wanted: str, given: str) -> float:
  # Upper case may have more letters.
  length = max(len(wanted.upper()), len(given.upper()))
  return edit_distance(_plain(wanted), _plain(given)) / length if length else 0.0


def _plain(text: str) -> str:
  return " ".join(text.lower().split())


def edit_distance(a: str, b: str) -> int:
  """The Levenshtein distance: insertions, deletions and replacements of characters that make `a` of `b`."""
  row = list(range(len(a) + 1))
  for i, letter in enumerate(b, 1):
    above, row[0] = row[0], i
    for j, other in enumerate(a, 1):
      above, row[j] = row[j], min(above + (letter != other), row[j] + 1, row[j - 1] + 1)
  return row[-1]
