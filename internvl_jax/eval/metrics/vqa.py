"""VQA accuracy: how many of ten people agree with an answer, after both are normalized.

The reference scores VQA v2, OK-VQA, TextVQA and VizWiz so (`TextVQAAccuracyEvaluator` of its eval/vqa/textvqa_eval.py).
"""

import re
from collections.abc import Sequence

from internvl_jax.eval.metrics.answered import Answered

PEOPLE = 10
"""How many answered each question of these benchmarks."""

# An answer counts in full where so many of the other people gave it.
_ENOUGH = 3

_NUMBERS = dict(
  zip(
    ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"], range(10), strict=True
  )
)
_DIGITS = {"none": "0", "ten": "10", **{word: str(value) for word, value in _NUMBERS.items()}}
_ARTICLES = frozenset(("a", "an", "the"))

_CONTRACTED = """
  ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
  how'd how'll how's I'd've isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
  o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
  someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
  they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
  where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
  y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
"""Contractions that the benchmark mends where one of their apostrophes was left out."""


def _without_one_apostrophe(form: str) -> set[str]:
  return {form[:i] + form[i + 1 :] for i, letter in enumerate(form) if letter == "'"}


# What the benchmark's own list has beside the rule.
_BESIDE = {"somebody'd": "somebodyd", "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at"}
_MENDED = {broken: form for form in _CONTRACTED.split() for broken in _without_one_apostrophe(form)} | _BESIDE

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_OF_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_FULL_STOP = re.compile(r"\.(?!\d)")
# The benchmark's code gives a flag of this value where the number of replacements stands.
_MOST_STOPS = int(re.UNICODE)


def normalized(text: str) -> str:
  """An answer in the benchmark's form: lower case, no marks and articles, numbers as digits, contractions mended.

  >>> normalized("The two dogs, isnt it?")
  "2 dogs isn't it"
  """
  text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
  text = _without_marks(text.replace("\n", " ").replace("\t", " ").strip())
  words = (_DIGITS.get(word, word) for word in text.lower().split())
  return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)


def _without_marks(text: str) -> str:
  """Takes marks out where they stand beside a space, or in a text with a number's comma; else puts a space there."""
  has_comma = _COMMA_OF_NUMBER.search(text) is not None
  found = text
  for mark in _MARKS:
    beside_space = f"{mark} " in text or f" {mark}" in text
    found = found.replace(mark, "" if beside_space or has_comma else " ")
  return _FULL_STOP.sub("", found, count=_MOST_STOPS)


def vqa_accuracy(answered: Sequence[Answered]) -> list[float]:
  """The soft accuracy of VQA: min(1, how many of the other nine gave this answer / 3), averaged over which is left out.

  One wanted answer counts as that of all ten people.
  """
  return [_agreement(one) for one in answered]


def _agreement(one: Answered) -> float:
  given = [normalized(text) for text in one.answers]
  given = given * PEOPLE if len(given) == 1 else given
  same = given.count(normalized(one.prediction))
  if not same:
    return 0.0
  # Left out is one who gave the answer, or one who did not.
  parts = [min(1.0, (same - 1) / _ENOUGH)] * same + [min(1.0, same / _ENOUGH)] * (len(given) - same)
  return sum(parts) / len(parts)
