"""The order of the data: which sample is at which place of the stream, decided without reading any.

The stream is endless: epoch 0, then epoch 1 and so on, each with every sample once, and batches are cut from
it across the borders of epochs. So no batch is short, and a place of the stream is all there is to resume.
"""

import dataclasses
import fractions
import functools
import math
import threading
import zlib
from typing import NamedTuple, Protocol

import numpy as np


class Places(NamedTuple):
  """Samples by their places in the stream.

  Attributes:
    epochs: int64 [n], from 0: how often the sample's data were run through before, or the place itself where samples
      are drawn. It seeds the augmentation, so no two places of a stream may have the same sample and the same number.
    indices: int64 [n], index of the sample in the mixture.
  """

  epochs: np.ndarray
  indices: np.ndarray


class Order(Protocol):
  """An endless stream of samples, any place of which is found without those before it.

  Pure: the same values give the same stream in every process. Picklable: worker processes get a copy.
  """

  @property
  def num_samples(self) -> int:
    """Samples of an epoch."""
    ...

  @property
  def seed(self) -> int:
    """Of all that is random."""
    ...

  @property
  def shuffle(self) -> bool:
    """Whether the order is random."""
    ...

  def places(self, start: int, count: int) -> Places:
    """The `count` samples from place `start` of the stream on."""
    ...

  def at(self, positions: np.ndarray) -> Places:
    """The samples at these places (int64 [n], in any order) of the stream."""
    ...

  def checksum(self) -> int:
    """A number that differs when an optimizer step would see other samples."""
    ...


@dataclasses.dataclass(frozen=True, slots=True)
class EpochOrder:
  """The stream of samples: a pure function of these three values.

  Attributes:
    num_samples: samples of an epoch, repeats included.
    seed: of the shuffling.
    shuffle: a new order every epoch; False keeps the order of the mixture.
  """

  num_samples: int
  seed: int
  shuffle: bool

  def places(self, start: int, count: int) -> Places:
    """The `count` samples from place `start` of the stream on."""
    return self.at(np.arange(start, start + count, dtype=np.int64))

  def at(self, positions: np.ndarray) -> Places:
    """The samples at these places (int64 [n]) of the stream."""
    epochs, indices = np.divmod(positions, self.num_samples)
    if self.shuffle:
      for epoch in np.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = _permutation(self.num_samples, self.seed, int(epoch))[indices[chosen]]
    return Places(epochs, indices)

  def checksum(self) -> int:
    """A number that differs when the order does, e.g. under another version of numpy's generator."""
    return zlib.crc32(self.places(0, min(self.num_samples, 1024)).indices.tobytes())


@dataclasses.dataclass(frozen=True, slots=True)
class ResampledOrder:
  """The stream of samples with datasets in proportion to the square root of their sizes.

  Each epoch is as long as all samples together, and gives every dataset its share of places, which run through the
  dataset over and over, each time in a new order. So no sample is seen twice before all of its dataset are seen once.

  Attributes:
    sizes: samples of each dataset, repeats included.
    seed: of the shuffling.
    shuffle: new orders all the time; False takes the datasets one after another, in their own order.
  """

  sizes: tuple[int, ...]
  seed: int
  shuffle: bool

  @property
  def num_samples(self) -> int:
    """Samples of an epoch."""
    return sum(self.sizes)

  @property
  def shares(self) -> np.ndarray:
    """int64 [datasets]: places of an epoch; they add up to `num_samples`."""
    roots = np.sqrt(np.array(self.sizes, np.float64))
    exact = self.num_samples * roots / roots.sum()
    shares = np.floor(exact).astype(np.int64)
    # What rounding down left over goes to those that lost most by it.
    order = np.argsort(shares - exact, kind="stable")
    shares[order[: self.num_samples - int(shares.sum())]] += 1
    return shares

  def places(self, start: int, count: int) -> Places:
    """The `count` samples from place `start` of the stream on; see `at`."""
    return self.at(np.arange(start, start + count, dtype=np.int64))

  def at(self, positions: np.ndarray) -> Places:
    """The samples at these places of the stream, with the pass through their dataset as the epoch."""
    shares = self.shares
    ends = np.cumsum(shares)
    places = EpochOrder(self.num_samples, self.seed, self.shuffle).at(positions)
    datasets = np.searchsorted(ends, places.indices, side="right")
    rank = places.indices - (ends - shares)[datasets]
    return _run_through(self, datasets, places.epochs * shares[datasets] + rank)

  def checksum(self) -> int:
    """A number that differs when the order does; see `EpochOrder.checksum`."""
    return zlib.crc32(self.places(0, min(self.num_samples, 1024)).indices.tobytes())


