"""The processes of a run that open the same data at the same time, and share the work of measuring them."""

import dataclasses
import json
import pathlib
import time
import uuid
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from internvl_jax.data.where import DataError, SharedDataError

Gather = Callable[[bytes], list[bytes]]
"""All-gathers bytes of any length, in the order of the processes; see `parallel.distributed.all_gather_bytes`."""

# What a crash left behind.
_STALE_SECONDS = 86400.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
  """The processes of a run, as one of them sees them. All of them make the same calls in the same order.

  Attributes:
    me: the number of this one.
    count: how many there are.
    gather: all-gathers bytes.
  """

  me: int = 0
  count: int = 1
  gather: Gather = lambda part: [part]

  def together(self, work: Callable[[], bytes]) -> list[bytes]:
    """All-gathers what each process makes; the DataError of one is raised by all.

    Raises:
      SharedDataError: of the first process that has one. Where there is but one, its own.
    """
    if self.count == 1:
      return [work()]
    failed: DataError | None = None
    try:
      part = b"+" + work()
    except DataError as error:
      failed, part = error, b"-" + str(error).encode()
    parts = self.gather(part)
    for process, found in enumerate(parts):
      if found.startswith(b"-"):
        text = found[1:].decode(errors="replace")
        raise SharedDataError(f"process {process} of {self.count}: {text}") from failed
    return [found[1:] for found in parts]

  def rounds(self, parts: Iterable[bytes], take: Callable[[list[bytes]], None]) -> None:
    """All-gathers a part of each process, again and again until none has another.

    Args:
      parts: of this process, not empty.
      take: is called with those of the others after each round.

    Raises:
      SharedDataError: a process cannot make its next part, or take in the last ones.
    """
    mine, theirs = iter(parts), []

    def work() -> bytes:
      take([part for part in theirs if part])
      return next(mine, b"")

    while any(everyone := self.together(work)):
      theirs = [part for process, part in enumerate(everyone) if process != self.me]


ALONE = Hosts()
"""A run of one process."""


def packed(header: Any, *arrays: np.ndarray) -> bytes:
  """A JSON value and arrays as compressed bytes; see `unpacked`."""
  text = json.dumps(header).encode()
  return zlib.compress(b"\n".join([text, b"".join(array.tobytes() for array in arrays)]), 1)


def unpacked(part: bytes) -> tuple[Any, bytes]:
  """The JSON value, and the bytes of the arrays one after another."""
  text, _, rest = zlib.decompress(part).partition(b"\n")
  return json.loads(text), rest


class Sign:
  """A file by which processes find out that they have one folder, whatever each calls it and wherever it is mounted.

  A name that lasted would not do: caches are copied from host to host.
  """

  def __init__(self, folder: pathlib.Path):
    """Puts it up."""
    self._folder, self.name = folder / "hosts", uuid.uuid4().hex
    self._folder.mkdir(exist_ok=True)
    for path in self._folder.iterdir():
      if path.stat().st_mtime < time.time() - _STALE_SECONDS:
        path.unlink(missing_ok=True)
    (self._folder / self.name).touch()

  def first_of(self, names: list[str]) -> int:
    """The first of the processes with these signs that has this folder."""
    return next(i for i, name in enumerate(names) if name == self.name or (self._folder / name).exists())

  def take_down(self) -> None:
    """Removes it, once all have looked."""
    (self._folder / self.name).unlink(missing_ok=True)
