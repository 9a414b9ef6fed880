"""The order of the data: which sample stands at which place of the stream, decided without reading any.

The stream is endless: epoch 0, then epoch 1 and so on, each with every sample once, and batches are cut from
it across the borders of epochs. So no batch is short, and a place of the stream is all there is to resume.
"""

import dataclasses
import fractions
import functools
import math
import zlib
from typing import NamedTuple

import numpy as np


class Places(NamedTuple):
  """Samples by their places in the stream.

  Attributes:
    epochs: int64 [n], from 0.
    indices: int64 [n], index of the sample in the mixture.
  """

  epochs: np.ndarray
  indices: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
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
    """Returns the `count` samples from place `start` of the stream on."""
    return self.at(np.arange(start, start + count, dtype=np.int64))

  def at(self, positions: np.ndarray) -> Places:
    """Returns the samples at these places (int64 [n]) of the stream."""
    epochs, indices = np.divmod(positions, self.num_samples)
    if self.shuffle:
      for epoch in np.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = _permutation(self.num_samples, self.seed, int(epoch))[indices[chosen]]
    return Places(epochs, indices)

  def checksum(self) -> int:
    """Returns a number that differs when the order does, e.g. under another version of numpy's generator."""
    return zlib.crc32(self.places(0, min(self.num_samples, 1024)).indices.tobytes())


# More than one epoch, because a batch may reach over the border. 10^7 samples take 40 MB an epoch and about a
# second to shuffle, once in each process; far beyond that an index-by-index shuffle should take its place.
@functools.lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
  dtype = np.int32 if num_samples <= np.iinfo(np.int32).max else np.int64
  return np.random.default_rng((seed, epoch)).permutation(np.arange(num_samples, dtype=dtype))


def total_steps(num_samples: int, epochs: float, global_batch: int) -> int:
  """Returns how many optimizer steps see the data `epochs` times; the last may reach into the next epoch."""
  # Through the decimal text: in floating point 0.1 * 30 is above 3, and would make one step too many.
  return math.ceil(fractions.Fraction(str(epochs)) * num_samples / global_batch)
