"""The step beside PyTorch's: the comparison by arithmetic, and both sides at a toy size."""

import pathlib

import pytest

from tests.support.scripts import load

step = load(pathlib.Path(__file__).parents[2] / "benchmarks/step.py")


def timing(seconds, busy, losses=(3.0, 2.5, 2.0, 1.5)):
  return step.Timing(losses=list(losses), seconds=[9.0, 9.0, *seconds], busy=[9.0, 9.0, *busy])


def test_medians_of_ratios():
  theirs = timing([2.0, 2.0], [1.0, 1.0])
  pairs = [
    (timing([1.0, 3.0], [0.5, 0.5]), theirs),
    (timing([1.0, 1.0], [0.9, 0.9]), theirs),
    (timing([4.0, 4.0], [0.7, 0.7], losses=(3.0, 2.5, 2.25, 1.5)), theirs),
  ]
  found = step.compare(pairs)
  assert found == {
    "ratio": 1.0,
    "busy_ratio": 0.7,
    "ours": 2.0,
    "torch": 2.0,
    "first": 9.0,
    "difference": 0.25,
  }


@pytest.mark.torch
def test_losses_agree_at_a_toy_size(tmp_path):
  pytest.importorskip("torch")
  step.make(tmp_path, "toy")
  found = step.measure(tmp_path, pairs=1, steps=3, cores=1)
  assert found["difference"] <= step.LARGEST_DIFFERENCE
  assert found["ratio"] > 0 and found["busy_ratio"] > 0
