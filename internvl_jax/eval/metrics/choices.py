"""Multiple choice: the letter that an answer chooses, by the rules of ScienceQA and of MMMU."""

import random
import re
from collections.abc import Mapping, Sequence

from internvl_jax.eval.metrics.answered import Answered

GUESS_SEED = 42
"""MMMU's code guesses where an answer names no option, by a generator of this seed."""


def choice(answered: Sequence[Answered]) -> list[float]:
  """1 where the answer begins with the right letter, or else has the right option's text in it.

  As the reference scores ScienceQA (`post_process` of its eval/scienceqa/evaluate_scienceqa.py), which has MMBench's rule
  and takes "(B)" for B, too.
  """
  return [float(chosen_letter(one.prediction, one.options()) in one.answers) for one in answered]


def chosen_letter(text: str, options: Mapping[str, str]) -> str | None:
  """The letter that an answer chooses; None or what it says instead where it chooses none."""
  if len(text) < 2:
    return text or None
  if text[0] in options:
    return text[0]
  named = [letter for letter, option in options.items() if option in text]
  if named:
    return named[0]
  if text[1] == ".":
    return text[0]
  return text[1] if text[0] == "(" and text[2:3] == ")" else text


def mmmu(answered: Sequence[Answered]) -> list[float]:
  """MMMU's accuracy (arXiv:2311.16502): of questions with options, the letter; of open ones, a text or number.

  An answer that names no option counts as one that is drawn: `GUESS_SEED` and the order of the questions fix which, as in
  the reference's eval/mmmu/eval_utils.py.
  """
  guesses = random.Random(GUESS_SEED)
  return [float(_is_right(one, guesses)) for one in answered]


def _is_right(one: Answered, guesses: random.Random) -> bool:
  if options := one.options():
    letter = _named_last(one.prediction, options)
    return (guesses.choice(list(options)) if letter is None else letter) in one.answers
  wanted = [form for text in one.answers for form in _forms(text)]
  return any(_agrees(found, wanted) for found in _found(one.prediction))


def _named_last(text: str, options: Mapping[str, str]) -> str | None:
  """The option that an answer names last: as "(B)", or else as a B by itself, or else by its text."""
  for mark in ",.!?;:'":
    text = text.strip(mark)
  text = f" {text} "
  for form in ("({})", " {} "):
    places = {letter: text.rfind(form.format(letter)) for letter in options}
    if max(places.values()) >= 0:
      return max(places, key=lambda letter: places[letter])
  if len(text.split()) <= 5:  # Too short for an option's text and something beside it.
    return None
  places = {letter: text.lower().rfind(option.lower()) for letter, option in options.items()}
  return max(places, key=lambda letter: places[letter]) if max(places.values()) >= 0 else None


# --- Open questions -----------------------------------------------------------------------------------------


Form = str | float
"""A text or a number in the form in which MMMU compares it."""

# What stands before a result, of which the rest of the line is taken.
_SIGNS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
  re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234
  re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.2e-3
  re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def _agrees(found: Form, wanted: Sequence[Form]) -> bool:
  if isinstance(found, str):
    return any(isinstance(form, str) and form in found for form in wanted)
  return found in wanted


def _found(text: str) -> list[Form]:
  """The texts and numbers that an answer gives as results."""
  text = text.strip().strip(".").lower()
  lines = text.split("\n")
  results = [_result(line, is_last=line is lines[-1]) for line in lines]
  results = [result for result in results if result and result not in list(":,.!?;'")] or [text]
  numbers = [number for result in results for form in _NUMBERS for number in form.findall(result)]
  return [form for part in (*results, *numbers) for form in _forms(part)]


def _result(line: str, *, is_last: bool) -> str:
  """The shortest text behind a sign of a result; empty where there is none."""
  shortest = ""
  for sign in (*_SIGNS, "=") if is_last else _SIGNS:
    if sign in line:
      rest = line.rpartition(sign)[2].strip()
      shortest = rest if not shortest or len(rest) < len(shortest) else shortest
  return shortest


def _forms(text: str) -> list[Form]:
  """A number, rounded to two decimals; or a text in lower case, of which a single letter must stand by itself."""
  text = text.strip()
  try:
    return [round(float(text.replace(",", "")), 2)]
  except ValueError:
    text = text.lower()
  return [f" {text}", f"{text} "] if len(text) == 1 else [text]
