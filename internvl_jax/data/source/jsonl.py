"""JSON lines (jsonl): a JSON object a line, any of them read by its number."""

import contextlib
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from internvl_jax.data.source import formats, json_text, spans
from internvl_jax.data.source.spans import RecordFile, Spans
from internvl_jax.data.where import DataError

_NEWLINE = 10
# Lines at the beginning of a file in which `first_records` looks.
_LINES_SEARCHED = 1000


class JsonlFile(RecordFile):
  """The non-blank lines of a jsonl file."""

  kind = "jsonl"

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
    return json_text.parse(self._line(index), self.where(index))

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
