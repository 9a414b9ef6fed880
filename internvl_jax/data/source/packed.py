"""Annotation files packed by gzip, bzip2, xz or zstd: unpacked once, into the cache, and read there by number."""

import bz2
import gzip
import hashlib
import lzma
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any, BinaryIO

from absl import logging

from internvl_jax.data.source import files
from internvl_jax.data.source.cache import cache_errors_named, locked, whole_file
from internvl_jax.data.where import DataError
from internvl_jax.errors import redacted

_BLOCK = 1 << 20


def _zstd(file: BinaryIO) -> Any:
  try:
    import zstandard
  except ImportError:
    raise DataError("zstd needs the package zstandard: pip install 'internvl_jax[zstd]'") from None
  return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)


READERS: dict[str, Callable[[BinaryIO], Any]] = {
  "gzip": lambda file: gzip.GzipFile(fileobj=file),
  "bzip2": bz2.BZ2File,
  "xz": lzma.LZMAFile,
  "zstd": _zstd,
}
"""Functions that decompress a file, by the format's name."""

# What the readers raise of a damaged file; zstandard has an exception of its own.
_DAMAGED = (OSError, EOFError, lzma.LZMAError, ValueError)


def unpacked(local: str, name: str, path: str, dataset: str, cache: str | os.PathLike[str] | None) -> str:
  """The path of a file's content, unpacked into the cache if it is not there yet.

  Args:
    local: the file, on a local disk.
    name: of what packed it, see `READERS`.
    path: as errors name it.
    dataset: its dataset, for errors.
    cache: folder of caches; None: `files.default_cache()`.

  Raises:
    DataError: it is damaged, or the cache cannot be written.
  """
  cache = cache or files.default_cache()
  folder, status = pathlib.Path(cache, "copies"), os.stat(local)
  text = f"{os.path.abspath(local)} {status.st_size} {status.st_mtime_ns}"
  stem = re.sub(r"\W+", "_", files.name(path).split(".")[0])[:40]
  copy = folder / f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.unpacked"
  with cache_errors_named(cache):
    folder.mkdir(parents=True, exist_ok=True)
    if copy.exists():
      return str(copy)
    with locked(folder):
      if not copy.exists():  # else another process has just made it
        logging.info("Unpacking %s (%.1f MB) to %s", redacted(path), status.st_size / 1e6, folder)
        with whole_file(copy) as out:
          _unpack(local, name, out, f"{path}: dataset {dataset!r}")
  return str(copy)


def _unpack(local: str, name: str, out: BinaryIO, blame: str) -> None:
  with open(local, "rb") as file:
    try:
      reader = READERS[name](file)
    except DataError as error:
      raise DataError(f"{blame}: {error}") from None
    reads = iter(lambda: _read(reader, name, blame), b"")
    for block in reads:
      out.write(block)


def _read(reader: Any, name: str, blame: str) -> bytes:
  try:
    return reader.read(_BLOCK)
  except Exception as error:  # zstandard's own is none of Python's
    if isinstance(error, _DAMAGED) or type(error).__module__.startswith("zstandard"):
      raise DataError(f"{blame}: it is packed by {name} and damaged: {error}; restore it") from error
    raise
