"""Memory that the tiles of a micro-batch are written to, each once."""

from collections.abc import Callable, Sequence

import numpy as np

Allocate = Callable[[tuple[int, ...]], np.ndarray]
"""Returns a uint8 array of a shape, with any content."""


class TilePool:
  """Tiles end to end, as a micro-batch has them: whoever makes tiles asks for room and writes them there.

  Room that is never used costs nothing: the system gives memory when it is first written to.

  Attributes:
    used: tiles so far.
  """

  def __init__(self, side: int, capacity: int = 0, allocate: Allocate | None = None):
    """Allocates room for `capacity` tiles when the first is asked for; beyond them, or without one, room grows.

    Args:
      side: of a tile, in pixels.
      capacity: tiles.
      allocate: makes the room for `capacity` tiles; None: private memory. What grows is always private.
    """
    self._tile, self._capacity = (side, side, 3), capacity
    self._allocate = allocate or _private
    self._tiles = np.empty((0, *self._tile), np.uint8)
    self.used = 0

  def take(self, count: int) -> np.ndarray:
    """Returns uint8 [count, side, side, 3] to write the next tiles to, at once: room that grows is another."""
    end = self.used + count
    if end > len(self._tiles):
      self._make_room(end)
    room = self._tiles[self.used : end]
    self.used = end
    return room

  def since(self, start: int) -> np.ndarray:
    """Returns uint8 [used - start, side, side, 3]: the tiles from number `start` on."""
    return self._tiles[start : self.used]

  def rewind(self, start: int) -> None:
    """Forgets the tiles from number `start` on."""
    self.used = start

  def _make_room(self, needed: int) -> None:
    if needed <= self._capacity and not len(self._tiles):
      self._tiles = self._allocate((self._capacity, *self._tile))
      return
    old = self._tiles[: self.used]
    # Twice as much, so that each tile is moved a bounded number of times.
    self._tiles = _private((max(needed, 2 * len(old)), *self._tile))
    self._tiles[: len(old)] = old


def _private(shape: Sequence[int]) -> np.ndarray:
  return np.empty(shape, np.uint8)
