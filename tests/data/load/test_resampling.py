"""Datasets in proportion to the square root of their sizes, each run through evenly."""

import numpy as np
import pytest

from internvl_jax.data.schedule.order import ResampledOrder
from tests.data.load.test_loader import all_batches, make_loader
from tests.support.data_toys import write_dataset

SIZES = (900, 100, 25)


def test_shares_follow_the_square_root():
  plan = ResampledOrder(SIZES, 1, True)
  assert plan.num_samples == 1025 and plan.shares.sum() == 1025
  np.testing.assert_allclose(plan.shares, 1025 * np.array([30, 10, 5]) / 45, atol=1)
  assert ResampledOrder((7,), 1, True).shares.tolist() == [7]


def test_what_rounding_leaves_over_goes_to_those_that_lost_most():
  """The exact shares are beside each."""
  assert ResampledOrder((6, 2, 1), 1, True).shares.tolist() == [4, 3, 2]  # 4.53, 2.62, 1.85
  assert ResampledOrder((8, 1), 1, True).shares.tolist() == [7, 2]  # 6.65, 2.35
  assert ResampledOrder((100, 9, 4), 1, True).shares.tolist() == [75, 23, 15]  # 75.33, 22.60, 15.07
  assert ResampledOrder((4, 4, 2, 2, 1), 1, True).shares.tolist() == [3, 3, 3, 2, 2]  # 3.32, 2.35, 1.66


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_dataset_is_run_through_before_it_begins_again(shuffle):
  plan = ResampledOrder(SIZES, 1, shuffle)
  places = plan.places(0, 10 * 1025)
  firsts = np.concatenate([[0], np.cumsum(SIZES)])
  for dataset, size in enumerate(SIZES):
    inside = (places.indices >= firsts[dataset]) & (places.indices < firsts[dataset + 1])
    seen = np.bincount(places.indices[inside] - firsts[dataset], minlength=size)
    assert inside.sum() == 10 * plan.shares[dataset]
    assert seen.max() - seen.min() <= 1
    # The pass tells two views of a sample apart.
    views = set(zip(places.epochs[inside].tolist(), places.indices[inside].tolist(), strict=True))
    assert len(views) == inside.sum()
  if not shuffle:
    assert places.indices[: plan.shares[0]].tolist() == list(range(plan.shares[0]))


def test_any_place_is_found_without_those_before_it():
  plan = ResampledOrder(SIZES, 3, True)
  whole, part = plan.places(0, 3000), plan.places(1700, 300)
  np.testing.assert_array_equal(whole.indices[1700:2000], part.indices)
  np.testing.assert_array_equal(whole.epochs[1700:2000], part.epochs)
  assert plan.checksum() != ResampledOrder(SIZES, 4, True).checksum()


def test_the_loader_takes_it(tokenizer, tmp_path):
  write_dataset(tmp_path, 16, name="large")
  meta = write_dataset(tmp_path, 4, name="small")
  loader = make_loader(meta, tokenizer, data={"use_data_resampling": True}, max_steps=-1, num_train_epochs=1)
  assert loader.total_steps == 5
  all_batches(loader)
  counts = {name: counters["samples"] for name, counters in loader.counters().items()}
  assert sum(counts.values()) == 20 and abs(counts["small"] - 20 / 3) <= 1
