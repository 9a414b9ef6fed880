"""What a run holds does not grow with its steps."""

import sys

import pytest

from tests.support.toy import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import memory


def test_growth_is_told_by_the_second_quarter_and_the_last():
  found = [memory.Usage(100 * i, 500 + min(i, 3) + i, 90, 70, 60 + i % 2, 3, 4, 5) for i in range(1, 9)]
  grown = memory.growth(found)
  assert grown["main_mib"] == 4 and grown["workers_mib"] == grown["descriptors"] == 0


@pytest.mark.slow
def test_two_hundred_steps_with_workers_hold_no_more_at_their_end(tmp_path, monkeypatch):
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
  arguments = [*memory.toy(tmp_path), "--config.training.save_strategy=no"]
  found = list(memory.watched(arguments, steps=200, every=10, workers=2))
  assert [one.step for one in found] == list(range(10, 210, 10))
  # The last one may see the run end. In its first few hundred steps a run fills its heap once (2.4 MiB were seen).
  grown = memory.growth(found[:-1])
  assert grown["main_mib"] < 4 and grown["workers_mib"] < 2, grown
  for name in ("descriptors", "threads", "processes", "shared"):
    assert grown[name] <= 1, grown
  assert found[5].processes >= 3
