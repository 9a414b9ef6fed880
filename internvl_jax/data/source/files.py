"""Local and remote files by path or URL: the only module that tells them apart.

A path is local, or a URL of a scheme for which fsspec has a file system: `gs://`, `s3://`, `http://`, `https://` and
others. Credentials and endpoints are what the scheme's package finds by itself, or fsspec's own configuration names
(`~/.config/fsspec/*.json`, `FSSPEC_*`).

All functions raise `FileNotFoundError` where there is no such file, as `open` does, and `FetchError` where it cannot be
had, after a few tries where that may help. They may be called from any thread and any process; nothing that they keep
is pickled.
"""

import contextlib
import errno
import hashlib
import io
import os
import pathlib
import re
import stat
import tempfile
import urllib.parse
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from absl import logging

from internvl_jax.data.source.cache import cache_errors_named, locked
from internvl_jax.data.where import Where
from internvl_jax.errors import redacted
from internvl_jax.storage import remote
from internvl_jax.storage.remote import FetchError, is_remote
from internvl_jax.storage.snapshots import default_cache

BLOCK_BYTES = 1 << 16
"""Bytes of a remote file that are fetched at a time where only its header is wanted."""

# What tells one content of a file from another, as file systems call it, in lower case.
_VERSION_KEYS = (
  *("etag", "generation", "md5hash", "content-md5", "sha", "blob_id"),
  *("last-modified", "lastmodified", "last_modified", "mtime", "updated", "modify"),
)


class Status(NamedTuple):
  """The status of a path.

  Attributes:
    is_folder: it is a folder.
    is_file: it is a file, and no pipe or device.
    size: bytes of a file; None where the server does not tell.
  """

  is_folder: bool
  is_file: bool
  size: int | None


# --- Paths --------------------------------------------------------------------------------------------------


def join(root: str, path: str, where: Where) -> str:
  """The path of a dataset's file, as its line writes it.

      >>> join("gs://bucket/images", "./cats/../1.jpg", where)
      'gs://bucket/images/1.jpg'

  Args:
    root: the dataset's root, a folder or a URL; "" is the working directory.
    path: absolute paths and URLs are taken as they are.
    where: the line, for errors.

  Raises:
    DataError: the path leads out of the root.
  """
  if not os.path.isabs(path) and not is_remote(path) and _climbs(path):
    shown = repr(root) if root else "'', the working directory"
    raise where.error(
      f"path {path!r} leaves the dataset's root ({shown}); set root to the folder that holds both or write the whole "
      "path"
    )
  return resolve_path(root, path)


def resolve_path(folder: str, path: str) -> str:
  """Resolves a path against the folder (or URL) that it is relative to. It may lead out of the folder."""
  if os.path.isabs(path) or is_remote(path):
    return path
  if not is_remote(folder):
    return os.path.join(folder, path)
  if remote.scheme(folder) in remote.WEB:
    # In a URL these would begin something else than a name; whatever else needs it is quoted when it is sent.
    path = re.sub("[%?#]", lambda found: f"%{ord(found[0]):02X}", path)
  bare = re.split(r"[?#]", folder)[0] if remote.scheme(folder) in remote.WEB else folder
  # The scheme, the empty part between its slashes, and the host or bucket: no `..` leads out of them.
  head, parts = bare.split("/")[:3], bare.rstrip("/").split("/")[3:]
  for part in path.split("/") if path else ():
    if part == "..":
      parts = parts[:-1]
    elif part != ".":
      parts.append(part)
  return "/".join(head + parts)


def parent(path: str) -> str:
  """The folder that a file is in."""
  if remote.scheme(path) in remote.WEB:
    path = re.split(r"[?#]", path)[0]
  return path.rpartition("/")[0] if is_remote(path) else os.path.dirname(path)


def absolute(path: str) -> str:
  """A path that means the same from every working directory."""
  return path if is_remote(path) else os.path.abspath(path)


def identity(path: str) -> str:
  """A file's key in caches: `absolute`, without what signs a URL anew each time and must not be kept."""
  return redacted(absolute(path))


def name(path: str) -> str:
  """The last part of a path, as the file's name and without what else a URL may say."""
  if remote.scheme(path) in remote.WEB:
    return urllib.parse.unquote(re.split(r"[?#]", path)[0].rpartition("/")[2])
  return path.rpartition("/")[2]


