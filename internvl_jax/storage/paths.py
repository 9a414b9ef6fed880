"""Paths of what a run writes: of a folder of this machine, or of a bucket.

`path_of` gives for a name either Python's own `Path`, or a `BucketPath`, which has the same methods as far as they are
used here. Who writes a file as a whole, and needs no part of it to change, need not know which one it has.
"""

import base64
import concurrent.futures
import contextlib
import fnmatch
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from absl import logging

from internvl_jax.errors import UserError
from internvl_jax.storage import remote
from internvl_jax.storage.remote import FetchError

T = TypeVar("T")

SCHEMES = ("gs", "s3")
"""Object stores that a run can write to. Each object is there as a whole or not at all, and is seen at once by all."""


MIRROR_SECONDS = 60
"""How often files that grow are sent: an object is replaced as a whole."""


class Stat(NamedTuple):
  """What a store knows of an object.

  Attributes:
    st_size: bytes, by the name that `os.stat` has for it.
    checksum: "md5=" and what the store has computed of the content, in hexadecimal digits; or "etag=" and what changes
      with the content, but may have another value for the same content elsewhere; or empty.
  """

  st_size: int
  checksum: str


class BucketError(FetchError, UserError):
  """A request to a bucket failed; the message is one line: the object, the cause and what to do."""


class BucketPath:
  """The path of an object, or of all those whose names begin with it and a slash: a folder, that needs not be made.

  It is no `os.PathLike`: what knows nothing of buckets refuses it, and makes no folder called "gs:".
  """

  def __init__(self, url: str):
    """Looks nothing up.

    Args:
      url: `gs://bucket/name` or `s3://bucket/name`.
    """
    scheme, _, rest = url.partition("://")
    self._scheme, self._path = scheme.lower(), PurePosixPath(rest)

  def __str__(self) -> str:
    return f"{self._scheme}://{self._path}"

  def __repr__(self) -> str:
    return f"BucketPath({str(self)!r})"

  def __eq__(self, other: object) -> bool:
    return isinstance(other, BucketPath) and str(self) == str(other)

  def __hash__(self) -> int:
    return hash(str(self))

  def __truediv__(self, name: str) -> "BucketPath":
    return BucketPath(f"{self._scheme}://{self._path / name}")

  @property
  def name(self) -> str:
    """Its last part."""
    return self._path.name

  @property
  def suffix(self) -> str:
    """The end of its last part, from the last dot on."""
    return self._path.suffix

  @property
  def parent(self) -> "BucketPath":
    """The folder that it is in; of a bucket, the bucket."""
    up = self._path.parent
    return self if up == PurePosixPath(".") else BucketPath(f"{self._scheme}://{up}")

  def absolute(self) -> "BucketPath":
    """Itself."""
    return self

  def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
    """Does nothing: folders are there where there are objects in them."""
    del parents, exist_ok

  def exists(self) -> bool:
    """Whether there is such an object, or one below it."""
    return self._info() is not None

  def is_dir(self) -> bool:
    """Whether there is an object below it."""
    info = self._info()
    return info is not None and info["type"] == "directory"

  def is_file(self) -> bool:
    """Whether there is such an object."""
    info = self._info()
    return info is not None and info["type"] != "directory"

  def is_symlink(self) -> bool:
    """There are none."""
    return False

  def stat(self) -> Stat:
    """What the store knows of the object.

    Raises:
      FileNotFoundError: there is none.
    """
    return _stat(self._ask(lambda system: system.info(str(self))))

  def iterdir(self) -> Iterator["BucketPath"]:
    """What is directly in it; nothing where it is not there."""
    with contextlib.suppress(FileNotFoundError):
      entries = self._ask(lambda system: system.ls(str(self), detail=True))
      mine = str(self._path)
      names = {entry["name"].rstrip("/") for entry in entries} - {mine}
      yield from (self / name.rpartition("/")[2] for name in sorted(names))

  def glob(self, pattern: str) -> Iterator["BucketPath"]:
    """What is directly in it and has such a name."""
    return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

  def read_bytes(self) -> bytes:
    """The whole content."""
    return self._ask(lambda system: system.cat_file(str(self)))

  def read_range(self, start: int, end: int) -> bytes:
    """A part of the content."""
    return self._ask(lambda system: system.cat_file(str(self), start=start, end=end))

  def read_text(self, encoding: str = "utf-8") -> str:
    """The whole content as text."""
    return self.read_bytes().decode(encoding)

  def write_bytes(self, content: bytes) -> None:
    """Makes the object, or replaces it."""
    with _bucket_is_there(self):
      self._ask(lambda system: system.pipe_file(str(self), content))

  def write_text(self, content: str, encoding: str = "utf-8") -> None:
    """Makes the object, or replaces it."""
    self.write_bytes(content.encode(encoding))

  def unlink(self, missing_ok: bool = False) -> None:
    """Deletes the object."""
    try:
      self._ask(lambda system: system.rm_file(str(self)))
    except FileNotFoundError:
      if not missing_ok:
        raise

  def _ask(self, request: Callable[[Any], T]) -> T:
    return _ask(self, request)

  def _info(self) -> dict[str, Any] | None:
    try:
      return self._ask(lambda system: system.info(str(self)))
    except FileNotFoundError:
      return None


