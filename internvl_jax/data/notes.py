"""What was decided about a sample's images that changes what is seen: no loss, but told once a dataset."""

from typing import NamedTuple

from internvl_jax.data.errors import Where

SCALED, STORED, FIRST, HIDDEN = "scaled", "stored", "first", "hidden"
"""Kinds of notes: values of more than 8 bits were scaled; the image is taken as it is stored, though it asks to be turned;
the first of several frames was taken; colours under transparent pixels were taken."""


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
  """Returns a note about a line."""
  return Note(where.dataset, kind, str(where.error(message)))
