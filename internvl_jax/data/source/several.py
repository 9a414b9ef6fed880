"""Several annotation files as one: shards by a pattern, one after the other."""

import bisect
import hashlib
import threading
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from internvl_jax.data.source.interface import Records
from internvl_jax.data.where import Where

# Files that are open at a time: a system's limit may be 1024 for all of a process.
_OPEN = 64


class SeveralFiles:
  """The records of several files, in order; see `Records`. Errors name the file that a record is in.

  Attributes:
    path: the pattern.
    dataset: the name that errors use.
    parts: the files' records.
    state: of all files.
  """

  def __init__(self, path: str, dataset: str, parts: Sequence[Records]):
    """Joins files that are open.

    Args:
      path: the pattern that names them.
      dataset: the name that errors use.
      parts: the files' records.
    """
    self.path, self.dataset, self.parts = path, dataset, list(parts)
    self._ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64).tolist()
    states = [part.state for part in self.parts]
    self.state = (sum(size for size, _ in states), zlib.crc32(repr(states).encode()))
    self._begin()
    for part in self.parts:
      part.close()

  def _begin(self) -> None:
    self._lock = threading.Lock()
    self._used: dict[int, None] = {}  # ends with what was used last

  @property
  def kind(self) -> str:
    """The kind of the files, as the log calls it, and how many there are."""
    return f"{len(self.parts)} x {self.parts[0].kind}"

  def __len__(self) -> int:
    return self._ends[-1]

  def _locate(self, index: int) -> tuple[int, int]:
    """The number of the file that a record is in, and of the record there."""
    part = bisect.bisect_right(self._ends, index)
    return part, index - (self._ends[part - 1] if part else 0)

  def _use(self, number: int) -> Records:
    """A file that will be read, of which a few stay open."""
    with self._lock:
      self._used.pop(number, None)
      self._used[number] = None
      while len(self._used) > _OPEN:
        oldest = next(iter(self._used))
        del self._used[oldest]
        self.parts[oldest].release()
    return self.parts[number]

  def read(self, index: int) -> Any:
    """Reads a record."""
    part, inside = self._locate(index)
    return self._use(part).read(inside)

  def where(self, index: int) -> Where:
    """The place of a record, in its file."""
    part, inside = self._locate(index)
    return self.parts[part].where(inside)

  def _ranges(self, start: int, stop: int) -> Iterator[tuple[Records, int, int]]:
    """Yields the files of some records, with the range in each."""
    while start < stop:
      part, inside = self._locate(start)
      count = min(stop, self._ends[part]) - start
      yield self._use(part), inside, inside + count
      start += count

  def containing(self, text: bytes) -> Iterator[int]:
    """Yields, ascending, the records whose bytes contain a text; others may be among them."""
    firsts = [0, *self._ends[:-1]]
    for first, number in zip(firsts, range(len(self.parts)), strict=True):
      for inside in self._use(number).containing(text):
        yield first + inside

  def checksum(self, start: int, stop: int) -> int:
    """A number, never 0, that differs when the records from `start` to before `stop` do."""
    sums = [part.checksum(first, last) for part, first, last in self._ranges(start, stop)]
    return sums[0] if len(sums) == 1 else max(1, zlib.crc32(repr(sums).encode()))

  def digest_records(self, start: int, stop: int) -> str:
    """16 hexadecimal digits that tell the records from `start` to before `stop` from any others."""
    found = [part.digest_records(first, last) for part, first, last in self._ranges(start, stop)]
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()[:16]

  def digest(self) -> str:
    """The SHA-256, in hex, of those of the files."""
    return hashlib.sha256("".join(part.digest() for part in self.parts).encode()).hexdigest()

  def stamp(self) -> tuple[str, int, int, int, int]:
    """A stamp of all files, which changes whenever one is written to, put back or replaced."""
    stamps = [part.stamp() for part in self.parts]
    names = zlib.crc32(repr([(path, inode) for path, inode, *_ in stamps]).encode())
    sizes, *dates = zip(*(stamp[2:] for stamp in stamps), strict=True)
    return self.path, names, sum(sizes), max(dates[0]), max(dates[1])

  def check_unchanged(self) -> None:
    """Raises DataError where a file is not what it was when it was opened."""
    for part in self.parts:
      part.check_unchanged()

  def close(self) -> None:
    """Closes the files; the next read opens them again."""
    for part in self.parts:
      part.close()

  def release(self) -> None:
    """Lets all files go."""
    for part in self.parts:
      part.release()

  def __getstate__(self) -> dict[str, Any]:
    return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_used")}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._begin()
