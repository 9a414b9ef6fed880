"""Even loads: the samples of an optimizer step dealt to its devices by length, under `training.group_by_length`."""

import dataclasses
import heapq
from collections.abc import Callable

import numpy as np

from internvl_jax.data.schedule.order import Order, Places

LengthOf = Callable[[np.ndarray], np.ndarray]
"""Samples of the mixture, int64 [n], to how long they are, int64 [n] from 0."""


@dataclasses.dataclass(frozen=True, slots=True)
class GroupedOrder:
  """An order with the samples of each optimizer step rearranged, so that its devices get nearly equal lengths.

  A step sees the very samples that it would see without grouping; one that reaches over the end of an epoch mixes
  those of both. Within the step, place ((a * shards + d) * rows_per_shard + r) is row r of device d in micro-batch a.
  For rows of one sample: packed rows are even already, and are not cut from the stream step by step.

  Attributes:
    order: the samples.
    length_of: their lengths; picklable, because worker processes get a copy.
    accumulation: micro-batches of a step.
    shards: devices that share a micro-batch.
    rows_per_shard: samples of a device in a micro-batch.
  """

  order: Order
  length_of: LengthOf
  accumulation: int
  shards: int
  rows_per_shard: int

  @property
  def num_samples(self) -> int:
    """Samples of an epoch."""
    return self.order.num_samples

  @property
  def seed(self) -> int:
    """Of the order; dealing is not random."""
    return self.order.seed

  @property
  def shuffle(self) -> bool:
    """Whether the order is random; steps are dealt alike."""
    return self.order.shuffle

  @property
  def step_samples(self) -> int:
    """Samples of an optimizer step."""
    return self.accumulation * self.shards * self.rows_per_shard

  def places(self, start: int, count: int) -> Places:
    """The `count` samples from place `start` of the stream on; see `at`."""
    return self.at(np.arange(start, start + count, dtype=np.int64))

  def at(self, positions: np.ndarray) -> Places:
    """The samples at these places; looks up the lengths of all samples of their steps."""
    steps, inside = np.divmod(positions, self.step_samples)
    by_step = np.argsort(steps, kind="stable")
    found, firsts = np.unique(steps[by_step], return_index=True)
    sources = np.empty_like(positions)
    for step, chosen in zip(found.tolist(), np.split(by_step, firsts)[1:], strict=True):
      sources[chosen] = self._dealt(step)[inside[chosen]]
    return self.order.at(sources)

  def checksum(self) -> int:
    """The order's own: a step sees the same samples for any lengths, and for any devices that share it."""
    return self.order.checksum()

  def _dealt(self, step: int) -> np.ndarray:
    """Computes int64 [step_samples]: the place in the order of the sample at each place of the step."""
    first = step * self.step_samples
    lengths = self.length_of(self.order.places(first, self.step_samples).indices)
    return first + deal(lengths, self.accumulation * self.shards)


def deal(lengths: np.ndarray, chunks: int) -> np.ndarray:
  """Deals samples to chunks of equal count and of nearly equal total length.

  From the longest on, each goes to the chunk that is shortest so far and not full. Among equal samples, and among equal
  chunks, the first is taken.

  Example: of lengths [1, 5, 2, 3] two chunks get [1, 0] and [3, 2], which add up to 6 and 5.

  Args:
    lengths: int64 [n] of the samples.
    chunks: how many; divides n.

  Returns:
    int64 [n]: the samples of the first chunk, then those of the second, and so on, each with the longest first.
  """
  room = len(lengths) // chunks
  dealt: list[list[int]] = [[] for _ in range(chunks)]
  # A heap of (total length, chunk), which pairs in order are: the smallest is first.
  unfilled = [(0, chunk) for chunk in range(chunks)]
  for sample in np.argsort(-lengths, kind="stable").tolist():
    total, chunk = unfilled[0]
    dealt[chunk].append(sample)
    if len(dealt[chunk]) < room:
      heapq.heapreplace(unfilled, (total + int(lengths[sample]), chunk))
    else:
      heapq.heappop(unfilled)
  return np.array(dealt, np.int64).ravel()