def suffix(path: str) -> str:
  """The end of a file's name, from its last dot on; "" without one."""
  return os.path.splitext(name(path))[1]


def _climbs(path: str) -> bool:
  """Says whether a relative path leads out of where it starts, if only for a part of the way."""
  depth = 0
  for part in path.split("/"):
    depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
    if depth < 0:
      return True
  return False


# --- Reading ------------------------------------------------------------------------------------------------


def check(path: str) -> None:
  """Raises FetchError where files of a path's scheme cannot be read here at all. No file is looked at."""
  if is_remote(path):
    remote.file_system(path)


def status_of(path: str) -> Status:
  """Finds what is at a path: folder or file, and its size; of a remote file, no content is fetched."""
  if not is_remote(path):
    try:
      status = os.stat(path)
    except (NotADirectoryError, ValueError) as error:  # ValueError: a zero byte in the path
      raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
    return Status(stat.S_ISDIR(status.st_mode), stat.S_ISREG(status.st_mode), status.st_size)
  info = _info(path)
  # A web server knows no folders, but most send who asks for one on to the same name with a slash.
  is_folder = info["type"] == "directory" or str(info.get("url", "")).endswith("/")
  return Status(is_folder, not is_folder, None if is_folder else info.get("size"))


def list_folder(path: str) -> list[str]:
  """The paths of what is in a folder, in any order. A web server must show the folder as a page of links."""
  if not is_remote(path):
    return [os.path.join(path, entry) for entry in os.listdir(path)]
  entries = remote.ask(path, lambda system: system.ls(path, detail=True))
  folder = path.rstrip("/")
  return [f"{folder}/{entry['name'].rstrip('/').rpartition('/')[2]}" for entry in entries]


def read_bytes(path: str) -> bytes:
  """The content of a file."""
  if not is_remote(path):
    with open(path, "rb") as file:
      return file.read()
  return remote.ask(path, lambda system: system.cat_file(path))


def open_file(path: str) -> BinaryIO:
  """Opens a file for whoever wants a little of it: of a remote one, only the blocks that are looked at are fetched."""
  return io.BufferedReader(_Blocks(path), BLOCK_BYTES) if is_remote(path) else open(path, "rb")


def open_forward(path: str) -> Any:
  """Opens a file for whoever reads all of it in order: a remote one is fetched as it is read, and kept nowhere."""
  if not is_remote(path):
    return open(path, "rb", buffering=0)
  return remote.ask(path, lambda system: system.open(path, "rb"))


@contextlib.contextmanager
def local_copy(path: str, size: int | None = None, content: bytes | None = None) -> Iterator[str]:
  """Gives the path of a file with the same content and suffix on a local disk, for the time of the `with`.

  A local file is given as it is. Other copies are made in the folder of temporary files (`TMPDIR`).

  Args:
    path: the file.
    size: how many bytes it has, if that is known; the copy must have as many.
    content: its bytes, where they are at hand; `path` is then no more than a name.
  """
  if content is None and not is_remote(path):
    yield path
    return
  folder, end = tempfile.gettempdir(), suffix(path)
  try:
    # The folder may be everyone's: the copy is not.
    copy = _temporary(folder, end if re.fullmatch(r"\.\w{1,16}", end) else "", 0o600)
  except OSError as error:
    raise FetchError(f"{folder} cannot hold a copy ({error}); {remote.OTHER_FOLDER}") from error
  try:
    if content is None:
      _download(path, copy, size)
    else:
      pathlib.Path(copy).write_bytes(content)
    yield copy
  finally:
    _remove(copy)


def cached_copy(url: str, cache: str | os.PathLike[str] | None = None) -> str:
  """The path of a remote file's copy in a cache, made if it is not there or the file has changed.

  Copies are never written over, so that a run that has started goes on with what it has; they may be deleted when no
  run uses them.

  Args:
    url: the file.
    cache: folder of caches; None: `default_cache()`.

  Raises:
    DataError: the cache cannot be written.
  """
  cache = cache or default_cache()
  folder = os.path.join(cache, "copies")
  info = _info(url)
  version = _version(info)
  copy = _copy_path(folder, url, version) if version else None
  if copy and os.path.exists(copy):
    return copy
  with contextlib.ExitStack() as stack:
    with cache_errors_named(cache):
      os.makedirs(folder, exist_ok=True)
      stack.enter_context(locked(pathlib.Path(folder)))
      temporary = _temporary(folder, ".tmp", 0o666)
    stack.callback(_remove, temporary)
    if copy and os.path.exists(copy):  # Another process has just made it.
      return copy
    size = info.get("size")
    logging.info(
      "Copying %s (%s) to %s", redacted(url), "?" if size is None else f"{size / 1e6:.1f} MB", folder
    )
    _download(url, temporary, size)
    with cache_errors_named(cache):
      # A server that gives a file no version may have changed it: what came tells it from what was there.
      copy = copy or _copy_path(folder, url, _checksum(temporary))
      if not os.path.exists(copy):  # A run that uses a copy refuses it when its date changes.
        os.replace(temporary, copy)
  return copy


