"""Folders of a bucket as folders of this machine: small files brought here, large ones as pointers to their objects.

    gs://bucket/model/                      ~/.cache/internvl_jax/models/model-0123456789abcdef/
      config.json                             config.json
      tokenizer.json                          tokenizer.json
      model-00001-of-00004.safetensors        model-00001-of-00004.safetensors: a pointer, read by `RangedTensors`

What reads folders, libraries too, needs to know of no buckets. A folder here is of one state of the bucket: sizes and
checksums of the objects are in its name and in its pointers. It is there as a whole or not at all, and is never written
to again. Messages call it by its URL.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from internvl_jax import errors
from internvl_jax.errors import UserError
from internvl_jax.storage import remote
from internvl_jax.storage.paths import BucketPath, Stat, files_in

_MARK = b"pointer of internvl_jax to an object of a bucket\n"
_MOST_BYTES = 2**12
"""Longest pointer."""

_urls: dict[str, BucketPath] = {}
"""The folders that this process made or found, by their absolute paths."""


class Pointer(NamedTuple):
  """An object of a bucket.

  Attributes:
    url: its URL.
    size: bytes.
    checksum: what changes with its content, see `Stat`.
  """

  url: str
  size: int
  checksum: str


def default_cache() -> str:
  """The folder of caches where none is named."""
  return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "internvl_jax")


def read_pointer(path: Path) -> Pointer | None:
  """The object that a file points to; None if it is no pointer."""
  try:
    with path.open("rb") as file:
      content = file.read(_MOST_BYTES)
  except OSError:
    return None  # Whoever reads it reports why it cannot be read.
  return Pointer(*json.loads(content[len(_MARK) :])) if content.startswith(_MARK) else None


def url_of(folder: Path) -> BucketPath | None:
  """The folder of a bucket that a local folder is a snapshot of; None if it is none."""
  return _urls.get(str(folder))


def snapshot(url: BucketPath, *, brought: Sequence[str], pointed: Sequence[str], most_bytes: int) -> Path:
  """The local snapshot of a bucket's folder as it is now, or the file of a single object.

  Args:
    url: the folder, or the object.
    brought: patterns of the names of files that are copied.
    pointed: patterns of the names of files that become pointers.
    most_bytes: larger files are not copied, but left out.

  Raises:
    UserError: nothing is there, it cannot be read, or the cache cannot be written.
  """
  with explained(url):
    found = files_in(url)
    single = not found and url.is_file()
    if single:
      found = {url.name: url.stat()}
  if not found:
    raise UserError(f"{url}: nothing is there; correct the URL, or copy the files there")
  folder = url.parent if single else url
  copied = {
    name: stat for name, stat in sorted(found.items()) if _fits(name, brought) and stat.st_size <= most_bytes
  }
  pointers = {
    name: Pointer(str(folder / name), stat.st_size, stat.checksum)
    for name, stat in sorted(found.items())
    if _fits(name, pointed)
  }
  if single and not copied and not pointers:
    raise UserError(
      f"{url}: a file of {found[url.name].st_size:,} bytes that is not read from a bucket; name a *.safetensors file"
    )
  place = _place(url, {**copied, **pointers})
  errors.call(str(place), str(folder))
  _urls[str(place)] = folder
  if not place.is_dir():
    _make(place, folder, copied, pointers)
  return place / url.name if single else place


def _fits(name: str, patterns: Sequence[str]) -> bool:
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _place(url: BucketPath, content: Mapping[str, Stat | Pointer]) -> Path:
  """The folder of a snapshot; other content of the same URL has another folder."""
  told = json.dumps([str(url), {name: list(entry) for name, entry in content.items()}], sort_keys=True)
  stem = re.sub(r"\W+", "_", url.name)[:40]
  name = f"{stem}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
  return Path(os.path.abspath(os.path.join(default_cache(), "models", name)))


def _make(
  place: Path, folder: BucketPath, copied: Mapping[str, Stat], pointers: Mapping[str, Pointer]
) -> None:
  """Fills a folder under a temporary name. Several processes may: one of them is the first, and all get the same."""
  temporary = place.with_name(f"{place.name}.{uuid.uuid4().hex}.tmp")
  try:
    with _cache_errors_named():
      temporary.mkdir(parents=True)
    for name, stat in copied.items():
      with explained(folder / name):
        content = (folder / name).read_bytes()
      if len(content) < stat.st_size:  # What a store keeps compressed arrives unpacked.
        raise UserError(
          f"{folder / name}: {len(content):,} bytes came of {stat.st_size:,}; it is being written, or damaged: try again"
        )
      with _cache_errors_named():
        (temporary / name).write_bytes(content)
    with _cache_errors_named():
      for name, pointer in pointers.items():
        (temporary / name).write_bytes(_MARK + json.dumps(pointer).encode())
      for path in temporary.iterdir():
        os.utime(path, (0, 0))  # Local dates do not show which object is newer.
      _rename(temporary, place)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _rename(source: Path, target: Path) -> None:
  try:
    source.rename(target)
  except OSError:
    if not target.is_dir():  # Else another process was first.
      raise


@contextlib.contextmanager
def explained(url: BucketPath) -> Iterator[None]:
  """Turns a store's error about an object that existed before into one line."""
  try:
    yield
  except FileNotFoundError:
    raise UserError(f"{url}: is no longer there; copy it there again") from None
  except remote.FetchError as error:
    line = str(error)
    raise UserError(line if line.startswith(str(url)) else f"{url}: {line}") from error


@contextlib.contextmanager
def _cache_errors_named() -> Iterator[None]:
  """Turns what the system refuses into a line that blames the folder of caches."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f"{default_cache()}: cannot hold the config and tokenizer of a model of a bucket ({error.strerror or error}); set "
      "XDG_CACHE_HOME to a folder with free space that may be written to"
    ) from error
