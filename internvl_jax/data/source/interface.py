"""The interface of an annotation file."""

from collections.abc import Iterator
from typing import Any, Protocol

from internvl_jax.data.where import Where


class Records(Protocol):
  """The records of an annotation file by number, from 0: an image or a video with what is said about it.

  Any record is read at any time, by any thread, and by worker processes, which get a pickled copy. A record is what
  `docs/data.md` says of a line: {"image": ..., "conversations": [...]}, where the image or video may be its path, its
  URL, or its bytes (see `media.Media`).

  `RecordFile` has all of this but `read` for records that are ranges of bytes of one file.

  Attributes:
    kind: what such a file is called where datasets are listed.
    path: of the file, as it was named; errors blame it.
    dataset: the name of its dataset, for errors.
    state: integers that change when the file does: the index of sizes keeps them.
  """

  @property
  def kind(self) -> str: ...

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
    """A stamp of the file, which changes whenever it is written to, put back or replaced: path, inode, size and two dates."""
    ...

  def check_unchanged(self) -> None:
    """Raises DataError where the file is not what it was when it was opened."""
    ...

  def close(self) -> None:
    """Closes the file; the next read opens it again."""
    ...

  def release(self) -> None:
    """Lets the file go, also while other threads read it."""
    ...
