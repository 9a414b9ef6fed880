"""Images and videos: files, URLs, or bytes that a record brings along."""

import dataclasses

from internvl_jax.data.source import files
from internvl_jax.data.where import Where


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
  """The bytes of an image or a video: a member of a tar, a cell of a parquet file, or what was fetched from a URL.

  Attributes:
    name: what errors call it, e.g. "shard-0.tar/0001.jpg"; the suffix of a gif or of frames is looked at.
    content: the bytes of the file.
  """

  name: str
  content: bytes


Media = str | Content
"""An image or a video: its path, its URL, or its bytes."""


def name_of(media: Media) -> str:
  """What errors call an image or a video."""
  return media if isinstance(media, str) else media.name


def join(root: str, media: Media, where: Where) -> Media:
  """The media that a record names: a path is relative to the dataset's root; bytes are the file's content.

  Args:
    root: the dataset's root, a folder or a URL.
    media: as the record has it.
    where: the record, for errors.

  Raises:
    DataError: a path leads out of the root.
  """
  return files.join(root, media, where) if isinstance(media, str) else media


def is_media(value: object) -> bool:
  """Whether a record's value names an image or a video: a path that is not empty, or bytes."""
  return isinstance(value, Content) or (isinstance(value, str) and bool(value))
