"""Orders of the samples: drawn with replacement, and dealt evenly to the devices of a step."""

import pickle

import numpy as np
import pytest

from internvl_jax.data.schedule import packing
from internvl_jax.data.schedule.grouping import GroupedOrder, deal
from internvl_jax.data.schedule.order import DrawnOrder, EpochOrder, Order, Places, ResampledOrder
from internvl_jax.data.schedule.packed_rows import RowStream

SIZES = (900, 100, 0, 25)


class Lengths:
  """Lengths by index: long-tailed as those of real data, or of few values, so that many are equal."""

  def __init__(self, count: int, *, few: bool = False, seed: int = 0):
    rng = np.random.default_rng(seed)
    tail = np.minimum(rng.lognormal(6.5, 1, count), 8192).astype(np.int64)
    self.by_index = rng.integers(0, 4, count) if few else tail
    self.asked = 0

  def __call__(self, indices):
    self.asked += len(indices)
    return self.by_index[indices]


def orders() -> dict[str, Order]:
  lengths = Lengths(1025)
  return {
    "plan": EpochOrder(1025, 3, True),
    "in_order": EpochOrder(1025, 3, False),
    "resampled": ResampledOrder((900, 100, 25), 3, True),
    "drawn": DrawnOrder(SIZES, 3),
    "drawn_by_root": DrawnOrder(SIZES, 3, by_root=True),
    "grouped": GroupedOrder(EpochOrder(1025, 3, True), lengths, 4, 2, 3),
    "grouped_in_order": GroupedOrder(EpochOrder(1025, 3, False), lengths, 4, 2, 3),
    "grouped_draws": GroupedOrder(DrawnOrder(SIZES, 3), lengths, 1, 8, 3),
  }


