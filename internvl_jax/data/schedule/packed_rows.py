"""The rows of a packed run, in order: which samples are in each, planned from sizes alone."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from internvl_jax.data.sample.long_samples import OVER_LONG, UNREADABLE, UNSUPERVISED
from internvl_jax.data.schedule import packing
from internvl_jax.data.schedule.order import Order, Places

CHUNK = 1024
"""Places of the stream whose sizes are looked up at a time."""


class SizeOf(Protocol):
  """Sizes of samples of the mixture; `data.mixture.Mixture` has them."""

  def __call__(self, indices: np.ndarray) -> np.ndarray:
    """int64 [n, 2]: tokens and tiles, as they will be in a row.

    In place of tokens, UNREADABLE, OVER_LONG or UNSUPERVISED for what will not.
    """
    ...


class Skipped(NamedTuple):
  """Samples that were passed over because they are in no row: int64 indices in the mixture."""

  unreadable: np.ndarray
  over_long: np.ndarray
  fully_masked: np.ndarray


NONE_SKIPPED = Skipped(*(np.zeros(0, np.int64) for _ in Skipped._fields))


class RowStream:
  """An endless stream of rows: a pure function of the plan, the sizes and the budgets.

  No row holds samples of two epochs, so that each epoch has every sample once. The state is the packer's: a place
  in the stream and the samples that wait.
  """

  def __init__(
    self,
    plan: Order,
    size_of: SizeOf,
    settings: packing.PackSettings,
    state: dict[str, Any] | None = None,
    chunk: int = CHUNK,
  ):
    """Goes to the beginning, or to where `get_state` was called.

    Args:
      plan: the order of the samples.
      size_of: their sizes.
      settings: budgets; what fits no row is left out.
      state: of an earlier stream.
      chunk: places whose sizes are looked up at a time; rows do not depend on it.

    Raises:
      ValueError: the state is of other settings.
    """
    self._plan, self._size_of, self._chunk = plan, size_of, chunk
    self._packer = packing.Packer(settings)
    if state is not None:
      self._packer.set_state(state)
    self._rows: Any = iter(())

  def __next__(self) -> Places:
    """The samples of the next row, in the order of the stream."""
    while True:
      for positions in self._rows:
        return self._plan.at(np.array(positions, np.int64))
      self._rows = self._more()

  def _more(self) -> Iterator[list[int]]:
    """The rows that the next samples of the epoch decide, or the last ones of an epoch that is over."""
    position = self._packer.position
    into_epoch = position % self._plan.num_samples
    if not into_epoch and self._packer.decided < position:
      return self._packer.flush()
    count = min(self._chunk, self._plan.num_samples - into_epoch)
    return self._packer.feed(self._sizes(position, count))

  def get_state(self) -> dict[str, Any]:
    """The state that the rows to come depend on, as JSON values."""
    return self._packer.get_state()

  @property
  def decided(self) -> int:
    """The place of the stream before which every sample is in a row or passed over."""
    return self._packer.decided

  @property
  def stats(self) -> packing.PackStats:
    """How full the rows are so far."""
    return self._packer.stats

  def skipped(self, start: int, stop: int) -> Skipped:
    """Samples that were passed over between two places of the stream."""
    indices = self._plan.places(start, stop - start).indices
    tokens = self._size_of(indices)[:, 0]
    return Skipped(*(indices[tokens == why] for why in (UNREADABLE, OVER_LONG, UNSUPERVISED)))

  def _sizes(self, start: int, count: int) -> np.ndarray:
    return packable(self._size_of(self._plan.places(start, count).indices), self._packer.settings)


def packable(sizes: np.ndarray, settings: packing.PackSettings) -> np.ndarray:
  """Sizes for a packer, which leaves out what fits no row: so also what is lost already."""
  sizes = np.array(sizes, np.int64)
  sizes[sizes[:, 0] <= 0, 0] = settings.max_tokens + 1
  return sizes
