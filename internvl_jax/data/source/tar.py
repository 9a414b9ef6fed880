"""Tar files as WebDataset writes them: files of one name, and other suffixes, are a record.

    0001.json  {"conversations": [...]}          {"image": [bytes of 0001.jpg], "conversations": [...]}
    0001.jpg                                ->
    0002.json  ...

The headers are read once; then any record is read by where it is in the file. The members of a record stand side by side.
"""

import contextlib
import itertools
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from internvl_jax.data.source import json_text
from internvl_jax.data.source.media import IMAGES, VIDEOS, Content, is_image_name, is_video_name
from internvl_jax.data.source.spans import RecordFile, Spans
from internvl_jax.data.where import DataError, Where

_BLOCK = 512
# Read at once where headers are looked for: small members lie several in it, large ones are not read for nothing.
_AHEAD, _ALONE = 1 << 16, 1 << 12
_REGULAR = b"0\x007"
_SEARCHED = 1000
# Members that are texts by their suffixes, beside .json; WebDataset's names.
_TEXTS = ("txt", "text", "caption")
# What a line that has an image or a video contains, and the members that a record has instead.
_SUFFIXES_OF = {b'"image': IMAGES, b'"video': VIDEOS}


class _BrokenError(Exception):
  """The file is no tar, or ends early: what is wrong."""


