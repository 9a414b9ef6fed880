"""How many samples have how many tokens and tiles, from the index of sizes."""

from typing import Any

import numpy as np

from internvl_jax.data.load.inspection import DatasetReport, examine
from internvl_jax.data.load.mixture import Mixture

_STEPS = 4
"""Bins of tokens to a doubling."""


def size_counts(mixture: Mixture) -> list[dict[str, Any]]:
  """For each dataset of a mixture whose sizes are indexed: what its lines are, as JSON values.

  `tokens` are pairs [first number of tokens of a bin, lines in it], bins being a quarter of a doubling wide; `tiles` are
  pairs [tiles, lines]; `examples` are reasons why lines are lost.
  """
  return [_counts(report) for report in examine(mixture)]


def _counts(report: DatasetReport) -> dict[str, Any]:
  bins = np.floor(_STEPS * np.log2(np.maximum(report.tokens, 1))).astype(np.int64)
  tokens = [[int(np.ceil(2 ** (bin_ / _STEPS))), count] for bin_, count in _counted(bins)]
  return {
    "name": report.name,
    "lines": report.lines,
    "samples": report.samples,
    "unreadable": report.unreadable,
    "over_long": report.over_long,
    "fully_masked": report.masked,
    "shortened": report.shortened,
    "split": report.split,
    "tokens": tokens,
    "tiles": _counted(report.tiles.astype(np.int64)),
    "examples": report.examples,
  }


def _counted(values: np.ndarray) -> list[list[int]]:
  """Each value that is there, and how often."""
  found, counts = np.unique(values, return_counts=True)
  return [[int(value), int(count)] for value, count in zip(found, counts, strict=True)]
