"""JSON arrays: one list over the whole file, as LLaVA's; an entry is a record, found by where it is in the file."""

import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from internvl_jax.data.source import json_text
from internvl_jax.data.source.spans import RecordFile, Spans
from internvl_jax.data.where import DataError

# Read at a time, beside what is left of an entry.
_CHUNK = 1 << 20
# An error so near to the end of what was read may be of the reading: a word, a number or an escape was cut.
_CUT = 16
_GAP = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"
_SEARCHED = 1000

# Finds where a value ends. Bytes are read as Latin-1, one character each: what is not ASCII is within strings.
_SCAN = json.JSONDecoder(strict=False).raw_decode


class _BrokenError(Exception):
  """The file is no array: the place of a byte, and what is wrong there."""


class JsonArray(RecordFile):
  """The entries of a JSON array. Errors name an entry by its number, from 1."""

  kind = "JSON array"

  def find(self) -> Spans:
    """Finds the entries in one pass, with no more than one of them in memory."""
    try:
      with open(self.local, "rb") as file:
        found = np.fromiter(itertools.chain.from_iterable(_entries(file)), np.int64)
    except _BrokenError as error:
      place, what = error.args
      raise DataError(
        f"{self.path}:{self._line_of(place)}: dataset {self.dataset!r}: broken JSON at byte {place}: {what}; correct it"
      ) from None
    return Spans(*found.reshape(-1, 2).T.copy())

  def read(self, index: int) -> Any:
    """Parses an entry.

    Raises:
      DataError: the entry says two things under one name, or the file was changed.
    """
    start, end = self.span(index)
    try:
      text = self.read_bytes(start, end)
    except OSError as error:
      raise self._unreadable(error, self.where(index)) from error
    return json_text.parse(text, self.where(index), record="entry")

  def _line_of(self, place: int) -> int:
    """The line of the file that a byte is in, from 1."""
    with open(self.local, "rb") as file:
      blocks = iter(lambda: file.read(min(_CHUNK, place - file.tell())), b"")
      return 1 + sum(block.count(b"\n") for block in blocks)


def first_records(path: str) -> Iterator[Any]:
  """Parses the first entries of a file, without an index; what is wrong about it is said when it is opened."""
  with contextlib.suppress(OSError, _BrokenError), open(path, "rb") as file:
    for start, end in itertools.islice(_entries(file), _SEARCHED):
      place = file.tell()
      file.seek(start)
      text = file.read(end - start)
      file.seek(place)
      with contextlib.suppress(ValueError, RecursionError):
        yield json.loads(text)


def _entries(file: BinaryIO) -> Iterator[tuple[int, int]]:
  """Yields the first byte of each entry, and the one after its last."""
  window = _Window(file)
  window.expect("[")
  if window.skips("]"):
    return
  while True:
    yield window.value()
    if not window.skips(","):
      break
  window.expect("]")
  if rest := window.peek():
    raise _BrokenError(window.place, f"{rest!r} after the list's end")


class _Window:
  """A part of a file as text, which moves on over it."""

  def __init__(self, file: BinaryIO):
    self._file = file
    bom = file.read(len(_BOM))
    self._text = "" if bom == _BOM else bom.decode("latin-1")
    self._start = len(bom) - len(self._text)  # of the text, in the file
    self._at = 0  # in the text

  @property
  def place(self) -> int:
    """The next byte of the file."""
    return self._start + self._at

  def peek(self) -> str:
    """The next character that is no white space; "" at the end."""
    while True:
      gap = _GAP.match(self._text, self._at)
      assert gap is not None
      self._at = gap.end()
      if self._at < len(self._text) or not self._more():
        return self._text[self._at : self._at + 1]

  def skips(self, mark: str) -> bool:
    """Goes past a mark, if it comes next."""
    if self.peek() != mark:
      return False
    self._at += 1
    return True

  def expect(self, mark: str) -> None:
    """Goes past a mark."""
    found = self.peek()
    if not self.skips(mark):
      raise _BrokenError(
        self.place, f"expected {mark!r}, got {repr(found) if found else 'the end of the file'}"
      )

  def value(self) -> tuple[int, int]:
    """Goes past a value, which is read until all of it is there."""
    self.peek()
    while True:
      try:
        _, end = _SCAN(self._text, self._at)
      except RecursionError:
        raise _BrokenError(self.place, "thousands of brackets") from None
      except json.JSONDecodeError as error:
        place = self._start + error.pos
        inside = error.pos < len(self._text) - _CUT and not error.msg.startswith("Unterminated")
        if inside or not self._more():
          raise _BrokenError(place, error.msg) from None
      except ValueError as error:  # a number of thousands of digits
        raise _BrokenError(self.place, str(error)) from None
      else:
        if end < len(self._text) or not self._more():  # A number may go on.
          first, self._at = self.place, end
          return first, self.place

  def _more(self) -> bool:
    """Reads on; drops what is behind."""
    # As much again as is waiting, so that an entry of any size is looked at a few times only.
    block = self._file.read(max(_CHUNK, len(self._text) - self._at))
    self._text = self._text[self._at :] + block.decode("latin-1")
    self._start, self._at = self._start + self._at, 0
    return bool(block)
