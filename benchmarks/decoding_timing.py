"""Times answers: what both sides of `benchmarks/decoding.py` share."""

import json
import time
from collections.abc import Callable

IMAGE_TOKEN = 8000
"""The token in whose places features are put, in `step_torch.make`'s batch."""


def time_answers(answer: Callable[[int], list[list[int]]], tokens: int, repeats: int) -> None:
  """Answers prompts and prints a line of JSON, see `benchmarks.decoding.Timing`.

  Args:
    answer: gives so many tokens for each prompt.
    tokens: of the long answers; short ones have one, which is what the prompts cost.
    repeats: timed answers of either length, after one of each that is not.
  """
  short, long = [], []
  start = time.perf_counter()
  found = answer(tokens)
  first = time.perf_counter() - start
  answer(1)
  for _ in range(repeats):
    for length, seconds in ((1, short), (tokens, long)):
      start = time.perf_counter()
      answer(length)
      seconds.append(time.perf_counter() - start)
  print(json.dumps({"tokens": found, "first": first, "short": short, "long": long}))
