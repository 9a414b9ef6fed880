"""How long every sample is, before any pixel: an index kept on disk, built on all cores, extended when data grow.

A sample's tokens and tiles follow from its text and its image's header. They are measured once and kept in a
folder of the cache, one for each annotation file, tokenizer and setting that they depend on:

    <cache>/<name>-<hash>/key.json     what the sizes depend on, and the state of the annotation file
                          sizes.npy    one SIZE record a line, as if samples could be of any length
                          blocks.npy   a checksum of the bytes of every block of lines, 0 where not yet measured
                          errors.jsonl {"line": index, "message": why it cannot be read}
                          pieces-<hash>.npz  what is left of the longest under some limits (see `pieces`)

A block whose bytes are as they were keeps its sizes, so that an annotation file which grew, or of which a line was
mended, is measured in part, and an interrupted build goes on. Lines that could not be read are tried again each time.
The headers of images that could be read are not watched: a sample that turns out to be of another size than planned is
an error of that sample when it is decoded.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from internvl_jax.data.errors import DataError
from internvl_jax.data.jsonl import JsonlFile
from internvl_jax.data.workers import map_items

_RECORDS = "sizes.npy"

BLOCK = 1024
"""Lines measured, and remembered as measured, at a time."""

SIZE = np.dtype([("tokens", "<i4"), ("tiles", "<i4"), ("supervised", "<i4")])
"""The fields of Size; tokens is 0 where a line cannot be read."""


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


Measure = Callable[[JsonlFile, int], Size]
"""The size of a line; raises DataError where it cannot be read. It goes to worker processes."""


def index_sizes(
  file: JsonlFile,
  measure: Measure,
  key: Mapping[str, Any],
  cache: str | os.PathLike[str],
  *,
  workers: int,
  progress: Callable[[int], Any] = lambda lines: None,
) -> Sizes:
  """The sizes of a file's lines: from the cache as far as they are there, measured where they are not.

  Args:
    file: the annotation file.
    measure: measures a line.
    key: all that sizes depend on beside the lines, as JSON values.
    cache: folder of the caches; made if missing.
    workers: processes that measure; 0 measures in this one.
    progress: told how many lines are known, as they become so.
  """
  folder = _folder(file, key, pathlib.Path(cache))
  folder.mkdir(parents=True, exist_ok=True)
  with locked(folder):
    index = _Index(folder, file, key)
    missing = index.missing()
    lines = _MeasureLines(file, measure)
    _look_again(index, lines, missing)
    progress(len(file) - sum(index.length(block) for block in missing))
    blocks = [range(block * BLOCK, block * BLOCK + index.length(block)) for block in missing]
    for block, (records, errors) in map_items(lines, blocks, workers):
      index.store(block.start // BLOCK, records, errors)
      progress(len(records))
    index.finish()
    return index.sizes()


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
  """Keeps other processes of this host out of a folder: who comes second finds the first one's work done."""
  with (folder / "lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def _look_again(index: "_Index", measure: "_MeasureLines", missing: list[int]) -> None:
  """Measures the lines again that could not be read: an image may have been put where it was missing."""
  for line in index.unreadable():
    if line // BLOCK not in missing:
      records, errors = measure(range(line, line + 1))
      index.mend(line, records[0], errors.get(line))


def _folder(file: JsonlFile, key: Mapping[str, Any], cache: pathlib.Path) -> pathlib.Path:
  text = json.dumps([os.path.abspath(file.path), key], sort_keys=True)
  name = re.sub(r"\W+", "_", pathlib.Path(file.path).stem)[:40]
  return cache / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


class _Index:
  """The files of one index."""

  def __init__(self, folder: pathlib.Path, file: JsonlFile, key: Mapping[str, Any]):
    self._folder, self._file, self._key = folder, file, key
    lines, blocks = len(file), -(-len(file) // BLOCK)
    self._records, kept = _grown(folder / _RECORDS, SIZE, lines)
    self._blocks, _ = _grown(folder / "blocks.npy", np.dtype("<u4"), blocks)
    # A block whose sizes were lost, in part or whole, is not measured whatever its mark says.
    self._blocks[kept // BLOCK if kept < lines else blocks :] = 0
    # The log of errors is only ever added to; lines that were mended later have a size.
    self._errors = {
      line: message
      for line, message in self._read_errors().items()
      if line < lines and self._records["tokens"][line] == 0
    }
    self._sums = self._checksums() if self._stat() != self._known_stat() else None

  def missing(self) -> list[int]:
    """Blocks that are not measured, or of which the lines have changed."""
    if self._sums is None:
      return np.flatnonzero(self._blocks == 0).tolist()
    return np.flatnonzero(self._blocks != self._sums).tolist()

  def length(self, block: int) -> int:
    """Lines of a block."""
    return min(BLOCK, len(self._file) - block * BLOCK)

  def store(self, block: int, records: np.ndarray, errors: Mapping[int, str]) -> None:
    """Keeps what was measured of a block."""
    first = block * BLOCK
    for line in [line for line in self._errors if first <= line < first + BLOCK]:
      del self._errors[line]
    self._errors |= errors
    with (self._folder / "errors.jsonl").open("a", encoding="utf-8") as log:
      for line in range(first, first + len(records)):
        if line in errors:
          log.write(json.dumps({"line": line, "message": errors[line]}) + "\n")
    self._records[first : first + len(records)] = records
    self._records.flush()
    # Marked last: a build that is stopped here measures the block again.
    self._blocks[block] = self._file.checksum(first, first + len(records))
    self._blocks.flush()

  def unreadable(self) -> list[int]:
    """Lines that were measured and could not be read."""
    return sorted(self._errors)

  def mend(self, line: int, record: np.void, error: str | None) -> None:
    """Replaces what is known of a line that could not be read."""
    if error is not None:
      self._errors[line] = error
    else:
      del self._errors[line]
      self._records[line] = record
      self._records.flush()

  def finish(self) -> None:
    """Notes that all blocks are measured for the annotation file as it is."""
    content = {"file": os.path.abspath(self._file.path), "stat": self._stat(), "key": dict(self._key)}
    temporary = self._folder / f"key.json.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")
    temporary.replace(self._folder / "key.json")

  def sizes(self) -> Sizes:
    """All sizes, read-only."""
    records = np.load(self._folder / _RECORDS, mmap_mode="r")
    unreadable = np.flatnonzero(records["tokens"] == 0).tolist()
    return Sizes(
      self._folder, records, {line: self._errors[line] for line in unreadable if line in self._errors}
    )

  def _stat(self) -> list[int]:
    stat = os.stat(self._file.path)
    return [stat.st_size, stat.st_mtime_ns]

  def _known_stat(self) -> list[int] | None:
    try:
      return json.loads((self._folder / "key.json").read_text(encoding="utf-8"))["stat"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
      return None

  def _checksums(self) -> np.ndarray:
    lines = len(self._file)
    return np.array(
      [self._file.checksum(start, min(start + BLOCK, lines)) for start in range(0, lines, BLOCK)], np.uint32
    )

  def _read_errors(self) -> dict[int, str]:
    try:
      text = (self._folder / "errors.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
      return {}
    errors = {}
    for line in text.splitlines():
      try:
        entry = json.loads(line)
      except json.JSONDecodeError:
        continue  # Half a line, of a build that was stopped; its block was not marked.
      errors[entry["line"]] = entry["message"]
    return errors


def _grown(path: pathlib.Path, dtype: np.dtype, length: int) -> tuple[Any, int]:
  """An array on disk of that length, with what it held before at its start, and how much that is."""
  try:
    old = np.load(path, mmap_mode="r+")
    if old.dtype == dtype and len(old) == length:
      return old, length
  except (FileNotFoundError, ValueError, EOFError):
    old = np.zeros(0, dtype)
  temporary = path.with_suffix(f".{os.getpid()}.tmp")
  new = np.lib.format.open_memmap(temporary, "w+", dtype, (length,))
  kept = min(length, len(old)) if old.dtype == dtype else 0
  new[:kept] = old[:kept]
  new.flush()
  temporary.replace(path)
  return np.load(path, mmap_mode="r+"), kept


# --- Measuring ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _MeasureLines:
  """Measures the lines of a block."""

  file: JsonlFile
  measure: Measure

  def __call__(self, lines: range) -> tuple[np.ndarray, dict[int, str]]:
    records, errors = np.zeros(len(lines), SIZE), {}
    for i, line in enumerate(lines):
      try:
        records[i] = tuple(self.measure(self.file, line))
      except DataError as error:
        errors[line] = str(error)
    return records, errors