@dataclasses.dataclass(frozen=True, slots=True)
class DrawnOrder:
  """The stream of samples whose datasets are drawn with replacement: each place on its own, in proportion to the sizes.

  The places that fall to a dataset run through it over and over, each time in a new order, as the reference's do: so
  chance decides how often a dataset begins again, but not which of its samples are seen.

  Attributes:
    sizes: samples of each dataset, repeats included.
    seed: of the draws and the shuffling.
    by_root: datasets in proportion to the square root of their sizes instead of the sizes.
    shuffle: new orders all the time; False runs through every dataset in its own order.
  """

  sizes: tuple[int, ...]
  seed: int
  by_root: bool = False
  shuffle: bool = True

  @property
  def num_samples(self) -> int:
    """Draws of an epoch."""
    return sum(self.sizes)

  def places(self, start: int, count: int) -> Places:
    """The `count` samples from place `start` of the stream on; see `at`."""
    return self.at(np.arange(start, start + count, dtype=np.int64))

  def at(self, positions: np.ndarray) -> Places:
    """The samples at these places of the stream, with the pass through their dataset as the epoch."""
    epochs, inside = np.divmod(positions, self.num_samples)
    datasets, turns = np.zeros_like(inside), np.zeros_like(inside)
    for epoch in np.unique(epochs).tolist():
      chosen = epochs == epoch
      drawn, ranks = _draws(self, epoch)
      before = sum((_counts(self, past) for past in range(epoch)), np.zeros(len(self.sizes), np.int64))
      datasets[chosen] = drawn[inside[chosen]]
      turns[chosen] = before[datasets[chosen]] + ranks[inside[chosen]]
    return _run_through(self, datasets, turns)

  def checksum(self) -> int:
    """A number that differs when the draws do."""
    return zlib.crc32(self.places(0, min(self.num_samples, 1024)).indices.tobytes())


def _run_through(plan: ResampledOrder | DrawnOrder, datasets: np.ndarray, turns: np.ndarray) -> Places:
  """The sample at each turn of its dataset, with the pass through that as the epoch.

  Args:
    plan: the sizes of the datasets, and the seed.
    datasets: int64 [n].
    turns: int64 [n], counted from 0 over all passes.
  """
  firsts = np.concatenate([[0], np.cumsum(plan.sizes)])
  passes, indices = np.zeros_like(turns), np.zeros_like(turns)
  for dataset in np.unique(datasets).tolist():
    chosen = datasets == dataset
    # Every dataset is a stream of its own, with a seed of its own.
    inner = EpochOrder(plan.sizes[dataset], hash_seed(plan.seed, dataset), plan.shuffle).at(turns[chosen])
    passes[chosen], indices[chosen] = inner.epochs, firsts[dataset] + inner.indices
  return Places(passes, indices)


# 10^7 draws take 60 MB an epoch and 2 s, once in each process.
@functools.lru_cache(maxsize=2)
def _draws(plan: DrawnOrder, epoch: int) -> tuple[np.ndarray, np.ndarray]:
  """The dataset of each place of an epoch, and how many places of the epoch before it fell to the same."""
  sizes = np.array(plan.sizes, np.int64)
  ends = np.cumsum(np.sqrt(sizes) if plan.by_root else sizes.astype(np.float64))
  key = np.random.SeedSequence(plan.seed).generate_state(1, np.uint64)[0]
  places = np.arange(epoch * plan.num_samples, (epoch + 1) * plan.num_samples)
  # The last end is exactly 1, which no draw reaches.
  datasets = np.searchsorted(ends / ends[-1], _uniform(key, places), side="right")
  datasets = datasets.astype(np.int16 if len(sizes) <= np.iinfo(np.int16).max else np.int32)
  by_dataset = np.argsort(datasets, kind="stable")
  counts = np.bincount(datasets, minlength=len(sizes))
  ranks = np.empty(len(datasets), np.int32)
  ranks[by_dataset] = np.arange(len(datasets)) - np.repeat(np.cumsum(counts) - counts, counts)
  return datasets, ranks


@functools.lru_cache(maxsize=1024)
def _counts(plan: DrawnOrder, epoch: int) -> np.ndarray:
  """Computes int64 [datasets]: the places of an epoch that fall to each."""
  return np.bincount(_draws(plan, epoch)[0], minlength=len(plan.sizes))


def _uniform(key: np.uint64, places: np.ndarray) -> np.ndarray:
  """Computes float64 [n] in [0, 1): what SplitMix64 seeded with the key gives at these places of its stream.

  Its state is a counter (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014), so that no place
  needs those before it; numpy's generators would have to be set up anew for each. Arrays of uint64 wrap around.
  """
  state = key + (places.astype(np.uint64) + 1) * 0x9E3779B97F4A7C15
  state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
  state = (state ^ (state >> 27)) * 0x94D049BB133111EB
  return ((state ^ (state >> 31)) >> 11) * 2.0**-53


def hash_seed(seed: int, dataset: int) -> int:
  """A seed that differs from dataset to dataset."""
  return zlib.crc32(f"{seed} {dataset}".encode())


# Orders in use: of each stream the last few epochs, because a batch may reach over the border. 10^7 samples take
# 40 MB an epoch and about a second to shuffle, once in each process; far beyond that an index-by-index shuffle should
# take its place.
_EPOCHS_KEPT = 3
_orders: dict[tuple[int, int], dict[int, np.ndarray]] = {}
_orders_lock = threading.Lock()


def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
  with _orders_lock:
    kept = _orders.setdefault((num_samples, seed), {})
    # What is used last is last, and what was used longest ago is dropped.
    order = kept.pop(epoch, None)
    kept[epoch] = _shuffled(num_samples, seed, epoch) if order is None else order
    while len(kept) > _EPOCHS_KEPT:
      del kept[next(iter(kept))]
    return kept[epoch]


def _shuffled(num_samples: int, seed: int, epoch: int) -> np.ndarray:
  dtype = np.int32 if num_samples <= np.iinfo(np.int32).max else np.int64
  return np.random.default_rng((seed, epoch)).permutation(np.arange(num_samples, dtype=dtype))


def total_steps(num_samples: int, epochs: float, global_batch: int) -> int:
  """How many optimizer steps see the data `epochs` times; the last may reach into the next epoch."""
  # Through the decimal text: in floating point 0.1 * 30 is above 3, and would make one step too many.
  return math.ceil(fractions.Fraction(str(epochs)) * num_samples / global_batch)
