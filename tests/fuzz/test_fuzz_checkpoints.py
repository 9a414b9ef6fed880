"""Folders of checkpoints with odd values end in a model or in words, before anything heavy."""

import functools
import shutil

import pytest

from tests.fuzz import checkpoints, judge


@pytest.mark.parametrize("count", [16, pytest.param(300, marks=pytest.mark.slow)])
def test_checkpoints(tmp_path, inputs, count):
  originals = checkpoints.folders()
  failures = []
  for number, rng in inputs("checkpoints", count):
    folder = tmp_path / str(number)
    done = checkpoints.write(folder, rng, originals)
    if error := judge.ends_well(functools.partial(checkpoints.open_all, folder)):
      failures.append(judge.Failure(number, " ".join(done), error))
    shutil.rmtree(folder)
  assert not failures, judge.report(failures)
