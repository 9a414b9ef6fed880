"""Decoding beside transformers': the comparison by arithmetic, and both sides at a toy size."""

import pathlib

import pytest

from tests.support.scripts import load

decoding = load(pathlib.Path(__file__).parents[2] / "benchmarks/decoding.py")


def timing(short, long, tokens=((1, 2, 3), (4, 5, 6))):
  return decoding.Timing(tokens=[list(row) for row in tokens], first=9.0, short=short, long=long)


def test_medians_of_ratios():
  theirs = timing([1.0, 1.0, 7.0], [3.0, 3.0, 7.0])
  pairs = [
    (timing([0.5], [1.5]), theirs),
    (timing([1.0], [3.0]), theirs),
    (timing([2.0], [3.0], tokens=((1, 2, 4), (4, 5, 6))), theirs),
  ]
  found = decoding.compare(pairs)
  assert {name: found[name] for name in ("prompts", "each", "all")} == {"prompts": 1, "each": 0.5, "all": 1}
  assert found["ours_each"] == 0.5 and found["torch_each"] == 1 and found["other"] == 1 / 18


@pytest.mark.slow
@pytest.mark.torch
def test_tokens_agree_at_a_toy_size(tmp_path):
  pytest.importorskip("torch")
  decoding.make(tmp_path, "toy")
  ours, theirs = (decoding.run_side(side, tmp_path, 8, 12, 1, repeats=1) for side in ("ours", "torch"))
  assert decoding.compare([(ours, theirs)])["other"] == 0
  assert len({token for row in ours.tokens for token in row}) > 20