def test_shuffled_orders_differ_by_epoch_seed_and_dataset():
  """And each is a permutation; of 60 samples two agree at about one place."""
  size = 60

  def order(plan, epoch=0):
    return plan.places(epoch * plan.num_samples, plan.num_samples).indices

  found = [order(EpochOrder(size, seed, True), epoch) for seed in (3, 4) for epoch in (0, 1)]
  # Two datasets of one size, each run through in its own order.
  drawn = DrawnOrder((size, size), 3).places(0, 4 * size).indices
  found += [drawn[drawn < size][:size], drawn[drawn >= size][:size] - size]
  for number, one in enumerate(found):
    assert sorted(one) == list(range(size))
    assert all((one == other).sum() < size // 6 for other in found[:number])


def pairs(places: Places) -> list[tuple[int, int]]:
  return list(zip(places.epochs.tolist(), places.indices.tolist(), strict=True))


# --- Every order --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", orders())
def test_any_place_is_found_without_those_before_it(name):
  order = orders()[name]
  whole = pairs(order.places(0, 8 * 1025))  # more epochs than a shuffled order keeps in memory
  # The beginning, the middle of a step, over its end, over the end of an epoch, and nothing.
  for start, count in ((0, 5), (7, 10), (20, 9), (1020, 700), (2049, 1), (30, 0)):
    assert pairs(order.places(start, count)) == whole[start : start + count]
  scattered = np.random.default_rng(0).integers(0, len(whole), 3000)  # in any order, some of them twice
  assert pairs(order.at(scattered)) == [whole[place] for place in scattered.tolist()]
  assert order.num_samples == 1025 and len(set(whole)) == len(whole)


@pytest.mark.parametrize("name", orders())
def test_workers_get_the_same_order(name):
  order = orders()[name]
  copy = pickle.loads(pickle.dumps(order))
  assert pairs(copy.places(1000, 300)) == pairs(order.places(1000, 300))
  assert (copy.num_samples, copy.seed, copy.shuffle) == (1025, 3, "in_order" not in name)
  assert copy.checksum() == order.checksum()


# --- Draws with replacement ---------------------------------------------------------------------------------


def assert_as_by_chance(counts: np.ndarray, expected: np.ndarray) -> None:
  """Chi square lies within five standard deviations of its mean: below them, counts are more even than draws are."""
  freedom = counts.size - 1
  chi_square = ((counts - expected) ** 2 / expected).sum()
  assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def drawn_datasets(plan, start, count):
  return np.searchsorted(np.cumsum(plan.sizes), plan.places(start, count).indices, side="right")


@pytest.mark.parametrize("by_root", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_draws_follow_the_sizes(by_root, seed):
  sizes = np.array((90_000, 10_000, 2_500))
  weights = sizes**0.5 if by_root else sizes
  counts = np.bincount(drawn_datasets(DrawnOrder(tuple(sizes.tolist()), seed, by_root), 50_000, 100_000))
  assert_as_by_chance(counts, 100_000 * weights / weights.sum())


@pytest.mark.parametrize("lag", [1, 2, 24, 1025])
def test_draws_do_not_depend_on_each_other(lag):
  draws = drawn_datasets(DrawnOrder((3200,) * 16, 5), 0, 50_000 + lag)
  both = np.bincount(16 * draws[:-lag] + draws[lag:], minlength=256)
  assert_as_by_chance(both, np.full(256, 50_000 / 256))


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_dataset_is_run_through_before_it_begins_again(shuffle):
  plan = DrawnOrder(SIZES, 7, True, shuffle)
  places = plan.places(0, 4 * 1025)
  for first, size in ((0, 900), (900, 100), (1000, 25)):
    inside = (places.indices >= first) & (places.indices < first + size)
    assert places.epochs[inside].tolist() == sorted(places.epochs[inside])
    seen = places.indices[inside] - first
    whole = len(seen) // size * size
    assert whole and (np.sort(seen[:whole].reshape(-1, size), 1) == np.arange(size)).all()
    assert shuffle or (seen == np.arange(len(seen)) % size).all()


@pytest.mark.parametrize("others", [(9, 8), (3, 2**32 + 3), (0, 1)])
def test_seeds_draw_apart(others):
  one, other = (drawn_datasets(DrawnOrder((3200,) * 16, seed), 0, 50_000) for seed in others)
  assert_as_by_chance(np.bincount(16 * one + other, minlength=256), np.full(256, 50_000 / 256))
  assert DrawnOrder(SIZES, others[0]).checksum() != DrawnOrder(SIZES, others[1]).checksum()


def test_the_checksum_tells_sizes_apart():
  plans = (DrawnOrder((300, 20), 1), DrawnOrder((20, 300), 1), DrawnOrder((300, 20), 1, True))
  checksums = {plan.checksum() for plan in plans}
  assert len(checksums) == 3


def split_mix(key: int, place: int) -> int:
  """SplitMix64 in whole numbers of Python."""
  mask = 2**64 - 1
  z = (key + (place + 1) * 0x9E3779B97F4A7C15) & mask
  z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
  z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
  return z ^ (z >> 31)


def test_draws_are_those_of_split_mix():
  # The generator's published first numbers.
  assert [split_mix(1234567, place) for place in range(3)] == [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
  ]
  key = int(np.random.SeedSequence(11).generate_state(1, np.uint64)[0])
  places = [0, 1, 77, 1024, 10**5]
  samples = [split_mix(key, place) / 2**64 * 1025 for place in places]
  expected = [0 if sample < 900 else 1 if sample < 1000 else 3 for sample in samples]
  drawn = [int(drawn_datasets(DrawnOrder(SIZES, 11), place, 1)[0]) for place in places]
  assert drawn == expected and len(set(expected)) > 1


def test_packed_rows_take_draws():
  plan, lengths = DrawnOrder(SIZES, 3), Lengths(1025)

  def size_of(indices):
    return np.stack([lengths(indices), np.ones(len(indices), np.int64)], 1)

  settings = packing.PackSettings(max_tokens=8192, max_tiles=64, look_ahead=20)
  stream, placed = RowStream(plan, size_of, settings), []
  while len(placed) < 3 * 1025:
    placed += pairs(next(stream))
  assert set(pairs(plan.places(0, 2 * 1025))) <= set(placed) and len(placed) == len(set(placed))


# --- Even loads ---------------------------------------------------------------------------------------------


def slowly_dealt(order: Order, lengths: Lengths, accumulation: int, shards: int, rows: int, steps: int):
  """The samples of the first steps as the docstrings describe them, one at a time."""
  stream = pairs(order.places(0, steps * accumulation * shards * rows))
  out = []
  while stream:
    taken = [stream.pop(0) for _ in range(accumulation * shards * rows)]
    devices: list[list[tuple[int, int]]] = [[] for _ in range(accumulation * shards)]
    while taken:
      longest = taken[0]
      for sample in taken:
        if lengths.by_index[sample[1]] > lengths.by_index[longest[1]]:
          longest = sample
      taken.remove(longest)
      totals = [sum(lengths.by_index[index] for _, index in device) for device in devices]
      totals = [np.inf if len(d) == rows else total for d, total in zip(devices, totals, strict=True)]
      devices[totals.index(min(totals))].append(longest)
    out += [sample for device in devices for sample in device]
  return out


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("shape", [(4, 2, 3), (1, 8, 1), (2, 1, 5), (1, 1, 7), (3, 16, 2)])
def test_the_longest_goes_to_the_shortest_device_with_room(shape, shuffle, few):
  lengths, order = Lengths(200, few=few), EpochOrder(200, 5, shuffle)
  plan = GroupedOrder(order, lengths, *shape)
  expected = slowly_dealt(order, lengths, *shape, steps=9)
  assert pairs(plan.places(0, 9 * np.prod(shape))) == expected


def test_deal_by_hand():
  assert deal(np.array([1, 5, 2, 3]), 2).tolist() == [1, 0, 3, 2]
  # Equal lengths, and none at all, as of samples that cannot be read.
  assert deal(np.array([4, 4, 4, 4]), 2).tolist() == [0, 2, 1, 3]
  assert deal(np.array([0, 0, 0, 0]), 2).tolist() == [0, 1, 2, 3]
  # The shortest device is full: the next goes to another, however long that is.
  assert deal(np.array([9, 1, 1, 1, 1, 1]), 2).tolist() == [0, 4, 5, 1, 2, 3]


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_sample_is_seen_once_an_epoch(shuffle):
  plan = GroupedOrder(EpochOrder(100, 5, shuffle), Lengths(100), 4, 2, 3)
  # 25 steps of 24 samples are six epochs, and most epochs end within a step.
  seen = pairs(plan.places(0, 600))
  assert sorted(seen) == [(epoch, index) for epoch in range(6) for index in range(100)]
  assert seen != pairs(plan.order.places(0, 600))


@pytest.mark.parametrize(
  "order", [EpochOrder(1025, 3, True), ResampledOrder((900, 100, 25), 3, True), DrawnOrder(SIZES, 3)]
)
def test_a_step_sees_what_it_would_see_without_grouping(order):
  plan = GroupedOrder(order, Lengths(1025), 2, 4, 8)
  for step in range(40):
    dealt, plain = plan.places(64 * step, 64), order.places(64 * step, 64)
    assert sorted(pairs(dealt)) == sorted(pairs(plain)) and pairs(dealt) != pairs(plain)


@pytest.mark.parametrize("shuffle", [True, False])
def test_loads_are_even(shuffle):
  lengths, order = Lengths(20_000), EpochOrder(20_000, 3, shuffle)
  plan = GroupedOrder(order, lengths, 4, 8, 8)

  def totals(stream):
    return lengths(stream.places(0, 64 * 256).indices).reshape(64, 32, 8).sum(-1)

  dealt, plain = totals(plan), totals(order)
  assert (dealt.sum(1) == plain.sum(1)).all()
  assert np.median(plain.max(1) / plain.min(1)) > 3
  assert np.median(dealt.max(1) / dealt.min(1)) < 1.1
  # Even where one sample, cut at 8192, is nearly a device's share, which is 8600.
  assert (dealt.max(1) / dealt.min(1)).max() < 1.5


def test_the_longest_samples_of_a_step_are_on_different_devices():
  lengths = Lengths(1000)
  plan = GroupedOrder(EpochOrder(1000, 3, True), lengths, 2, 5, 4)
  for step in range(25):
    dealt = lengths(plan.places(40 * step, 40).indices).reshape(10, 4)
    assert sorted(dealt.max(1)) == sorted(dealt.ravel())[-10:]


def test_a_window_asks_for_the_lengths_of_its_steps_alone():
  lengths = Lengths(1000)
  plan = GroupedOrder(EpochOrder(1000, 3, True), lengths, 2, 5, 4)
  for start, count, steps in ((80, 40, 1), (85, 3, 1), (119, 2, 2), (120, 0, 0)):
    lengths.asked = 0
    plan.places(start, count)
    assert lengths.asked == 40 * steps


def test_a_run_may_go_on_with_other_lengths_and_devices():
  order = EpochOrder(1000, 3, True)
  plan = GroupedOrder(order, Lengths(1000), 2, 5, 4)
  other = GroupedOrder(order, Lengths(1000, seed=1), 4, 2, 5)
  assert plan.checksum() == other.checksum() == order.checksum()
  assert plan.checksum() != GroupedOrder(EpochOrder(1000, 4, True), plan.length_of, 2, 5, 4).checksum()
  first, second = plan.places(400, 40), other.places(400, 40)
  assert pairs(first) != pairs(second) and sorted(pairs(first)) == sorted(pairs(second))
