"""How long every sample is, before any pixel: an index kept on disk, built on all cores, extended when data grow.

A sample's tokens and tiles follow from its text and its image's header. They are measured once and kept in a
folder of the cache, one for each annotation file, tokenizer and setting that they depend on:

    <cache>/<name>-<hash>/key.json     what the sizes depend on, and the state of the annotation file
                          sizes.npy    one SIZE record a line
                          blocks.npy   a checksum of the bytes of every block of lines, 0 where not yet measured
                          errors.jsonl {"line": index, "message": why it cannot be read}

A block whose bytes are as they were keeps its sizes, so that an annotation file which grew, or of which a line was
mended, is measured in part, and an interrupted build goes on. Lines that could not be read are tried again each time.
The headers of images that could be read are not watched: a sample that turns out to be of another size than planned is
an error of that sample when it is decoded.
"""

import concurrent.futures
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from internvl_jax.data import files
from internvl_jax.data.errors import DataError
from internvl_jax.data.jsonl import JsonlFile

BLOCK = 1024
"""Lines measured, and remembered as measured, at a time."""

SIZE = np.dtype([("tokens", "<i4"), ("tiles", "<i4"), ("supervised", "<i4"), ("needed", "<i4")])
"""The fields of Size; tokens is 0 where a line cannot be read."""


class Size(NamedTuple):
  """Sizes of a sample: tokens, tiles, supervised tokens, and the first tokens that its images need."""

  tokens: int
  tiles: int
  supervised: int
  needed: int = 1


class Sizes(NamedTuple):
  """Sizes of all lines of a file.

  Attributes:
    records: SIZE [lines], mapped into memory.
    errors: why a line cannot be read, by its index.
  """

  records: np.ndarray
  errors: dict[int, str]


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
  index = _Index(folder, file, key)
  missing = index.missing()
  _look_again(index, file, measure, missing)
  progress(len(file) - sum(index.length(block) for block in missing))
  for block, records, errors in _measure_all(file, measure, missing, workers):
    index.store(block, records, errors)
    progress(len(records))
  index.finish()
  return index.sizes()


def _look_again(index: "_Index", file: JsonlFile, measure: Measure, missing: list[int]) -> None:
  """Measures the lines again that could not be read: an image may have been put where it was missing."""
  for line in index.unreadable():
    if line // BLOCK not in missing:
      records, errors = _measure_lines(file, measure, range(line, line + 1))
      index.mend(line, records[0], errors.get(line))


def _folder(file: JsonlFile, key: Mapping[str, Any], cache: pathlib.Path) -> pathlib.Path:
  text = json.dumps([files.absolute(file.path), key], sort_keys=True)
  name = re.sub(r"\W+", "_", pathlib.Path(files.name(file.path)).stem)[:40]
  return cache / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


class _Index:
  """The files of one index."""

  def __init__(self, folder: pathlib.Path, file: JsonlFile, key: Mapping[str, Any]):
    self._folder, self._file, self._key = folder, file, key
    lines, blocks = len(file), -(-len(file) // BLOCK)
    self._records, kept = _grown(folder / "sizes.npy", SIZE, lines)
    self._blocks, _ = _grown(folder / "blocks.npy", np.dtype("<u4"), blocks)
    # A block whose sizes were lost, in part or whole, is not measured whatever its mark says.
    self._blocks[kept // BLOCK if kept < lines else blocks :] = 0
    # The log of errors is only ever added to; lines that were mended later have a size.
    self._errors = {
      line: message
      for line, message in self._read_errors().items()
      if line < lines and self._records["tokens"][line] == 0
    }
    self._sums = self._checksums() if self._file.state() != self._known_stat() else None

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
    content = {"file": files.absolute(self._file.path), "stat": self._file.state(), "key": dict(self._key)}
    temporary = self._folder / f"key.json.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")
    temporary.replace(self._folder / "key.json")

  def sizes(self) -> Sizes:
    """All sizes, read-only."""
    records = np.load(self._folder / "sizes.npy", mmap_mode="r")
    unreadable = np.flatnonzero(records["tokens"] == 0).tolist()
    return Sizes(records, {line: self._errors[line] for line in unreadable if line in self._errors})

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


def _measure_all(
  file: JsonlFile, measure: Measure, blocks: list[int], workers: int
) -> Iterable[tuple[int, np.ndarray, dict[int, str]]]:
  if workers <= 1 or len(blocks) <= 1:
    for block in blocks:
      yield block, *_measure_lines(file, measure, _lines_of(block, file))
    return
  # Workers are started afresh: a forked copy of a process with JAX's threads may hang.
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(
    min(workers, len(blocks)), context, initializer=_start_worker, initargs=(file, measure)
  ) as pool:
    # A bounded number in flight, so that memory does not grow with the file.
    waiting, running = iter(blocks), {}
    for block in itertools.islice(waiting, 4 * workers):
      running[pool.submit(_measure_in_worker, _lines_of(block, file))] = block
    while running:
      done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
      for future in done:
        yield running.pop(future), *future.result()
        for block in itertools.islice(waiting, 1):
          running[pool.submit(_measure_in_worker, _lines_of(block, file))] = block


def _lines_of(block: int, file: JsonlFile) -> range:
  return range(block * BLOCK, min((block + 1) * BLOCK, len(file)))


_worker: tuple[JsonlFile, Measure] | None = None


def _start_worker(file: JsonlFile, measure: Measure) -> None:
  global _worker  # noqa: PLW0603 - sent once to each process, not with every block
  _worker = file, measure


def _measure_in_worker(lines: range) -> tuple[np.ndarray, dict[int, str]]:
  assert _worker is not None
  return _measure_lines(*_worker, lines)


def _measure_lines(file: JsonlFile, measure: Measure, lines: range) -> tuple[np.ndarray, dict[int, str]]:
  records, errors = np.zeros(len(lines), SIZE), {}
  for i, line in enumerate(lines):
    try:
      records[i] = tuple(measure(file, line))
    except DataError as error:
      errors[line] = str(error)
  return records, errors