AnyPath = Path | BucketPath
"""A path on this machine or in a bucket."""


def is_bucket(name: str | os.PathLike[str] | BucketPath) -> bool:
  """Whether a name is a URL of one of `SCHEMES`."""
  return remote.scheme(str(name)) in SCHEMES


def path_of(name: str | AnyPath) -> AnyPath:
  """The path that a setting names."""
  if not isinstance(name, str):
    return name
  return BucketPath(name) if is_bucket(name) else Path(name)


def objects(folder: BucketPath) -> dict[str, Stat]:
  """All objects of a folder and its folders, by their names in it, in one listing."""
  found = _ask(folder, lambda system: system.find(str(folder), detail=True))
  start = len(str(folder).partition("://")[2]) + 1
  return {name[start:]: _stat(info) for name, info in found.items() if name[start:]}


def files_in(folder: BucketPath) -> dict[str, Stat]:
  """The objects that are directly in a folder, by their names, in one listing; none where the folder is not there."""
  try:
    entries = remote.ask(str(folder), lambda system: system.ls(str(folder), detail=True))
  except FileNotFoundError:
    return {}
  start = str(folder).partition("://")[2] + "/"
  return {
    entry["name"][len(start) :]: _stat(entry)
    for entry in entries
    # A store may list what is called as the folder, but is an object.
    if entry["type"] != "directory" and entry["name"].startswith(start) and entry["name"] != start
  }


def remove_tree(folder: AnyPath) -> None:
  """Deletes a folder and all that is in it."""
  if isinstance(folder, Path):
    shutil.rmtree(folder)
    return
  with contextlib.suppress(FileNotFoundError):
    _ask(folder, lambda system: system.rm(str(folder), recursive=True))


def put(source: Path, target: BucketPath) -> None:
  """Copies a file of this machine to a bucket; large ones go in parts."""
  with _bucket_is_there(target):
    _ask(target, lambda system: system.put_file(str(source), str(target)))


def write_whole(path: AnyPath, content: bytes) -> None:
  """Writes a file that is there complete or not at all."""
  if isinstance(path, BucketPath):
    path.write_bytes(content)
    return
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_bytes(content)
  temporary.replace(path)


@contextlib.contextmanager
def filled(folder: AnyPath) -> Iterator[Path]:
  """A folder of this machine to write to, whose files are in `folder` at the end: the same one where that is here.

  For libraries that know no buckets. Nothing is sent where the body fails.
  """
  if isinstance(folder, Path):
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    return
  with tempfile.TemporaryDirectory() as name:
    yield (local := Path(name))
    for path in sorted(local.rglob("*")):
      if path.is_file():
        put(path, folder / path.relative_to(local).as_posix())


