"""Images and videos: files, URLs, members of a zip, or bytes that a record brings along."""

import base64
import binascii
import dataclasses
import functools
import os
import re
import zipfile
from collections.abc import Mapping
from typing import Any

from internvl_jax.data.source import files
from internvl_jax.data.where import DataError, Where


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
  """The bytes of an image or a video: a member of a tar or zip, a cell of a table, or what was fetched from a URL.

  Attributes:
    name: what errors call it, e.g. "shard-0.tar/0001.jpg"; the suffix of a gif or of frames is looked at.
    content: the bytes of the file.
  """

  name: str
  content: bytes


Media = str | Content
"""An image or a video: its path, its URL, or its bytes."""

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "jfif", "avif", "ppm", "jp2")
VIDEOS = ("mp4", "mov", "avi", "mkv", "webm", "m4v", "mpg", "mpeg", "flv", "wmv")
"""Suffixes of images, and of videos."""

# What files begin with that have no name, and the suffix that a name would have.
_SUFFIXES = (
  (b"\xff\xd8\xff", ".jpg"),
  (b"\x89PNG", ".png"),
  (b"GIF8", ".gif"),
  (b"BM", ".bmp"),
  (b"II*\0", ".tif"),
  (b"MM\0*", ".tif"),
)
_DATA_URL = re.compile(r"data:[\w.+-]*/?[\w.+-]*(;[\w=.+-]+)*;base64,", re.IGNORECASE)
# How JPEG, PNG, GIF, WebP and BMP begin in base64; a JPEG's looks like a path.
_BASE64 = re.compile(r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk[0-3])[A-Za-z0-9+/=\r\n]*\Z")
_LEAST_BASE64 = 64


def name_of(media: Media) -> str:
  """The name of an image or a video in errors."""
  return media if isinstance(media, str) else media.name


def is_image_name(name: str) -> bool:
  """Whether a file is an image by its suffix."""
  return name.lower().rpartition(".")[2] in IMAGES


def is_video_name(name: str) -> bool:
  """Whether a file is a video by its suffix."""
  return name.lower().rpartition(".")[2] in VIDEOS


def join(root: str, media: Media, where: Where) -> Media:
  """The media that a record names: a path is relative to the dataset's root; bytes are the file's content.

  A path may lead into a zip: `pictures.zip/cats/1.jpg`, or `cats/1.jpg` where the root is a zip.

  Args:
    root: the dataset's root, a folder, a zip, or a URL.
    media: as the record has it.
    where: the record, for errors.

  Raises:
    DataError: a path leads out of the root, or into a zip that has no such file.
  """
  if not isinstance(media, str):
    return media
  path = files.join(root, media, where)
  return _member(path, where) if ".zip/" in path.lower() else path


def may_exist(path: str) -> bool:
  """Whether a local file or folder is there, or the zip that it would be in."""
  archive, mark, _ = path.lower().partition(".zip/")
  # Not pathlib's exists, which raises for a path that is too long.
  return os.path.exists(path[: len(archive) + len(".zip")] if mark else path)


def is_media(value: object) -> bool:
  """Whether a record's value names an image or a video: a path that is not empty, or bytes."""
  return isinstance(value, Content) or (isinstance(value, str) and bool(value))


def media_of(value: Any, what: str, where: Where) -> Any:
  """Reads a value of a record: a path or URL, or the bytes of a file, in any of the ways in which tables say them.

      {"bytes": b"...", "path": "a.jpg"}, b"...", "data:image/png;base64,iVBOR...", "iVBORw0KGgo..." -> Content
      {"path": "a.jpg"}, {"url": "a.jpg"} -> "a.jpg"

  Args:
    value: of the record; what is none of these is returned as it is.
    what: it is, for errors: "image 1".
    where: the record, for errors.

  Raises:
    DataError: the base64 is broken.
  """
  if isinstance(value, str):
    mark = _DATA_URL.match(value)
    if mark is None and (len(value) < _LEAST_BASE64 or not _BASE64.match(value)):
      return value
    return _named(_decoded(value[mark.end() if mark else 0 :], what, where), what)
  if isinstance(value, bytes | bytearray | memoryview):
    return _named(bytes(value), what)
  if isinstance(value, Mapping):
    return _of_mapping(value, what, where)
  return value


def described(value: Any) -> Any:
  """A record's value with names in place of bytes, so that it can be written as JSON."""
  if isinstance(value, Content):
    return value.name
  if isinstance(value, bytes | bytearray | memoryview):
    return f"{len(value)} bytes"
  if isinstance(value, dict):
    return {key: described(entry) for key, entry in value.items()}
  return [described(entry) for entry in value] if isinstance(value, list) else value


def _of_mapping(value: Mapping[str, Any], what: str, where: Where) -> Any:
  rest = {key: entry for key, entry in value.items() if entry not in (None, "")}
  if (content := rest.get("bytes")) is not None:
    name = rest.get("path")
    content = content.encode() if isinstance(content, str) else content
    if isinstance(value["bytes"], str):  # JSON has no bytes
      content = _decoded(value["bytes"], what, where)
    return Content(str(name), bytes(content)) if name else _named(bytes(content), what)
  if len(rest) == 1 and (key := next(iter(rest))) in ("path", "url"):
    return media_of(rest[key], what, where)
  return value


def _decoded(text: str, what: str, where: Where) -> bytes:
  try:
    return base64.b64decode(re.sub(r"\s", "", text), validate=True)
  except (binascii.Error, ValueError) as error:
    raise where.error(f"{what} is broken base64 ({error}); correct it or delete the line") from None


def _named(content: bytes, what: str) -> Content:
  """Bytes with a name whose suffix says what they are."""
  suffix = next((suffix for mark, suffix in _SUFFIXES if content.startswith(mark)), None)
  if suffix is None:
    webp = content[:4] == b"RIFF" and content[8:12] == b"WEBP"
    suffix = ".webp" if webp else ".jpg" if what.startswith("image") else ".mp4"
  return Content(f"{what}{suffix}", content)


# --- Members of zips ----------------------------------------------------------------------------------------


def _member(path: str, where: Where) -> Media:
  """A file in a zip, where a part of the path is one; else the path."""
  place = path.lower().index(".zip/") + len(".zip")
  archive, inner = path[:place], path[place + 1 :]
  if files.is_remote(path):
    raise where.error(
      f"{path}: members of a zip on another machine are not read one by one; unpack it there, or copy it here"
    )
  if not os.path.isfile(archive):
    return path
  try:
    status = os.stat(archive)
    return Content(path, _opened(archive, status.st_size, status.st_mtime_ns).read(inner))
  except KeyError:
    raise where.error(f"image not found: {path}: the zip has no such file; check {where.root}") from None
  except DataError:
    raise
  except Exception as error:  # zipfile and zlib have no list of what damage raises
    raise where.error(f"{path} cannot be read from the zip: {error}; restore the zip") from error


@functools.lru_cache(maxsize=8)
def _opened(archive: str, size: int, changed: int) -> zipfile.ZipFile:
  """An open zip: its directory is read once in each process; threads may read at once."""
  del size, changed  # Another file of the name is opened anew.
  return zipfile.ZipFile(archive)
