"""A lease on an output directory: one run at a time, and none that a crash leaves locked.

Two things show whether a run is alive. A lock of the kernel (flock), which is gone with its process, however that ends; it
is seen on one machine, and by network file systems that pass locks on. And a heartbeat: the file `LEASE_FILE` says who
runs, and its counter goes up every `BEAT_SECONDS`. Of a run on another machine, where no lock is seen, nothing but the
counter tells; whoever comes watches it for `WATCH_SECONDS`. Clocks of machines are not compared.

`Place` is the storage of a lease; `Folder` is one on a file system, `Bucket` one in an object store.
"""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from absl import logging

from internvl_jax.errors import UserError
from internvl_jax.outputs import LEASE_FILE
from internvl_jax.storage.machine import machine
from internvl_jax.storage.paths import AnyPath, BucketPath

BEAT_SECONDS = 5
WATCH_SECONDS = 20
"""Longer than three heartbeats, and than what network file systems keep of a file's dates."""


class Holder(NamedTuple):
  """Who has a lease.

  Attributes:
    token: of this lease alone.
    host: name of the machine.
    boot: of this start of the machine alone: a process of an earlier one is dead.
    process: its number there.
    since: when it began, in seconds since 1970.
    beat: how often it was renewed.
    space: the container in which the process's number counts.
  """

  token: str
  host: str
  boot: str
  process: int
  since: float
  beat: int = 0
  space: str = ""

  def __str__(self) -> str:
    began = datetime.datetime.fromtimestamp(self.since, datetime.UTC)
    return f"process {self.process} on host {self.host} since {began:%Y-%m-%d %H:%M:%S} UTC"


class Place(Protocol):
  """The storage of a lease: a file of a folder, or an object of a bucket."""

  def lock(self) -> bool | None:
    """Takes the kernel's lock; returns whether it was free; None where there are no locks."""
    ...

  def read(self) -> Holder | None:
    """The last holder that was written; None if there is none, or it cannot be read."""
    ...

  def write(self, holder: Holder) -> None:
    """Replaces it."""
    ...

  def release(self) -> None:
    """Deletes the lease's files, and releases the lock."""
    ...


class Folder:
  """A lease in a folder, which is created if it is missing, and deleted if it is empty at the end."""

  def __init__(self, folder: Path):
    """Nothing is written before `lock`."""
    self._folder = folder
    self._path = folder / LEASE_FILE
    self._file: BinaryIO | None = None
    self._made: list[Path] = []
    self._mine = False

  def lock(self) -> bool | None:
    """See `Place`."""
    self._made += [path for path in (self._folder, *self._folder.parents) if not path.exists()]
    while True:
      self._folder.mkdir(parents=True, exist_ok=True)
      if self._file is not None:
        self._file.close()
      self._file = os.fdopen(
        os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b", buffering=0
      )
      try:
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        return False
      except OSError:  # Some network file systems have no locks.
        return None
      with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path)):
          return True
      # Whoever had it took the file away in between; what is locked here is seen by nobody.

  def read(self) -> Holder | None:
    """See `Place`."""
    try:
      # Opened again: network file systems ask the server then.
      return Holder(**json.loads(self._path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
      return None

  def write(self, holder: Holder) -> None:
    """See `Place`."""
    assert self._file is not None
    self._mine = True
    text = json.dumps(holder._asdict()).encode()
    os.pwrite(
      self._file.fileno(), text.ljust(512) + b"\n", 0
    )  # Of one length: never half of one, half of another.
    os.fsync(self._file.fileno())

  def release(self) -> None:
    """See `Place`."""
    if self._file is None:
      return
    if self._mine:
      self._path.unlink(missing_ok=True)
    self._file.close()
    self._file = None
    for folder in self._made:
      with contextlib.suppress(OSError):  # Something was written there.
        folder.rmdir()


class Bucket:
  """A lease in a bucket, where there are no locks."""

  def __init__(self, folder: BucketPath):
    """Nothing is written before `write`."""
    self._path = folder / LEASE_FILE
    self._mine = False

  def lock(self) -> bool | None:
    """See `Place`."""
    return None

  def read(self) -> Holder | None:
    """See `Place`."""
    try:
      return Holder(**json.loads(self._path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
      return None

  def write(self, holder: Holder) -> None:
    """See `Place`."""
    self._mine = True
    self._path.write_text(json.dumps(holder._asdict()))

  def release(self) -> None:
    """See `Place`."""
    if self._mine:
      self._mine = False
      self._path.unlink(missing_ok=True)


def place_in(folder: AnyPath) -> Place:
  """The storage of a lease for a folder."""
  return Bucket(folder) if isinstance(folder, BucketPath) else Folder(folder)


@contextlib.contextmanager
def held(
  place: Place,
  name: str,
  *,
  wait: Callable[[float], Any] = time.sleep,
) -> Iterator[None]:
  """Holds the lease during the `with` block.

  Args:
    place: its storage.
    name: of the directory and its setting, for messages.
    wait: takes the place of `time.sleep`.

  Raises:
    UserError: another run has it, or it cannot be written.
  """
  try:
    try:
      me = _take(place, name, wait)
    except UserError:  # A bucket's, whose message is complete.
      raise
    except OSError as error:
      raise UserError(
        f"{name} cannot be written to ({error.strerror or error}); name another folder"
      ) from error
    stopped = threading.Event()
    beats = threading.Thread(target=_beat, args=(place, name, me, stopped), name="lease", daemon=True)
    beats.start()
    try:
      yield
    finally:
      stopped.set()
      beats.join()
  finally:
    place.release()


def _take(place: Place, name: str, wait: Callable[[float], Any]) -> Holder:
  locked = place.lock()
  found = place.read()
  me = Holder(uuid.uuid4().hex, socket.gethostname(), machine(), os.getpid(), time.time(), space=_space())
  if locked is False:
    raise _in_use(name, found)
  if found is not None and not _is_dead(found, me, locked=bool(locked)):
    logging.info("%s was left by %s, or is in use; looking for %d s", name, found, WATCH_SECONDS)
    wait(WATCH_SECONDS)
    if (now := place.read()) is not None and now != found:
      raise _in_use(name, now)
  place.write(me)
  if not locked:
    # Without locks two may come at once: the one that wrote last stays.
    wait(BEAT_SECONDS)
    if (now := place.read()) is None or now.token != me.token:
      raise _in_use(name, now)
  return me


def _is_dead(holder: Holder, me: Holder, *, locked: bool) -> bool:
  """Whether it is certain, without watching, that the holder has ended."""
  if holder.boot != me.boot:
    return False
  # The lock of the holder's own machine was free.
  return locked or (holder.space == me.space != "" and not os.path.exists(f"/proc/{holder.process}"))


def _in_use(name: str, holder: Holder | None) -> UserError:
  who = f"by {holder}" if holder else "by a run that has just begun"
  return UserError(f"{name} is in use {who}; wait for its end, stop it, or name another training.output_dir")


def _beat(place: Place, name: str, me: Holder, stopped: threading.Event) -> None:
  holder = me
  while not stopped.wait(BEAT_SECONDS):
    holder = holder._replace(beat=holder.beat + 1)
    try:
      if (found := place.read()) is not None and found.token != me.token:
        logging.error("%s was taken over by %s while this run was suspended; end one of them", name, found)
        return
      place.write(holder)
    except OSError as error:  # For example, the disk is full: the next save reports it.
      logging.info("The lease could not be renewed: %s", error)


def _space() -> str:
  try:
    return os.readlink("/proc/self/ns/pid")
  except OSError:
    return ""
