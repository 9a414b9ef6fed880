"""Records that are ranges of bytes of one file: where they are is kept in memory or in a cache, their content is not."""

import hashlib
import mmap
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from internvl_jax.data.source import files
from internvl_jax.data.source.cache import cache_errors_named, whole_file
from internvl_jax.data.where import DataError, Where

BLOCK_BYTES = 1 << 24
"""Bytes of a file that are read at a time where all of it is."""


class Spans(NamedTuple):
  """Where the records of a file are.

  Attributes:
    starts: int64 [records], the first byte of each, ascending.
    ends: int64 [records], the byte after the last of each.
    numbers: int64 [records], the numbers by which errors name them; None: 1, 2, 3, ..., which take no memory.
  """

  starts: np.ndarray
  ends: np.ndarray
  numbers: np.ndarray | None = None


class RecordFile:
  """The records of one file, read one by one on demand: the base of the kinds of such files, see `Records`.

  What is kept is two int64 numbers a record, never parsed: in memory, or with a cache in files that are mapped into
  it, from which a file that has not changed since is opened at once. The file itself is opened by the first read of
  each process; reads do not share a position (`pread`), so threads may read at once.

  A remote file is copied into the cache, and again when it has changed; what is read is the copy.

  A kind overrides `kind`, `check_format`, `find` and `read`.

  Attributes:
    kind: what such a file is called where datasets are listed.
    path: of the file, as it was named: errors blame it, also where a copy is read.
    dataset: the name that errors use.
    local: path of what is read: the file, or its copy.
    state: the file's size, and when it was last written to, at the time when its records were found.
  """

  kind = "file"

  def __init__(
    self,
    path: str | os.PathLike[str],
    dataset: str,
    *,
    cache: str | os.PathLike[str] | None = None,
    root: str | None = None,
    local: str | None = None,
  ):
    """Finds the records in one pass over the file, or in the cache.

    Args:
      path: the annotation file, a path or a URL.
      dataset: the name that errors use.
      cache: folder of caches; None keeps nothing but a remote file's copy, in `files.default_cache()`.
      root: the setting that says where its media are, where that is not the meta file.
      local: path of a local file with its content, where that is known; None: the file, or a remote one's copy.

    Raises:
      DataError: the file is missing, unreadable, of another format, or has no record.
    """
    self.path = str(path)
    self.dataset = dataset
    self._root = {} if root is None else {"root": root}
    self._file: BinaryIO | None = None
    self._cached: pathlib.Path | None = None
    try:
      self.local = local or local_file(self.path, cache)
      self.state = self._stat()
      self.check_format()
      if cache is None:
        self._spans = self.find()
      else:
        self._cached = self._index(pathlib.Path(cache))
        self._open_index()
    except OSError as error:
      raise self._unreadable(error) from error
    if not len(self):
      raise DataError(f"{path}: dataset {dataset!r} is empty: 0 samples; add lines, or do not name it")

  # --- What a kind of file overrides ------------------------------------------------------------------------

  def check_format(self) -> None:
    """Refuses a file that is of another format, with one DataError in place of one a record. None by default."""

  def find(self) -> Spans:
    """Finds the records in one pass over the file."""
    raise NotImplementedError

  def read(self, index: int) -> Any:
    """Reads and parses a record.

    Args:
      index: from 0.

    Raises:
      DataError: the record is broken, or the file was changed.
    """
    raise NotImplementedError

  # --- Reading ----------------------------------------------------------------------------------------------

  def __len__(self) -> int:
    return len(self._spans.starts)

  def where(self, index: int) -> Where:
    """The place of a record, which errors blame."""
    numbers = self._spans.numbers
    number = index + 1 if numbers is None else int(numbers[index])
    return Where(self.dataset, self.path, number, **self._root)

  def span(self, index: int) -> tuple[int, int]:
    """The first byte of a record, and the one after its last."""
    return int(self._spans.starts[index]), int(self._spans.ends[index])

  def read_bytes(self, start: int, end: int) -> bytes:
    """Reads bytes of the file; fewer come only at its end."""
    file = self._file
    if file is None:
      # Two threads may both open it here; the one that is not kept is closed when it is collected.
      file = self._file = open(self.local, "rb", buffering=0)  # noqa: SIM115 - stays open between reads
    # Network file systems may give less than was asked for; nothing is given at the file's end alone.
    data, wanted = b"", int(end - start)
    while len(data) < wanted and (
      more := os.pread(file.fileno(), wanted - len(data), int(start) + len(data))
    ):
      data += more
    return data

  def close(self) -> None:
    """Closes the file; the next read opens it again."""
    if self._file is not None:
      self._file.close()
      self._file = None

  def release(self) -> None:
    """Lets the file go, also while other threads read it: it is closed once the last of them is done."""
    self._file = None

  # --- What tells a file from any other ---------------------------------------------------------------------

  def checksum(self, start: int, stop: int) -> int:
    """A number, never 0, that differs when the bytes of the records from `start` to before `stop` do."""
    total = 0
    try:
      for block in self._blocks(start, stop):
        total = zlib.crc32(block, total)
    except OSError as error:
      raise self._unreadable(error) from error
    return max(1, total)

  def digest_records(self, start: int, stop: int) -> str:
    """16 hexadecimal digits that tell the bytes of the records from `start` to before `stop` from any others.

    Raises:
      DataError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
      for block in self._blocks(start, stop):
        digest.update(block)
    except OSError as error:
      raise self._unreadable(error) from error
    return digest.hexdigest()[:16]

  def _blocks(self, start: int, stop: int) -> Iterator[bytes]:
    """Yields the bytes of the records from `start` to before `stop`, and what is between them."""
    first, end = int(self._spans.starts[start]), int(self._spans.ends[stop - 1])
    for begin in range(first, end, BLOCK_BYTES):
      yield self.read_bytes(begin, min(begin + BLOCK_BYTES, end))

  def digest(self) -> str:
    """The SHA-256 of the file's bytes, in hex.

    Raises:
      DataError: the file cannot be read.
    """
    try:
      with open(self.local, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
      raise self._unreadable(error) from error

  def stamp(self) -> tuple[str, int, int, int, int]:
    """A stamp of the file, which changes whenever it is written to, put back or replaced: path, inode, size and dates.

    Raises:
      DataError: the file cannot be read.
    """
    try:
      stat = os.stat(self.local)
    except OSError as error:
      raise self._unreadable(error) from error
    return os.path.abspath(self.local), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns

  def check_unchanged(self) -> None:
    """Refuses a file that is not what it was when its records were found.

    Raises:
      DataError: it has another size or was written to.
    """
    now = self._stat()
    if now != self.state:
      raise DataError(
        f"{self.path}: dataset {self.dataset!r}: the file was changed after its lines were found: {self.state[0]} bytes "
        f"then, {now[0]} bytes now; start the run again"
      )

  def containing(self, text: bytes) -> Iterator[int]:
    """Yields the indices of the records that contain these bytes; the others are not parsed, nor looked at one by one.

    Raises:
      DataError: the file cannot be read.
    """
    starts, ends, _ = self._spans
    try:
      with open(self.local, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        place = content.find(text)
        while place >= 0:
          index = int(np.searchsorted(starts, place, side="right")) - 1
          if index >= 0 and place < ends[index]:
            yield index
            place = content.find(text, int(ends[index]))
          else:  # between records
            place = content.find(text, place + 1)
    except OSError as error:
      raise self._unreadable(error) from error

  def _stat(self) -> tuple[int, int]:
    try:
      stat = os.stat(self.local)
    except OSError as error:
      raise self._unreadable(error) from error
    return stat.st_size, stat.st_mtime_ns

  def _unreadable(self, error: OSError, where: Where | None = None) -> DataError:
    place = where or f"{self.path}: dataset {self.dataset!r}"
    return DataError(f"{place}: the annotation file cannot be read: {error}; restore it")

  # --- The cache --------------------------------------------------------------------------------------------

  def _index(self, cache: pathlib.Path) -> pathlib.Path:
    """The path of the file that holds the spans of the file as it is now; made if it is not there."""
    size, changed = self.state
    text = f"{os.path.abspath(self.local)} {size} {changed}"
    path = cache / f"lines-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npy"
    if not _is_intact(path):
      starts, ends, numbers = self.find()
      rows = np.stack([starts, ends] + ([] if numbers is None else [numbers]))
      with cache_errors_named(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
          np.save(file, rows)
          file.write(_checksum(rows))
    return path

  def _open_index(self) -> None:
    assert self._cached is not None
    with cache_errors_named(self._cached.parent):
      rows = np.load(self._cached, mmap_mode="r")
    self._spans = Spans(rows[0], rows[1], rows[2] if len(rows) > 2 else None)

  def __getstate__(self) -> dict[str, Any]:
    state = self.__dict__ | {"_file": None}
    if self._cached is not None:  # A copy of the process maps the same file; its content need not travel.
      state["_spans"] = None
    return state

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    if self._cached is not None:
      self._open_index()


def local_file(path: str, cache: str | os.PathLike[str] | None) -> str:
  """The path of a file that can be opened here: of a remote one, its copy in the cache."""
  return files.cached_copy(path, cache) if files.is_remote(path) else path


def _checksum(rows: np.ndarray) -> bytes:
  return zlib.crc32(np.ascontiguousarray(rows).data).to_bytes(4, "little")


def _is_intact(path: pathlib.Path) -> bool:
  """Says whether an index of spans is there and is as it was written."""
  try:
    rows = np.load(path, mmap_mode="r")
    with path.open("rb") as file:
      file.seek(-4, os.SEEK_END)
      return rows.dtype == np.int64 and rows.ndim == 2 and file.read() == _checksum(rows)
  except Exception:  # whatever numpy makes of a damaged header
    return False