def _remove(path: str) -> None:
  with contextlib.suppress(FileNotFoundError):
    os.unlink(path)


def _info(url: str) -> dict[str, Any]:
  return remote.ask(url, lambda system: system.info(url))


def _download(url: str, target: str, size: int | None) -> None:
  def get(system: Any) -> None:
    system.get_file(url, target)
    # More is no damage: what a server keeps compressed arrives unpacked.
    if size is not None and (got := os.path.getsize(target)) < size:
      raise ConnectionError(f"only {got} of {size} bytes came")

  remote.ask(url, get)


def _copy_path(folder: str, url: str, version: str) -> str:
  digest = hashlib.sha256(f"{identity(url)} {version}".encode()).hexdigest()[:16]
  stem = re.sub(r"\W+", "_", os.path.splitext(name(url))[0])[:40]
  return os.path.join(folder, f"{stem}-{digest}{suffix(url)}")


def _version(info: dict[str, Any]) -> str | None:
  """A file's version, which changes with its content; None if its server tells nothing that does."""
  told = {key.lower(): value for key, value in info.items()}
  found = [f"{key}={told[key]}" for key in _VERSION_KEYS if told.get(key)]
  return " ".join([f"size={told.get('size')}", *found]) if found else None


def _checksum(path: str) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _temporary(folder: str, end: str, mode: int) -> str:
  """The path of a new, empty file."""
  path = os.path.join(folder, f"{uuid.uuid4().hex}{end}")
  os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
  return path


class _Blocks(io.RawIOBase):
  """A remote file of which the blocks are fetched that are looked at, each once."""

  def __init__(self, url: str):
    self._url = url
    self._blocks: dict[int, bytes] = {}
    self._size: int | None = None
    self._position = 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._position

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    base = 0
    if whence == os.SEEK_CUR:
      base = self._position
    elif whence == os.SEEK_END:
      base = self._length()
    self._position = max(0, base + offset)
    return self._position

  def readinto(self, buffer: Any) -> int:
    block, start = self._first(), self._position
    if start >= len(block):
      block, start = self._block(start // BLOCK_BYTES), start % BLOCK_BYTES
    data = block[start : start + len(buffer)]
    buffer[: len(data)] = data
    self._position += len(data)
    return len(data)

  def readall(self) -> bytes:
    first, start, length = self._first(), self._position, self._length()
    # What follows the first block comes with one request, not block by block.
    rest = self._range(max(start, len(first)), length)
    self._position = max(start, length)
    return first[start:] + rest

  def _first(self) -> bytes:
    """The first block. It is the whole file if that is shorter, or if the server knows no ranges."""
    if 0 not in self._blocks:
      try:
        first = self._range(0, BLOCK_BYTES)
      except FetchError as error:
        if error.may_pass or status_of(self._url).size != 0:  # Some servers refuse a part of nothing.
          raise
        first = b""
      if len(first) != BLOCK_BYTES:
        self._size = len(first)
      self._blocks[0] = first
    return self._blocks[0]

  def _block(self, index: int) -> bytes:
    """A block behind what `_first` returns."""
    if self._length() == len(self._first()):
      return b""
    if index not in self._blocks:
      start = index * BLOCK_BYTES
      self._blocks[index] = self._range(start, min(start + BLOCK_BYTES, self._length()))
    return self._blocks[index]

  def _length(self) -> int:
    self._first()
    if self._size is None:
      self._size = status_of(self._url).size
    if self._size is None:  # The server does not tell.
      self._blocks[0] = read_bytes(self._url)
      self._size = len(self._blocks[0])
    return self._size

  def _range(self, start: int, end: int) -> bytes:
    if start >= end:
      return b""
    return remote.ask(self._url, lambda system: system.cat_file(self._url, start=start, end=end))
