"""Files of a cache: written whole or not at all, by any number of processes and hosts at once."""

import contextlib
import fcntl
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import BinaryIO

from absl import logging

from internvl_jax.data.where import DataError


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[BinaryIO]:
  """A file to write, which takes its place once all of it is written."""
  # Processes of several hosts or containers may have one number, so that it would not tell them apart.
  temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
  try:
    with temporary.open("xb") as file:
      yield file
    temporary.replace(path)
  except BaseException:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
  """Keeps other processes out of a folder: who comes second finds the first one's work done."""
  with (folder / "lock").open("w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      logging.info("%s: waiting for another process, which builds it", folder)
      fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:  # Some network file systems have no locks: then all do the same work.
      logging.info("%s: cannot be locked (%s)", folder, error)
    yield


@contextlib.contextmanager
def cache_errors_named(folder: str | os.PathLike[str]) -> Iterator[None]:
  """Turns what the system refuses into an error that blames the folder of caches."""
  try:
    yield
  except OSError as error:
    raise DataError(
      f"the cache in {folder} cannot be written or read ({error.strerror or error}); set loader.cache_dir to a folder "
      "with free space that may be written to"
    ) from error