def _ask(path: BucketPath, request: Callable[[Any], T]) -> T:
  """See `remote.ask`; errors say what was wanted."""
  try:
    return remote.ask(str(path), request)
  except FetchError as error:
    raise BucketError(f"{path}: {error}", may_pass=error.may_pass) from error


@contextlib.contextmanager
def _bucket_is_there(path: BucketPath) -> Iterator[None]:
  """Turns a write's FileNotFoundError into an error about the bucket, which does not exist."""
  try:
    yield
  except FileNotFoundError as error:
    bucket = "/".join(str(path).split("/")[:3])
    raise BucketError(f"{path}: there is no bucket {bucket}; create it, or correct the name") from error


class Mirror:
  """Uploads the growing files of a local folder to a folder of a bucket from time to time.

  For libraries that append to files, which objects do not allow.
  """

  def __init__(self, local: Path, target: BucketPath | None):
    """A mirror of `local`; without a target, there is nothing to send."""
    self.folder = local
    self._target = target
    self._sent: dict[Path, tuple[int, int]] = {}
    self._next = 0.0
    # Sent by a thread of its own: a run does not wait for its log.
    self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="mirror")

  @classmethod
  @contextlib.contextmanager
  def of(cls, folder: AnyPath) -> "Iterator[Mirror]":
    """A mirror of `folder`: the folder itself where it is on this machine; all is uploaded at the end."""
    if isinstance(folder, Path):
      yield cls(folder, None)
      return
    with tempfile.TemporaryDirectory() as name:
      mirror = cls(Path(name), folder)
      try:
        yield mirror
      finally:
        mirror.send()
        mirror._thread.shutdown()

  def is_due(self) -> bool:
    """Whether nothing was sent for `MIRROR_SECONDS`."""
    return self._target is not None and time.monotonic() >= self._next

  def send(self) -> None:
    """Starts to upload what has changed. A failed upload is logged and tried again; it ends no run."""
    self._next = time.monotonic() + MIRROR_SECONDS
    if self._target is not None:
      self._thread.submit(self._send, self._target)

  def _send(self, target: BucketPath) -> None:
    for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
      state = path.stat().st_size, path.stat().st_mtime_ns
      if self._sent.get(path) != state:
        try:
          # As it is now: it may grow while it is sent.
          (target / path.relative_to(self.folder).as_posix()).write_bytes(path.read_bytes())
        except OSError as error:
          logging.warning("%s", error)
          return
        self._sent[path] = state


@contextlib.contextmanager
def filled_file(path: AnyPath) -> Iterator[Path]:
  """A file of this machine to write, which is at `path` at the end: the same one where that is here.

  Writers may give its name another ending.
  """
  if isinstance(path, Path):
    yield path
    return
  with tempfile.TemporaryDirectory() as name:
    yield Path(name) / path.name
    for local in sorted(Path(name).iterdir()):
      put(local, path.parent / local.name)


def output_path(name: str, setting: str) -> AnyPath:
  """The path that a setting names for what is written.

  Raises:
    UserError: it is a URL that nothing is written to.
  """
  if remote.scheme(name) and not is_bucket(name):
    known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
    raise UserError(
      f"{setting}={name}: nothing is written there; name a path of this machine, or of a bucket ({known})"
    )
  return path_of(name)


def _stat(info: dict[str, Any]) -> Stat:
  size = int(info.get("size") or 0)
  if md5 := info.get("md5Hash"):  # GCS; not of objects composed of others.
    return Stat(size, f"md5={base64.b64decode(md5).hex()}")
  etag = str(info.get("etag") or info.get("ETag") or "").strip('"')
  return Stat(size, f"etag={etag}" if etag else "")
