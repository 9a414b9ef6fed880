"""Notes on decisions about a sample's images that change what is seen: no loss, but told once a dataset."""

import collections
from typing import NamedTuple

from internvl_jax.data.where import Where

SCALED, STORED, FIRST, HIDDEN = "scaled", "stored", "first", "hidden"
"""Kinds of notes: values of more than 8 bits were scaled; the image is taken as it is stored, though it asks to be turned;
the first of several frames was taken; colors under transparent pixels were taken."""


class Note(NamedTuple):
  """A remark about an image.

  Attributes:
    dataset: name of the dataset.
    kind: one of the kinds; the first of each kind is told of a dataset.
    message: one line that names line and file.
  """

  dataset: str
  kind: str
  message: str


def note(kind: str, where: Where, message: str) -> Note:
  """A note about a line."""
  return Note(where.dataset, kind, str(where.error(message)))


# Files named of each kind and dataset.
_NAMED = 5


class NotesShown:
  """The first notes of each kind of a dataset, and how many more there are."""

  def __init__(self) -> None:
    """Begins without any."""
    self._first: dict[tuple[str, str], list[str]] = {}
    self._counts: collections.Counter[tuple[str, str]] = collections.Counter()

  def add(self, note: Note) -> None:
    """Takes a note."""
    of = note.dataset, note.kind
    self._counts[of] += 1
    if len(first := self._first.setdefault(of, [])) < _NAMED:
      first.append(note.message)

  def lines(self) -> list[str]:
    """A line for each of the first notes, and one for the others."""
    lines = []
    for of, first in self._first.items():
      more = self._counts[of] - len(first)
      lines += first + ([f"and {more:,} more of dataset {of[0]!r} likewise"] if more else [])
    return lines
