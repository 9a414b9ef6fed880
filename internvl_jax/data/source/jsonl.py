"""JSON lines (jsonl): a JSON object a line, any of them read by its number."""

import contextlib
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from internvl_jax.data.source import formats, spans
from internvl_jax.data.source.spans import RecordFile, Spans
from internvl_jax.data.where import DataError

_NEWLINE = 10
# Lines at the beginning of a file in which `first_records` looks.
_LINES_SEARCHED = 1000


class _SaidTwiceError(Exception):
  """A name is twice in an object; json would keep the last value and lose the first in silence."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  entries = dict(pairs)
  if len(entries) < len(pairs):
    found: dict[str, Any] = {}
    for key, value in pairs:
      if found.setdefault(key, value) != value:
        raise _SaidTwiceError(key)
  return entries


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


class JsonlFile(RecordFile):
  """The non-blank lines of a jsonl file."""

  def check_format(self) -> None:
    """Refuses a file that is no jsonl: each of its lines would be an error, with a remedy that does not help."""
    with open(self.local, "rb") as file:
      found = formats.recognized(file)
    if found is not None:
      raise DataError(f"{self.path}: dataset {self.dataset!r}: {found.explain(self.path)}")

  def find(self) -> Spans:
    """Finds the lines that are not blank."""
    starts, ends = _line_bounds(pathlib.Path(self.local))
    blank = self._blank_lines(starts, ends)
    return Spans(starts[~blank], ends[~blank], np.flatnonzero(~blank) + 1 if blank.any() else None)

  def _blank_lines(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Finds the lines that hold white space only: bool [lines]."""
    blank = ends == starts
    # A longer run of spaces is read as a line and fails with its number, like any other broken line.
    for i in np.flatnonzero((ends - starts > 0) & (ends - starts <= 8)):
      blank[i] = not self.read_bytes(starts[i], ends[i]).strip()
    return blank

  def read(self, index: int) -> Any:
    """Parses the JSON of a line.

    Args:
      index: counted from 0, blank lines left out.

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
    """Reads the bytes of a line, after a look at whether they are still one line of the file."""
    start, end = self.span(index)
    first = max(start - 1, 0)
    try:
      text = self.read_bytes(first, end + 1)
    except OSError as error:
      raise self._unreadable(error, self.where(index)) from error
    before, line, after = text[: start - first], text[start - first : end - first], text[end - first :]
    if before not in (b"", b"\n") or len(line) < end - start or b"\n" in line or after not in (b"", b"\n"):
      raise self.where(index).error(
        f"the file was changed after its lines were found: bytes {start} to {end} are no line of it any more; start "
        "the run again"
      )
    return line


def first_records(path: str) -> Iterator[Any]:
  """Parses the first lines of a file, without an index; what is wrong about them is said when they are read."""
  with contextlib.suppress(OSError), open(path, "rb") as lines:
    if formats.recognized(lines) is not None:  # One line of it may be all of it.
      return
    for line in itertools.islice(lines, _LINES_SEARCHED):
      with contextlib.suppress(ValueError, RecursionError):
        yield json.loads(line)


def _line_bounds(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """Finds the lines of a file: int64 [lines], each one's first byte, and the byte after its last."""
  newlines = []
  size = 0
  with path.open("rb") as file:
    while block := file.read(spans.BLOCK_BYTES):
      newlines.append(np.flatnonzero(np.frombuffer(block, np.uint8) == _NEWLINE) + size)
      size += len(block)
  ends = np.concatenate([*newlines, [size]]).astype(np.int64)
  starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
  # After a last line break there is no further line.
  keep = starts < size
  return starts[keep], ends[keep]
