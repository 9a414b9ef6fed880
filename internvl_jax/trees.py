"""Parameters by path: the one place that answers "which parameters?".

A model's parameters travel as a flat dictionary from dotted path to array, in which a stack of layers holds
its range in its path and the layers along its arrays' first axis:

    {"vision_model.encoder.layers.0:24.attn.qkv.kernel": [24, 1024, 3072], ...}

Freezing, weight decay, LoRA targets and partial loading are questions about paths, and all of them are asked
with ordered regular expressions through `first_match` and `select`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

LAYER_RANGE = re.compile(r"\.layers\.(\d+):(\d+)\.")
"""Finds the range of layers in the path of a stacked parameter."""


def first_match(patterns: Sequence[tuple[str, T]], paths: Iterable[str]) -> dict[str, T]:
  """Gives every path the value of the first pattern that matches it from end to end.

  Args:
    patterns: (regular expression, value) pairs, in order of precedence.
    paths: the paths to label.

  Raises:
    ValueError: a path that no pattern matches, or a pattern that matches no path (a typo would otherwise
      pass unseen). A pattern whose paths were all taken by earlier ones does match.
  """
  compiled = [(re.compile(pattern), value) for pattern, value in patterns]
  paths = list(paths)
  labels: dict[str, T] = {}
  for path in paths:
    for pattern, value in compiled:
      if pattern.fullmatch(path):
        labels[path] = value
        break
    else:
      raise ValueError(f"no pattern of {[p for p, _ in patterns]} matches the parameter {path!r}")
  for pattern, _ in compiled:
    if not any(pattern.fullmatch(path) for path in paths):
      raise ValueError(f"the pattern {pattern.pattern!r} matches no parameter")
  return labels


def select(tree: Mapping[str, T], paths: Iterable[str]) -> dict[str, T]:
  """The entries of `tree` at `paths`, in the tree's own order."""
  wanted = set(paths)
  return {path: leaf for path, leaf in tree.items() if path in wanted}


def count(tree: Mapping[str, Any]) -> int:
  """Number of scalars in a flat tree of arrays or shapes."""
  return sum(leaf.size for leaf in tree.values())


def submodule_of(path: str) -> str:
  """Which of the model's parts a parameter belongs to: vision_model, mlp1, language_model, or one of `flash.PARTS`."""
  return path.split(".", 1)[0]


def layers_with(paths: Iterable[str], submodule: str, depth: int) -> list[bool]:
  """Whether each of a submodule's `depth` layers has parameters at `paths`."""
  spans = [LAYER_RANGE.search(path) for path in paths if submodule_of(path) == submodule]
  held = {i for span in spans if span for i in range(int(span[1]), int(span[2]))}
  return [i in held for i in range(depth)]
