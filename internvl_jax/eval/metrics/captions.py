"""Metrics of captions: CIDEr-D and ROUGE-L, of words as COCO's evaluation divides them."""

import collections
import math
from collections.abc import Iterable, Mapping, Sequence

from internvl_jax.eval.metrics.answered import Answered
from internvl_jax.eval.metrics.words import words

_LONGEST = 4  # words of an n-gram
_SIGMA = 6.0  # of the penalty for another length, in words
_BETA = 1.2  # weight of recall in ROUGE-L

_Counts = Mapping[tuple[str, ...], int]


def cider(answered: Sequence[Answered]) -> list[float]:
  """CIDEr-D (arXiv:1411.5726): similarity of n-grams that are rare in the wanted captions, times 10.

  How rare an n-gram is depends on the whole set: the score of one question by itself is 0. A caption may have several
  wanted ones. As pycocoevalcap computes it, which the reference uses.
  """
  wanted = [[_ngrams(words(text)) for text in one.answers] for one in answered]
  in_captions = collections.Counter(ngram for texts in wanted for ngram in set().union(*texts))
  rarity = _Rarity(in_captions, len(answered))
  return [
    _similarity(_ngrams(words(one.prediction)), texts, rarity)
    for one, texts in zip(answered, wanted, strict=True)
  ]


class _Rarity:
  """log(questions / questions whose captions have an n-gram)."""

  def __init__(self, in_captions: _Counts, questions: int):
    self._in_captions, self._log_of_all = in_captions, math.log(questions)

  def __call__(self, ngram: tuple[str, ...]) -> float:
    return self._log_of_all - math.log(max(1, self._in_captions.get(ngram, 0)))


def _ngrams(text: Sequence[str]) -> _Counts:
  return collections.Counter(
    tuple(text[i : i + n]) for n in range(1, _LONGEST + 1) for i in range(len(text) - n + 1)
  )


def _similarity(given: _Counts, wanted: Sequence[_Counts], rarity: _Rarity) -> float:
  total = sum(_cosines(given, text, rarity) for text in wanted)
  return 10 * total / _LONGEST / len(wanted)


def _cosines(given: _Counts, wanted: _Counts, rarity: _Rarity) -> float:
  """The sum of the cosines of n-grams of 1 to 4 words, clipped and weighted by how equal the lengths are."""
  a, b = ({ngram: count * rarity(ngram) for ngram, count in text.items()} for text in (given, wanted))
  total = 0.0
  for n in range(1, _LONGEST + 1):
    common = sum(
      min(value, b[ngram]) * b[ngram] for ngram, value in a.items() if len(ngram) == n and ngram in b
    )
    norms = _norm(a, n) * _norm(b, n)
    total += common / norms if norms else common
  # Lengths are counted in pairs of words.
  longer = _pairs(given) - _pairs(wanted)
  return total * math.exp(-(longer**2) / (2 * _SIGMA**2))


def _norm(weights: Mapping[tuple[str, ...], float], n: int) -> float:
  return math.sqrt(sum(value**2 for ngram, value in weights.items() if len(ngram) == n))


def _pairs(counts: _Counts) -> int:
  return sum(count for ngram, count in counts.items() if len(ngram) == 2)


def rouge_l(answered: Sequence[Answered]) -> list[float]:
  """ROUGE-L (Lin 2004): F-measure of the longest common subsequence of words, the best precision and recall of all wanted.

  With weight 1.2 for recall, as pycocoevalcap computes it, which the reference uses for captions.
  """
  return [_f_measure(words(one.prediction), map(words, one.answers)) for one in answered]


def _f_measure(given: Sequence[str], wanted: Iterable[Sequence[str]]) -> float:
  # Of an empty text, pycocoevalcap has one word, which is empty.
  given = given or [""]
  lengths = [(common_words(given, text or [""]), len(text) or 1) for text in wanted]
  precision = max(common for common, _ in lengths) / len(given)
  recall = max(common / length for common, length in lengths)
  if not precision or not recall:
    return 0.0
  return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def common_words(a: Sequence[str], b: Sequence[str]) -> int:
  """The length of the longest common subsequence."""
  row = [0] * (len(a) + 1)
  for word in b:
    before = 0
    for i, other in enumerate(a, 1):
      before, row[i] = row[i], before + 1 if word == other else max(row[i], row[i - 1])
  return row[-1]
