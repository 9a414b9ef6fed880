"""Memory for the tiles of a micro-batch, to which each is written once, also by another process.

Memory that is new costs more than what is written to it: the system finds, clears and maps every page when it is first
touched. So both here and in the workers memory is used again: by `keep_freed_memory`, and by `SharedSlots`.
"""

import dataclasses
import fcntl
import math
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Self

import numpy as np

_NAME = "internvl_jax_tiles"

Allocate = Callable[[tuple[int, ...]], np.ndarray]
"""A uint8 array of a shape, with any content."""


class TilePool:
  """Tiles end to end, as a micro-batch has them: whoever makes tiles takes a view and writes them there.

  Room that is never used costs nothing: the system gives memory when it is first written to.

  Attributes:
    tiles: uint8 [used or more, side, side, 3]: the tiles so far, then unused memory.
    used: tiles so far.
    allocated: they are in the memory that `allocate` made.
  """

  def __init__(self, side: int, capacity: int = 0, allocate: Allocate | None = None):
    """Allocates memory for `capacity` tiles when the first is taken; beyond them, or without a capacity, it grows.

    Args:
      side: of a tile, in pixels.
      capacity: tiles.
      allocate: makes the memory for `capacity` tiles; None: private memory. What grows is always private.
    """
    self._tile, self._capacity = (side, side, 3), capacity
    self._allocate = allocate or _private
    self.tiles = np.empty((0, *self._tile), np.uint8)
    self.used, self.allocated = 0, False

  def take(self, count: int) -> np.ndarray:
    """Computes uint8 [count, side, side, 3] to write the next tiles to, at once: when it grows, the memory is another."""
    end = self.used + count
    if end > len(self.tiles):
      self._make_room(end)
    room = self.tiles[self.used : end]
    self.used = end
    return room

  def since(self, start: int) -> np.ndarray:
    """Computes uint8 [used - start, side, side, 3]: the tiles from number `start` on."""
    return self.tiles[start : self.used]

  def rewind(self, start: int) -> None:
    """Forgets the tiles from number `start` on."""
    self.used = start

  def _make_room(self, needed: int) -> None:
    if needed <= self._capacity and not len(self.tiles):
      self.tiles, self.allocated = self._allocate((self._capacity, *self._tile)), True
      return
    old = self.tiles[: self.used]
    # Twice as much, so that each tile is moved a bounded number of times.
    self.tiles, self.allocated = _private((max(needed, 2 * len(old)), *self._tile)), False
    self.tiles[: len(old)] = old


def _private(shape: tuple[int, ...]) -> np.ndarray:
  return np.empty(shape, np.uint8)


def keep_freed_memory() -> None:
  """Lets this process keep the memory of an image for the next one.

  The C library of Linux gives large blocks back to the system at once, until it has seen one freed that is larger: up
  to 32 MB. So one of 31 is freed here, untouched. Elsewhere this does nothing.
  """
  np.empty(31 << 20, np.uint8)


@dataclasses.dataclass(frozen=True, slots=True)
class SharedTiles:
  """Names tiles in a slot: what travels between processes in their place."""

  slot: int
  shape: tuple[int, ...]


class SharedSlots:
  """Slots of memory that worker processes write to and the process that made them reads, used over and over.

  Picklable, while the process that made it lives and has not closed it. It has no name that could outlive a killed
  process, and no part in /dev/shm, which is small in a container.
  """

  def __init__(self, descriptor: int, count: int, slot_bytes: int):
    """Maps the memory behind a file descriptor; see `create`."""
    self._descriptor, self._count, self._slot_bytes = descriptor, count, slot_bytes
    self._memory = mmap.mmap(descriptor, 0)
    # A byte for each slot, at the very beginning: 1 from when a worker claims it until its reader lets it go.
    self._taken = np.frombuffer(self._memory, np.uint8, count)
    self._lock = threading.Lock()
    self._close = weakref.finalize(self, os.close, descriptor)

  @classmethod
  def create(cls, count: int, slot_bytes: int) -> Self | None:
    """Makes slots of so many bytes; None where the system cannot."""
    if not hasattr(os, "memfd_create"):
      return None
    try:
      descriptor = os.memfd_create(_NAME)
    except OSError:
      return None
    os.ftruncate(descriptor, _pages(count) + count * _pages(slot_bytes))
    return cls(descriptor, count, slot_bytes)

  def __reduce__(self) -> tuple[Any, ...]:
    place = (os.getpid(), self._descriptor, os.fstat(self._descriptor).st_ino)
    return _attached, (place, self._count, self._slot_bytes)

  def claim(self) -> int | None:
    """A free slot, now taken; None if there is none."""
    with self._lock:  # Between threads; what follows is between processes.
      fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1)
      try:
        # The lowest, so that slots which are not needed are never touched.
        slot = int(self._taken.argmin())
        if self._taken[slot]:
          return None
        self._taken[slot] = 1
        return slot
      finally:
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1)

  def release(self, slot: int) -> None:
    """Frees a slot."""
    self._taken[slot] = 0

  def array(self, slot: int, shape: tuple[int, ...]) -> np.ndarray:
    """Computes uint8 of a shape at the beginning of a slot; all views of it keep it alive."""
    start = _pages(self._count) + slot * _pages(self._slot_bytes)
    # Its base is not an array, so that numpy makes it the base of all its views.
    whole = np.frombuffer(self._memory, np.uint8, math.prod(shape), start)
    return whole.reshape(shape)

  def open(self, tiles: SharedTiles) -> np.ndarray:
    """The tiles of a slot, which is free again when neither this array nor any view of it is left."""
    array = self.array(tiles.slot, tiles.shape)
    weakref.finalize(array.base, self.release, tiles.slot).atexit = False
    return array

  def close(self) -> None:
    """Ends its use by other processes. Tiles that are still read stay."""
    self._close()


def _attached(place: tuple[int, int, int], count: int, slot_bytes: int) -> SharedSlots | None:
  """Another process's slots; None where that is not allowed, or where they were closed meanwhile."""
  process, descriptor, inode = place
  try:
    own = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR)
  except OSError:
    return None
  # The number may be another file's by now.
  if os.fstat(own).st_ino != inode or _NAME not in os.readlink(f"/proc/self/fd/{own}"):
    os.close(own)
    return None
  return SharedSlots(own, count, slot_bytes)


def _pages(size: int) -> int:
  """The bytes of whole pages that hold so many bytes."""
  return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
