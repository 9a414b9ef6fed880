"""Random access to the lines of a jsonl file by their byte offsets."""

import hashlib
import json
import mmap
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from internvl_jax.data.source import files, formats
from internvl_jax.data.source.cache import cache_errors_named, whole_file
from internvl_jax.data.where import DataError, Where

_BLOCK_BYTES = 1 << 24
_NEWLINE = 10


class _SaidTwiceError(Exception):
  """A name stands twice in an object; json would keep the last, and lose what stood there before in silence."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  entries = dict(pairs)
  if len(entries) < len(pairs):
    found: dict[str, Any] = {}
    for key, value in pairs:
      if found.setdefault(key, value) != value:
        raise _SaidTwiceError(key)
  return entries


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


class JsonlFile:
  """The non-blank lines of a jsonl file, read one by one on demand.

  What is kept is two int64 numbers a line, never parsed JSON: in memory, or with a cache in files that are mapped
  into it, from which a file that has not changed since is opened at once. The file itself is opened by the first
  read of each process; reads do not share a position (`pread`), so threads may read at once.

  A remote file is copied into the cache, and again when it has changed; what is read is the copy.

  Attributes:
    path: of the file, as it was named: errors blame it, also where a copy is read.
    dataset: the name that errors use.
    state: the file's size, and when it was last written to, at the time when its lines were found.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    dataset: str,
    *,
    cache: str | os.PathLike[str] | None = None,
    root: str | None = None,
  ):
    """Finds the lines in one pass over the file, or in the cache.

    Args:
      path: the annotation file, a path or a URL.
      dataset: the name that errors use.
      cache: folder of caches; None keeps nothing but a remote file's copy, in `files.default_cache()`.
      root: the setting that says where its media are, where that is not the meta file.

    Raises:
      DataError: the file is missing, unreadable, no jsonl, or has no line.
    """
    self.path = str(path)
    self.dataset = dataset
    self._root = {} if root is None else {"root": root}
    self._file: BinaryIO | None = None
    self._cached: pathlib.Path | None = None
    try:
      self._local = files.cached_copy(self.path, cache) if files.is_remote(self.path) else self.path
      self.state = self._stat()
      self._check_format()
      if cache is None:
        self._starts, self._ends, self._numbers = self._find_lines()
      else:
        self._cached = self._index(pathlib.Path(cache))
        self._open_index()
    except OSError as error:
      raise self._unreadable(error) from error
    if not len(self):
      raise DataError(f"{path}: dataset {dataset!r} is empty: 0 samples; add lines, or do not name it")

  def _check_format(self) -> None:
    """Refuses a file that is no jsonl: each of its lines would be an error, with a remedy that does not help."""
    with open(self._local, "rb") as file:
      found = formats.recognised(file)
    if found is not None:
      raise DataError(f"{self.path}: dataset {self.dataset!r}: {found.explain(self.path)}")

  def _find_lines(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Returns int64 [lines]: first bytes, bytes after the last, and line numbers where they are not 1, 2, 3, ..."""
    starts, ends = _line_bounds(pathlib.Path(self._local))
    blank = self._blank_lines(starts, ends)
    # Without blank lines, by far the usual case, line numbers need no memory.
    numbers = np.flatnonzero(~blank) + 1 if blank.any() else None
    return starts[~blank], ends[~blank], numbers

  def _index(self, cache: pathlib.Path) -> pathlib.Path:
    """Returns the file that holds the lines' places for the file as it is now, made if it is not there."""
    size, changed = self.state
    text = f"{os.path.abspath(self._local)} {size} {changed}"
    path = cache / f"lines-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npy"
    if not _is_intact(path):
      starts, ends, numbers = self._find_lines()
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
    self._starts, self._ends = rows[0], rows[1]
    self._numbers = rows[2] if len(rows) > 2 else None

  def _blank_lines(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns bool [lines]: True where a line holds white space only."""
    blank = ends == starts
    # A longer run of spaces is read as a line and fails with its number, like any other broken line.
    for i in np.flatnonzero((ends - starts > 0) & (ends - starts <= 8)):
      blank[i] = not self._read(starts[i], ends[i]).strip()
    return blank

  def __len__(self) -> int:
    return len(self._starts)

  def where(self, index: int) -> Where:
    """Returns the place of the line with this index (counted from 0, blank lines left out)."""
    line = index + 1 if self._numbers is None else int(self._numbers[index])
    return Where(self.dataset, self.path, line, **self._root)

  def read(self, index: int) -> Any:
    """Returns the parsed JSON of a line.

    Raises:
      DataError: the line is not JSON, or says two things under one name.
    """
    text = self._line(index)
    try:
      return _DECODER.decode(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
      raise self.where(index).error(f"not UTF-8: {error}; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
      raise self.where(index).error(
        f"broken JSON at column {error.colno}: {error.msg}; correct the line or delete it"
      ) from error
    except _SaidTwiceError as error:
      raise self.where(index).error(
        f"key {error.args[0]!r} stands twice in one object, with different values; keep one"
      ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
      raise self.where(index).error(f"JSON that cannot be read: {error}; delete the line") from error

  def _line(self, index: int) -> bytes:
    """Returns the bytes of a line, after a look at whether they are still one line of the file."""
    start, end = int(self._starts[index]), int(self._ends[index])
    first = max(start - 1, 0)
    try:
      text = self._read(first, end + 1)
    except OSError as error:
      raise self._unreadable(error, self.where(index)) from error
    before, line, after = text[: start - first], text[start - first : end - first], text[end - first :]
    if before not in (b"", b"\n") or len(line) < end - start or b"\n" in line or after not in (b"", b"\n"):
      raise self.where(index).error(
        f"the file was changed after its lines were found: bytes {start} to {end} are no line of it any more; start "
        "the run again"
      )
    return line

  def checksum(self, start: int, stop: int) -> int:
    """Returns a number, never 0, that differs when the bytes of the lines from `start` to before `stop` do."""
    total = 0
    try:
      for first in range(int(self._starts[start]), int(self._ends[stop - 1]), _BLOCK_BYTES):
        total = zlib.crc32(self._read(first, min(first + _BLOCK_BYTES, int(self._ends[stop - 1]))), total)
    except OSError as error:
      raise self._unreadable(error) from error
    return max(1, total)

  def digest_lines(self, start: int, stop: int) -> str:
    """Returns 16 hexadecimal digits that tell the bytes of the lines from `start` to before `stop` from any others.

    Raises:
      DataError: the file cannot be read.
    """
    digest = hashlib.sha256()
    end = int(self._ends[stop - 1])
    try:
      for first in range(int(self._starts[start]), end, _BLOCK_BYTES):
        digest.update(self._read(first, min(first + _BLOCK_BYTES, end)))
    except OSError as error:
      raise self._unreadable(error) from error
    return digest.hexdigest()[:16]

  def stamp(self) -> tuple[str, int, int, int, int]:
    """Returns what changes whenever the file is written to, put back or replaced: path, inode, size and dates.

    Raises:
      DataError: the file cannot be read.
    """
    try:
      stat = os.stat(self._local)
    except OSError as error:
      raise self._unreadable(error) from error
    return os.path.abspath(self._local), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns

  def digest(self) -> str:
    """Returns the SHA-256 of the file's bytes, in hex.

    Raises:
      DataError: the file cannot be read.
    """
    try:
      with open(self._local, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
      raise self._unreadable(error) from error

  def containing(self, text: bytes) -> Iterator[int]:
    """Yields the indices of the lines that contain these bytes; the others are not parsed, nor looked at one by one.

    Raises:
      DataError: the file cannot be read.
    """
    try:
      with open(self._local, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        place = content.find(text)
        while place >= 0:
          line = int(np.searchsorted(self._starts, place, side="right")) - 1
          yield line
          place = content.find(text, int(self._ends[line]))
    except OSError as error:
      raise self._unreadable(error) from error

  def check_unchanged(self) -> None:
    """Refuses a file that is not what it was when its lines were found.

    Raises:
      DataError: it has another size or was written to.
    """
    now = self._stat()
    if now != self.state:
      raise DataError(
        f"{self.path}: dataset {self.dataset!r}: the file was changed after its lines were found: {self.state[0]} bytes "
        f"then, {now[0]} bytes now; start the run again"
      )

  def close(self) -> None:
    """Closes the file; the next read opens it again."""
    if self._file is not None:
      self._file.close()
      self._file = None

  def _stat(self) -> tuple[int, int]:
    try:
      stat = os.stat(self._local)
    except OSError as error:
      raise self._unreadable(error) from error
    return stat.st_size, stat.st_mtime_ns

  def _unreadable(self, error: OSError, where: Where | None = None) -> DataError:
    place = where or f"{self.path}: dataset {self.dataset!r}"
    return DataError(f"{place}: the annotation file cannot be read: {error}; restore it")

  def _read(self, start: int, end: int) -> bytes:
    file = self._file
    if file is None:
      # Two threads may both open it here; the one that is not kept is closed when it is collected.
      file = self._file = open(self._local, "rb", buffering=0)  # noqa: SIM115 - stays open between reads
    # Network file systems may give less than was asked for; nothing is given at the file's end alone.
    data, wanted = b"", int(end - start)
    while len(data) < wanted and (
      more := os.pread(file.fileno(), wanted - len(data), int(start) + len(data))
    ):
      data += more
    return data

  def __getstate__(self) -> dict[str, Any]:
    state = self.__dict__ | {"_file": None}
    if self._cached is not None:  # A copy of the process maps the same file; its content need not travel.
      state |= {"_starts": None, "_ends": None, "_numbers": None}
    return state

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    if self._cached is not None:
      self._open_index()


def _checksum(rows: np.ndarray) -> bytes:
  return zlib.crc32(np.ascontiguousarray(rows).data).to_bytes(4, "little")


def _is_intact(path: pathlib.Path) -> bool:
  """Says whether an index of lines is there and is as it was written."""
  try:
    rows = np.load(path, mmap_mode="r")
    with path.open("rb") as file:
      file.seek(-4, os.SEEK_END)
      return rows.dtype == np.int64 and rows.ndim == 2 and file.read() == _checksum(rows)
  except Exception:  # whatever numpy makes of a damaged header
    return False


def _line_bounds(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """Returns int64 byte offsets [lines] of each line's first byte and of the byte after its last."""
  newlines = []
  size = 0
  with path.open("rb") as file:
    while block := file.read(_BLOCK_BYTES):
      newlines.append(np.flatnonzero(np.frombuffer(block, np.uint8) == _NEWLINE) + size)
      size += len(block)
  ends = np.concatenate([*newlines, [size]]).astype(np.int64)
  starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
  # After a last line break there is no further line.
  keep = starts < size
  return starts[keep], ends[keep]
