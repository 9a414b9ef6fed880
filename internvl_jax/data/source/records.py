"""Where records come from: what is asked of an annotation file, and the kinds of them that there are.

A new kind is a file of this folder, with a class as `Records` asks for, and a line in `KINDS`.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from internvl_jax.data.source import files, jsonl
from internvl_jax.data.where import Where


class Records(Protocol):
  """The records of an annotation file by number, from 0: an image or a video with what is said about it.

  Any record is read at any time, by any thread, and by worker processes, which get a pickled copy. A record is what
  `docs/data.md` says of a line: {"image": ..., "conversations": [...]}, where the image or video may be its path, its
  URL, or its bytes (see `media.Media`).

  `RecordFile` has all of this but `read` for records that are ranges of bytes of one file.

  Attributes:
    path: of the file, as it was named; errors blame it.
    dataset: the name of its dataset, for errors.
    state: integers that change when the file does: the index of sizes keeps them.
  """

  path: str
  dataset: str
  state: tuple[int, int]

  def __len__(self) -> int: ...

  def read(self, index: int) -> Any:
    """Reads a record. Raises DataError where it is broken, or the file has changed."""
    ...

  def where(self, index: int) -> Where:
    """The place of a record, for errors about it."""
    ...

  def containing(self, text: bytes) -> Iterator[int]:
    """Yields, ascending, the records whose bytes contain a text; others may be among them."""
    ...

  def checksum(self, start: int, stop: int) -> int:
    """A number, never 0, that differs when the records from `start` to before `stop` do: fast, it is asked often."""
    ...

  def digest_records(self, start: int, stop: int) -> str:
    """16 hexadecimal digits that tell the records from `start` to before `stop` from any others."""
    ...

  def digest(self) -> str:
    """The SHA-256, in hex, of all."""
    ...

  def stamp(self) -> tuple[str, int, int, int, int]:
    """What changes whenever the file is written to, put back or replaced: path, inode, size and two dates."""
    ...

  def check_unchanged(self) -> None:
    """Raises DataError where the file is not what it was when it was opened."""
    ...

  def close(self) -> None:
    """Closes the file; the next read opens it again."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
  """A kind of annotation file.

  Attributes:
    open: opens one: `open(path, dataset, cache=folder, root=setting)`, where errors about media name the setting.
    first_records: yields parsed records at the beginning of a local file, without an index and without an error: by
      the media that they name it is told what a dataset's relative root is meant from.
    suffixes: ends of file names, with the dot, by which it is known.
    key: under which a meta file names it. Of one key, the first kind is that of all other suffixes.
  """

  open: Callable[..., Records]
  first_records: Callable[[str], Iterator[Any]]
  suffixes: tuple[str, ...] = ()
  key: str = "annotation"


KINDS: tuple[Kind, ...] = (Kind(open=jsonl.JsonlFile, first_records=jsonl.first_records),)


def keys() -> tuple[str, ...]:
  """The keys under which an entry of a meta file may name its records."""
  return tuple(dict.fromkeys(kind.key for kind in KINDS))


def kind_of(path: str, key: str = "annotation") -> Kind:
  """The kind of an annotation file, by the key that names it and its suffix."""
  candidates = [kind for kind in KINDS if kind.key == key]
  suffix = files.suffix(path).lower()
  return next((kind for kind in candidates if suffix in kind.suffixes), candidates[0])


def open_records(
  path: str,
  dataset: str,
  *,
  key: str = "annotation",
  cache: str | os.PathLike[str] | None = None,
  root: str | None = None,
) -> Records:
  """Opens an annotation file.

  Args:
    path: of the file, or its URL.
    dataset: the name that errors use.
    key: under which a meta file names it.
    cache: folder of caches; None keeps nothing but a remote file's copy, in `files.default_cache()`.
    root: the setting that says where its media are, where that is not the meta file.

  Raises:
    DataError: the file is missing, unreadable, of another format, or has no record.
  """
  return kind_of(path, key).open(path, dataset, cache=cache, root=root)