class Member(NamedTuple):
  """A file in a tar.

  Attributes:
    name: with its folders.
    first: the first byte of its first header.
    start: the first byte of its content.
    size: bytes of its content.
  """

  name: str
  first: int
  start: int
  size: int

  @property
  def end(self) -> int:
    """The byte after its last block."""
    return self.start + -(-self.size // _BLOCK) * _BLOCK

  @property
  def key(self) -> str:
    """The key of a record, which all of its members' names begin with: up to the first dot of the file's name."""
    folder, slash, name = self.name.rpartition("/")
    return f"{folder}{slash}{name.partition('.')[0]}"

  @property
  def suffix(self) -> str:
    """The member's extension, which follows that dot, in small letters."""
    return self.name.rpartition("/")[2].partition(".")[2].lower()


class TarFile(RecordFile):
  """The records of a tar, by number."""

  kind = "WebDataset tar"

  def find(self) -> Spans:
    """Finds where the members of each record begin and end, by the headers alone."""
    with open(self.local, "rb", buffering=0) as file:
      try:
        found = itertools.chain.from_iterable(_record_spans(members(_reader(file))))
        bounds = np.fromiter(found, np.int64)
        if len(bounds) and bounds[-1] - _BLOCK >= self.state[0]:
          raise _BrokenError("the tar ends early")
      except _BrokenError as error:
        raise DataError(f"{self.path}: dataset {self.dataset!r}: {error.args[0]}; restore it") from None
    return Spans(*bounds.reshape(-1, 2).T.copy())

  def read(self, index: int) -> Any:
    """Reads a record: its JSON, with the bytes of the pictures and videos beside it.

    Raises:
      DataError: the JSON is broken or names other media than there are, or the file was changed.
    """
    where, (first, end) = self.where(index), self.span(index)
    try:
      content = self.read_bytes(first, end)
      found = list(members(lambda place, size: content[place : place + size]))
    except OSError as error:
      raise self._unreadable(error, where) from error
    except _BrokenError as error:
      raise where.error(
        f"the file was changed after its records were found ({error.args[0]}); start the run again"
      ) from None
    return record_of([(m, content[m.start : m.start + m.size]) for m in found], self.path, where)

  def containing(self, text: bytes) -> Iterator[int]:
    """Yields, ascending, the records that contain a text, or have a picture or a video that it stands for."""
    suffixes = _SUFFIXES_OF.get(text, ())
    pattern = re.compile(
      b"|".join([re.escape(text), *(rb"\.%s[\0\n]" % suffix.encode() for suffix in suffixes)])
    )
    last, (starts, ends, _) = -1, self._spans
    try:
      with open(self.local, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for found in pattern.finditer(content):
          index = int(np.searchsorted(starts, found.start(), side="right")) - 1
          if index > last and found.start() < ends[index]:
            last = index
            yield index
    except OSError as error:
      raise self._unreadable(error) from error


def first_records(path: str) -> Iterator[Any]:
  """Parses the first records of a file, without an index; what is wrong about it is said when it is opened."""
  with contextlib.suppress(OSError, _BrokenError), open(path, "rb", buffering=0) as file:
    reader = _reader(file)
    for member in itertools.islice(members(reader), _SEARCHED):
      if member.suffix == "json":
        with contextlib.suppress(DataError):
          yield json_text.parse(reader(member.start, member.size), Where("", path, 0))


def records_in_order(file: BinaryIO, path: str, dataset: str) -> Iterator[tuple[int, Callable[[], Any]]]:
  """Yields the records of a tar that is read once, from its beginning: where each begins, and what makes it.

  Args:
    file: need not be seekable.
    path: as errors name it.
    dataset: its dataset, for errors.

  Raises:
    DataError: it is no tar, or ends early.
  """
  forward = _Forward(file)
  number = 0
  try:
    contents = ((m, _whole(forward, m.start, m.size)) for m in members(forward))
    for _, group in itertools.groupby(contents, lambda found: found[0].key):
      number += 1
      files = list(group)
      where = Where(dataset, path, number)
      yield files[0][0].first, lambda files=files, where=where: record_of(files, path, where)
  except _BrokenError as error:
    raise DataError(f"{path}: dataset {dataset!r}: {error.args[0]}; restore it") from None


# --- A record -----------------------------------------------------------------------------------------------


def record_of(files: list[tuple[Member, bytes]], path: str, where: Where) -> dict[str, Any]:
  """The record that the members of one name make.

  Args:
    files: the members with their content.
    path: of the tar.
    where: the record, for errors.

  Raises:
    DataError: the JSON is broken, is no object, or does not name the pictures or videos that are there.
  """
  record: dict[str, Any] = {}
  beside: dict[str, list[tuple[Member, Content]]] = {"image": [], "video": []}
  for member, content in files:
    if member.suffix == "json":
      found = json_text.parse(content, where, record="record")
      if not isinstance(found, dict):
        raise where.error(f"{member.name} must be a JSON object, got {type(found).__name__}; correct it")
      record |= found
    elif (kind := _media_kind(member.name)) is not None:
      beside[kind].append((member, Content(f"{path}/{member.name}", content)))
    elif member.suffix in _TEXTS:
      record.setdefault(member.suffix, content.decode("utf-8", errors="replace"))
  for kind, media in beside.items():
    if media:
      _put(record, kind, media, where)
  return record


def _media_kind(name: str) -> str | None:
  return "image" if is_image_name(name) else "video" if is_video_name(name) else None


def _put(record: dict[str, Any], kind: str, media: list[tuple[Member, Content]], where: Where) -> None:
  """Puts bytes in the places of a record where pictures or videos are named, or under `image` or `video`."""
  key = next((key for key in (kind, f"{kind}s") if record.get(key)), None)
  contents = [content for _, content in media]
  if key is None:
    record[kind] = contents[0] if kind == "video" and len(contents) == 1 else contents
    return
  named = record[key] if isinstance(record[key], list) else [record[key]]
  by_name = {_base(member.name): content for member, content in media}
  by_name |= {member.suffix: content for member, content in media}
  chosen = [by_name.get(_base(name)) if isinstance(name, str) else None for name in named]
  if not all(chosen):
    if len(named) != len(contents):
      raise where.error(
        f"{key!r} names {len(named)} files, and {len(contents)} are beside it in the tar, of other names; make them as many"
      )
    chosen = contents  # The names are those of before the tar was made.
  record[key] = chosen if isinstance(record[key], list) else chosen[0]


def _base(name: str) -> str:
  return name.rpartition("/")[2]


# --- The format ---------------------------------------------------------------------------------------------

Reader = Callable[[int, int], bytes]
"""Reads bytes of a file: (first byte, how many); fewer come only at its end."""


def members(read: Reader) -> Iterator[Member]:
  """Yields the files of a tar in order: POSIX (ustar and pax) and GNU's.

  Names that begin with `__` are WebDataset's own notes, and with `._` those of macOS: both are passed over.
  """
  place, first, named, sized = 0, 0, None, None
  while header := read(place, _BLOCK):
    if not header[0] and not header.strip(b"\0"):
      return  # The end has two empty blocks.
    if len(header) < _BLOCK:
      raise _BrokenError("the tar ends within a header")
    size, kind = _size_of(header, place), header[156]
    start = place + _BLOCK
    place = start + (size + _BLOCK - 1 & -_BLOCK)
    if kind in b"LxX":  # It names the next member, and says its size where that is large.
      long_name, long_size = _extended(_whole(read, start, size), kind)
      named, sized = long_name or named, long_size if long_size is not None else sized
      continue
    if kind in _REGULAR:
      if sized is not None:
        size, place = sized, start + (sized + _BLOCK - 1 & -_BLOCK)
      name = named or _name_of(header)
      if not _base(name).startswith(("__", "._")) and not name.endswith("/"):
        yield Member(name, first, start, size)
    if kind not in b"gK":
      first, named, sized = place, None, None


def _name_of(header: bytes) -> str:
  name = header[:100].partition(b"\0")[0]
  if header[345] and header[257:263] == b"ustar\0":
    name = header[345:500].partition(b"\0")[0] + b"/" + name
  return name.decode("utf-8", errors="surrogateescape")


def _size_of(header: bytes, place: int) -> int:
  field = header[124:136]
  try:
    if not field[11] and field[:11].isdigit():  # as most write it
      return int(field[:11], 8)
    if field[0] & 0x80:  # GNU: a binary number
      return int.from_bytes(field, "big") & (1 << 88) - 1
    return int(field.strip(b" \0") or b"0", 8)
  except ValueError:
    raise _BrokenError(f"no header of a tar at byte {place}") from None


def _extended(content: bytes, kind: int) -> tuple[str | None, int | None]:
  """The name and the size that a header before a member says."""
  if kind == ord("L"):
    return content.partition(b"\0")[0].decode("utf-8", errors="surrogateescape"), None
  name, size = None, None
  while content:
    length, _, rest = content.partition(b" ")
    if not length.isdigit() or not 0 < int(length) <= len(content):
      break
    entry, content = rest[: int(length) - len(length) - 1].rstrip(b"\n"), content[int(length) :]
    key, _, value = entry.partition(b"=")
    name = value.decode("utf-8", errors="surrogateescape") if key == b"path" else name
    size = int(value) if key == b"size" else size
  return name, size


def _whole(read: Reader, start: int, size: int) -> bytes:
  content = read(start, size)
  if len(content) < size:
    raise _BrokenError("the tar ends early")
  return content


def _record_spans(found: Iterable[Member]) -> Iterator[tuple[int, int]]:
  """Yields where the members of each record begin and end. Of millions, each step counts."""
  key, first, end = None, 0, 0
  for member in found:
    if member.key != key:
      if key is not None:
        yield first, end
      key, first = member.key, member.first
    end = member.end
  if key is not None:
    yield first, end


def _reader(file: BinaryIO) -> Reader:
  """Reads from an open file, ahead where small members lie side by side."""
  descriptor, start, ahead = file.fileno(), 0, b""

  def read(place: int, size: int) -> bytes:
    nonlocal start, ahead
    inside = place - start
    if inside < 0 or inside + size > len(ahead):
      near = 0 <= inside - len(ahead) < _AHEAD or inside < len(ahead)
      start, inside, ahead = place, 0, os.pread(descriptor, max(size, _AHEAD if near else _ALONE), place)
    return ahead[inside : inside + size]

  return read


class _Forward:
  """Reads from a file that cannot go back."""

  def __init__(self, file: BinaryIO):
    self._file, self._place = file, 0

  def __call__(self, place: int, size: int) -> bytes:
    """Skips to a place, and reads."""
    assert place >= self._place, "it is behind"
    while self._place < place:
      skipped = self._file.read(min(place - self._place, 1 << 20))
      if not skipped:
        return b""
      self._place += len(skipped)
    content = b""
    while len(content) < size and (more := self._file.read(size - len(content))):
      content += more
    self._place += len(content)
    return content
