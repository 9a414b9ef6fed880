"""How long every sample is, before any pixel: an index kept on disk, built on all cores, extended when data grow.

A sample's tokens and tiles follow from its text and its image's header. They are measured once and kept in a
folder of the cache, one for each annotation file, tokenizer and setting that they depend on:

    <cache>/<name>-<hash>/key.json     what the sizes depend on, and the state of the annotation file
                          sizes.npy    one SIZE record a line, as if samples could be of any length
                          blocks.npy   checksums of every block: of the lines' bytes, 0 where not yet measured, and
                                       of the records
                          pieces-<hash>.npz  what is left of the longest under some limits (see `pieces`)
                          hosts/       while several hosts build it together (see `shared_sizes`): who has this folder

A block whose bytes are as they were keeps its sizes, so that an annotation file which grew, or of which a line was
mended, is measured in part, and an interrupted build goes on. Lines that could not be read are tried again each time.
Records that are not as they were stored, after a crash or by two hosts that write at once, are measured again.
The headers of images that could be read are not watched, but for those of a few lines: where one of these has another
size now, its files were replaced, and all lines are measured again. Else a sample that turns out to be of another size
than planned is an error of that sample when it is decoded. (Asking the file system for the dates of millions of files
at every start would take minutes.)
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from internvl_jax.data.source import files
from internvl_jax.data.source.cache import cache_errors_named, locked, whole_file
from internvl_jax.data.source.interface import Records
from internvl_jax.data.source.workers import map_items
from internvl_jax.data.where import DataError

_RECORDS = "sizes.npy"

BLOCK = 1024
"""Lines measured, and remembered as measured, at a time."""

SIZE = np.dtype([("tokens", "<i4"), ("tiles", "<i4"), ("supervised", "<i4")])
"""The fields of Size; tokens is 0 where a line cannot be read."""

_MARK = np.dtype([("lines", "<u4"), ("records", "<u4")])


class Size(NamedTuple):
  """Tokens, tiles and supervised tokens of a sample."""

  tokens: int
  tiles: int
  supervised: int


class Sizes(NamedTuple):
  """Sizes of all lines of a file.

  Attributes:
    folder: of the index.
    records: SIZE [lines], mapped into memory.
    errors: why a line cannot be read, by its index.
  """

  folder: pathlib.Path
  records: np.ndarray
  errors: dict[int, str]

  def __reduce__(self) -> tuple:
    # A copy of the process maps the same file; millions of sizes need not travel.
    return _reopened, (self.folder, self.errors)


def _reopened(folder: pathlib.Path, errors: dict[int, str]) -> Sizes:
  return Sizes(folder, np.load(folder / _RECORDS, mmap_mode="r"), errors)


Measure = Callable[[Records, int], Size]
"""The size of a line; raises DataError where it cannot be read. It goes to worker processes."""


def index_sizes(
  file: Records,
  measure: Measure,
  key: Mapping[str, Any],
  cache: str | os.PathLike[str],
  *,
  workers: int,
  progress: Callable[[int], Any] = lambda lines: None,
  probes: int = 0,
) -> Sizes:
  """The sizes of a file's lines: from the cache as far as they are there, measured where they are not.

  Args:
    file: the annotation file.
    measure: measures a line.
    key: all that sizes depend on beside the lines, as JSON values.
    cache: folder of the caches; made if missing.
    workers: processes that measure; 0 measures in this one.
    progress: told how many lines are known, as they become so.
    probes: lines that are measured again although they are known. They are the same ones each time, so that all hosts
      come to the same sizes.
  """
  folder = index_folder(file, key, pathlib.Path(cache))
  with contextlib.ExitStack() as stack:
    with cache_errors_named(cache):
      folder.mkdir(parents=True, exist_ok=True)
      stack.enter_context(locked(folder))
      index = Index(folder, file, key)
      missing = index.missing()
    lines = MeasureLines(file, measure)
    if (line := first_other(lines, index, missing, probes)) is not None:
      logging.info(
        "%s: files were replaced since they were measured; all are measured again", file.where(line)
      )
      missing = index.all_blocks()
    for line in index.unreadable(missing):
      # An image may have been put where it was missing.
      records, errors = lines(range(line, line + 1))
      with cache_errors_named(cache):
        index.mend(line, records[0], errors.get(line))
    progress(len(file) - sum(index.length(block) for block in missing))
    blocks = [range(block * BLOCK, block * BLOCK + index.length(block)) for block in missing]
    for block, (records, errors) in map_items(lines, blocks, workers):
      with cache_errors_named(cache):
        index.store(block.start // BLOCK, records, errors)
      progress(len(records))
    with cache_errors_named(cache):
      index.finish()
      return index.sizes()


def first_other(lines: "MeasureLines", index: "Index", missing: list[int], probes: int) -> int | None:
  """The first of a few lines that were measured and now have another size; None if there is none."""
  known = index.with_files(missing)
  for line in known[np.linspace(0, len(known) - 1, min(probes, len(known))).astype(np.int64)].tolist():
    records, _ = lines(range(line, line + 1))
    if records[0] != index.record(line):
      return line
  return None


def index_folder(file: Records, key: Mapping[str, Any], cache: pathlib.Path) -> pathlib.Path:
  """Where the index of a file is kept."""
  text = json.dumps([files.identity(file.path), key], sort_keys=True)
  name = re.sub(r"\W+", "_", pathlib.Path(files.name(file.path)).stem)[:40]
  return cache / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


class Index:
  """The files of one index."""

  def __init__(self, folder: pathlib.Path, file: Records, key: Mapping[str, Any], *, writes: bool = True):
    """Opens it, or begins it.

    Args:
      folder: where it is.
      file: the annotation file.
      key: see `index_sizes`.
      writes: what is stored goes to disk; else it stays in this process.
    """
    self._folder, self._file, self._key, self._writes = folder, file, key, writes
    opened = _grown if writes else _copied
    self._records = opened(folder / _RECORDS, SIZE, len(file))
    self._marks = opened(folder / "blocks.npy", _MARK, -(-len(file) // BLOCK))
    self._errors: dict[int, str] = {}
    self._lines: dict[int, int] = {}

  def missing(self) -> list[int]:
    """Blocks that are not measured, or of which the lines or the records have changed."""
    stale = self._marks["lines"] == 0
    stale |= self._marks["records"] != self._sums(self._sum_records)
    if list(self._file.state) != self._known_state():
      stale |= self._marks["lines"] != self._sums(self._file.checksum)
    return np.flatnonzero(stale).tolist()

  def for_writing(self) -> "Index":
    """The same index, of which what is stored from now on goes to disk."""
    index = Index(self._folder, self._file, self._key)
    index._lines = self._lines
    return index

  def count_lines(self, blocks: Iterable[int]) -> int:
    """Lines of some blocks."""
    return sum(map(self.length, blocks))

  def length(self, block: int) -> int:
    """Lines of a block."""
    return min(BLOCK, len(self._file) - block * BLOCK)

  def store(self, block: int, records: np.ndarray, errors: Mapping[int, str]) -> None:
    """Keeps what was measured of a block."""
    self.store_all([(block, records)], errors)

  def store_all(self, blocks: Iterable[tuple[int, np.ndarray]], errors: Mapping[int, str]) -> None:
    """Keeps what was measured of several blocks, and writes it to disk at once."""
    self._errors |= errors
    blocks = list(blocks)
    for block, records in blocks:
      self._records[block * BLOCK : block * BLOCK + len(records)] = records
    self._flush(self._records)
    # Marked last: a build that is stopped here measures the blocks again.
    for block, _ in blocks:
      self._mark(block)
    self._flush(self._marks)

  def records_of(self, block: int) -> np.ndarray:
    """The sizes of a block's lines, as far as they are known."""
    return self._records[block * BLOCK : block * BLOCK + self.length(block)]

  def marks(self, missing: list[int]) -> np.ndarray:
    """Checksums uint32 [2, blocks], of the lines as they are and of what is known of them; 0 where blocks are missing."""
    marks = np.stack([self._marks["lines"], np.maximum(self._marks["records"], 1)])
    marks[1, missing] = 0
    for block in missing:
      marks[0, block] = self._lines_of(block)
    return marks

  def unreadable(self, missing: list[int]) -> list[int]:
    """Lines that were measured and could not be read, outside of blocks that are missing."""
    return np.flatnonzero((self._records["tokens"] == 0) & self._known(missing)).tolist()

  def with_files(self, missing: list[int]) -> np.ndarray:
    """Lines that were measured and have images or a video, int64, outside of blocks that are missing."""
    return np.flatnonzero((self._records["tiles"] > 0) & self._known(missing))

  def record(self, line: int) -> np.void:
    """The size of a line, as far as it is known."""
    return self._records[line]

  def all_blocks(self) -> list[int]:
    """All blocks."""
    return list(range(len(self._marks)))

  def _known(self, missing: list[int]) -> np.ndarray:
    """Computes bool [lines]: whether a line is outside of blocks that are missing."""
    known = np.ones(len(self._records), np.bool_)
    for block in missing:
      known[block * BLOCK : (block + 1) * BLOCK] = False
    return known

  def mend(self, line: int, record: np.void, error: str | None) -> None:
    """Replaces what is known of a line that could not be read."""
    if error is not None:
      self._errors[line] = error
    else:
      self._records[line] = record
      self._flush(self._records)
      self._mark(line // BLOCK)
      self._flush(self._marks)

  def finish(self) -> None:
    """Notes that all blocks are measured for the annotation file as it is."""
    content = {"file": files.identity(self._file.path), "stat": self._file.state, "key": dict(self._key)}
    with whole_file(self._folder / "key.json") as file:
      file.write(json.dumps(content, indent=2).encode())

  def sizes(self) -> Sizes:
    """All sizes, read-only."""
    records = np.load(self._folder / _RECORDS, mmap_mode="r")
    if np.flatnonzero(records["tokens"] == 0).tolist() != sorted(self._errors):
      raise self.written_by_others()
    return Sizes(self._folder, records, self._errors)

  def written_by_others(self) -> DataError:
    """The error of files that do not hold what this process has put there."""
    return DataError(
      f"{self._folder}: another process wrote these sizes at the same time, because the file system has no locks; "
      "start the run again, or set loader.cache_dir to a folder of this host"
    )

  def is_written(self) -> bool:
    """Whether the files hold what this process knows, whoever wrote them."""
    records = np.load(self._folder / _RECORDS, mmap_mode="r")
    sums = self._sums(lambda start, stop: zlib.crc32(records[start:stop]))
    return records.shape == self._records.shape and bool((sums == self._marks["records"]).all())

  def _mark(self, block: int) -> None:
    self._file.check_unchanged()  # or else what was measured may not be what is summed up here
    first = block * BLOCK
    self._marks[block] = self._lines_of(block), self._sum_records(first, first + self.length(block))

  def _lines_of(self, block: int) -> int:
    """The checksum of a block's lines, which are those of the file as it was opened."""
    if block not in self._lines:
      self._lines[block] = self._file.checksum(block * BLOCK, block * BLOCK + self.length(block))
    return self._lines[block]

  def _flush(self, array: np.ndarray) -> None:
    if self._writes:
      assert isinstance(array, np.memmap)
      array.flush()

  def _sum_records(self, start: int, stop: int) -> int:
    return zlib.crc32(self._records[start:stop])

  def _sums(self, checksum: Callable[[int, int], int]) -> np.ndarray:
    """A checksum of every block."""
    starts = range(0, len(self._file), BLOCK)
    return np.array([checksum(start, min(start + BLOCK, len(self._file))) for start in starts], np.uint32)

  def _known_state(self) -> list[int] | None:
    try:
      return json.loads((self._folder / "key.json").read_text(encoding="utf-8"))["stat"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # not there, or damaged
      return None


def _copied(path: pathlib.Path, dtype: np.dtype, length: int, *, mode: Any = "c") -> Any:
  """An array of that length with what one on disk holds at its start, and else zeros.

  It is mapped into memory where it is of that length: with mode "c" changes stay in this process.
  """
  try:
    old = np.load(path, mmap_mode=mode)
    if old.dtype == dtype and old.shape == (length,):
      return old
  except Exception:  # not there, or whatever numpy makes of a damaged header
    old = np.zeros(0, dtype)
  new = np.zeros(length, dtype)
  if old.dtype == dtype and old.ndim == 1:
    new[: len(old)] = old[:length]
  return new


def _grown(path: pathlib.Path, dtype: np.dtype, length: int) -> Any:
  """An array on disk of that length, with what it held before at its start, and else zeros."""
  new = _copied(path, dtype, length, mode="r+")
  if isinstance(new, np.memmap):
    return new
  # Written, not only mapped into memory: on a full disk that would kill the process when it is first used.
  with whole_file(path) as file:
    np.save(file, new)
  return np.load(path, mmap_mode="r+")


@dataclasses.dataclass(frozen=True)
class MeasureLines:
  """Measures the lines of a block."""

  file: Records
  measure: Measure

  def __call__(self, lines: range) -> tuple[np.ndarray, dict[int, str]]:
    records, errors = np.zeros(len(lines), SIZE), {}
    for i, line in enumerate(lines):
      try:
        records[i] = tuple(self.measure(self.file, line))
      except DataError as error:
        errors[line] = str(error)
    return records, errors
