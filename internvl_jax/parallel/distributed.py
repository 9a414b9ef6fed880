"""The processes of a run: joining, waiting for each other, reading each other's arrays, and ending together.

A process that is alone (`launchers.find_place`) joins nobody: it opens no port and waits for nothing.
"""

import contextlib
import itertools
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import Integer

from internvl_jax import signals
from internvl_jax.errors import UserError
from internvl_jax.parallel.launchers import Place, find_place

JOIN_SECONDS = 300
"""How long processes wait for the last of them to start: machines of a pod come up minutes apart."""

HEARTBEAT_SECONDS = 40
"""A process that was not heard of for so long is dead, and ends the others: within a minute, all told."""

# --- Joining and leaving ------------------------------------------------------------------------------------


@contextlib.contextmanager
def initialized(setting: str, report: Callable[[BaseException], None]) -> Generator[None, None, None]:
  """Joins the run's other processes, if there are any, before JAX looks for devices.

  A process that fails must not wait for the others, as it would when Python ends: they are waiting for it. It
  reports why and is gone, whereupon they end too.

  Args:
    setting: `runtime.distributed`.
    report: tells the user about an exception, where there are other processes.

  Raises:
    UserError: the environment does not fit together.
  """
  place = find_place(setting, os.environ)
  if place is None:
    yield
    return
  _join(place)
  try:
    with _stop_with_others():
      yield
  except BaseException as error:
    if jax.process_count() == 1 or (isinstance(error, SystemExit) and not error.code):
      raise
    report(_lost_peer(error) or error)
    if isinstance(error, UserError) and error.everywhere:
      _wait_until_told()
    logging.error("Process %d of %d ends; the others follow", jax.process_index(), jax.process_count())
    _leave(1)


class DisagreementError(UserError):
  """Processes of a run have what must be equal, and differs: all of them raise it, in the same words."""

  everywhere = True


def _wait_until_told() -> None:
  """Lets all processes say why they end: once one has ended, JAX ends the others without a word of ours."""
  with contextlib.suppress(UserError):
    barrier("the error is told", seconds=_TOLD_SECONDS)


def _lost_peer(error: BaseException) -> UserError | None:
  """What a failed collective means: the cause is elsewhere. None for other errors."""
  if not isinstance(error, jax.errors.JaxRuntimeError) or not _LOST_PEER.search(str(error)):
    return None
  told = UserError(
    f"process {jax.process_index()} of {jax.process_count()} lost another one ({' '.join(str(error).split())[:200]}); "
    "look for the first error in the other processes' logs"
  )
  told.__cause__ = error
  return told


_TOLD_SECONDS = 10

_THREADS_OF_DEVICE = 8
"""More than the collectives in which a device waits at a time."""

_LOST_PEER = re.compile(r"gloo|nccl|connection (closed|reset)|unavailable|heartbeat", re.I)


def _join(place: Place) -> None:
  if place.coordinator is not None:
    logging.info(
      "Process %d of %d, started by %s; process 0 is at %s",
      *(place.process, place.processes, place.launcher, place.coordinator),
    )
  jax.config.update("jax_cpu_collectives_implementation", "gloo")  # Only processes on CPUs look at it.
  # A collective keeps one of XLA's threads on the CPU until its other side comes, and there are as many as cores: with few
  # cores, devices of one process that wait in different collectives leave none to those they wait for.
  devices = max(1, jax.config.jax_num_cpu_devices)  # pyright: ignore[reportAttributeAccessIssue]
  os.environ.setdefault("NPROC", str(max(os.cpu_count() or 1, _THREADS_OF_DEVICE * devices)))
  # JAX ends a process that met nobody by a C++ stack trace, so its own limit is never reached.
  late = threading.Timer(JOIN_SECONDS, _give_up, [place])
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(
      place.coordinator,
      place.processes,
      place.process,
      local_device_ids=place.gpus,
      # Everything is known, except on a TPU; left to itself, JAX gives a Slurm task its first GPU alone.
      cluster_detection_method=None if place.coordinator is None else "deactivate",
      initialization_timeout=2 * JOIN_SECONDS,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
  except (ValueError, RuntimeError) as error:
    raise UserError(
      f"{place.launcher}: the processes cannot join ({' '.join(str(error).split())[:300]}); set "
      "runtime.distributed=host:port,processes,process, or off where this process is alone"
    ) from error
  finally:
    late.cancel()
  if place.coordinator is None:
    logging.info("Process %d of %d of a TPU pod", jax.process_index(), jax.process_count())
  if jax.process_count() > 1 and jax.default_backend() == "cpu":
    # Programs that XLA reads back from its cache (jaxlib 0.10.2, CPU) run their collectives in any order, and the
    # processes take one's data for another's.
    jax.config.update("jax_enable_compilation_cache", False)


def _give_up(place: Place) -> None:
  print(f"error: {_absence(place)}", file=sys.stderr)
  _leave(1)


def _absence(place: Place) -> str:
  """Who was not met, and what to look at."""
  if place.coordinator is None:
    return (
      f"{socket.gethostname()} ({place.launcher}) has waited {JOIN_SECONDS} s for the other hosts of its slice; check that "
      "the same command was started on all of them (--worker=all), or set runtime.distributed=off to train on this "
      "host alone"
    )
  others = "the others" if place.process == 0 else "process 0"
  return (
    f"process {place.process} of {place.processes} ({place.launcher}) has waited {JOIN_SECONDS} s for {others} at "
    f"{place.coordinator}; check that all {place.processes} processes were started and that their hosts reach that port"
  )


def _leave(code: int) -> None:
  """Ends the process at once: no exit handler, which would wait for the others."""
  logging.flush()
  signals.leave(code)


_STOPPED_KEY = "internvl_jax:stopped"

_ASK_SECONDS = 1.0
"""How often a process asks whether another one was stopped. Process 0, which carries the news, ends after twice as long:
JAX aborts those whose process 0 is gone."""


@contextlib.contextmanager
def _stop_with_others() -> Generator[None, None, None]:
  """In the body, all processes are stopped where one of them is that has nothing to save."""
  from jax._src.distributed import global_state  # JAX has no public way to leave a word for others.

  client = global_state.client
  if client is None or not signals.is_watching():
    yield
    return
  over = threading.Event()

  def tell() -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # Another one has said so, or nobody hears it.
      client.key_value_set(_STOPPED_KEY, "")
    if is_first():
      time.sleep(2 * _ASK_SECONDS)

  def ask() -> None:
    while not over.wait(_ASK_SECONDS):
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # It is not there, or process 0 is gone.
        client.key_value_try_get(_STOPPED_KEY)
        signals.end_as_told()

  asker = threading.Thread(target=ask, name="stopped", daemon=True)
  asker.start()
  try:
    with signals.cleaned_up(tell):
      yield
  finally:
    over.set()
    asker.join()  # A thread that is in JAX's client when Python ends would abort the process.


# --- Acting together ----------------------------------------------------------------------------------------


def is_first() -> bool:
  """Whether this is the process that writes what there is one of."""
  return jax.process_index() == 0


def barrier(name: str, *, seconds: int) -> None:
  """Returns once every process has come here; `name` is used once in a run.

  Raises:
    UserError: not all of them came in time.
  """
  if jax.process_count() == 1:
    return
  try:
    key_value_store().wait_at_barrier(f"internvl_jax:{name}", seconds * 1000)
  except jax.errors.JaxRuntimeError as error:
    raise UserError(
      f"process {jax.process_index()} of {jax.process_count()} waited {seconds} s for the others ({name}): "
      f"{' '.join(str(error).split())[:300]}; look for the first error in the other processes' logs"
    ) from error


def key_value_store() -> Any:
  """The coordinator's client, where processes have joined: barriers with a time limit, and texts by their keys."""
  from jax._src.distributed import global_state  # JAX's public barriers have no time limit.

  assert global_state.client is not None
  return global_state.client


def exchanged(name: str, text: str, *, seconds: int) -> list[str]:
  """All-gathers a short text of every process, by messages; `name` is used once in a run.

  Raises:
    UserError: not all of them came in time.
  """
  if jax.process_count() == 1:
    return [text]
  barrier(name, seconds=seconds)  # Who is late is told in its words.
  store = key_value_store()
  key = f"internvl_jax:{name}:"
  store.key_value_set(f"{key}{jax.process_index()}", f"={text}")  # Never empty.
  texts = [
    store.blocking_key_value_get(f"{key}{process}", seconds * 1000) for process in range(jax.process_count())
  ]
  return [text.removeprefix("=") for text in texts]


def all_gather_bytes(data: bytes) -> list[bytes]:
  """All-gathers bytes of any length, in the order of the processes, which all make the same calls in the same order.

  By messages through the coordinator (1 MB takes 0.07 s), not over the devices, where nobody waits for long: here some may
  come hours after others.

  Raises:
    UserError: not all of them came within a day. One that dies ends the others much sooner.
  """
  if jax.process_count() == 1:
    return [data]
  number, store = next(_gathers), key_value_store()
  key, me = f"internvl_jax:gather:{number}", jax.process_index()
  short = len(data) <= _HEAD_BYTES
  pieces = [] if short else [data[i : i + _PIECE_BYTES] for i in range(0, len(data), _PIECE_BYTES)]
  for i, piece in enumerate(pieces):
    store.key_value_set_bytes(f"{key}/{me}/{i}", piece)
  # Never empty.
  store.key_value_set_bytes(f"{key}/head/{me}", len(pieces).to_bytes(4, "little") + (data if short else b""))
  with _remarked("Waiting for other processes, whose part of the data takes longer"):
    barrier(f"gather {number}", seconds=_GATHER_SECONDS)
  if is_first() and number:  # All are here, so all have read what was there before.
    store.key_value_delete(f"internvl_jax:gather:{number - 1}")
  heads = {int(name.rpartition("/")[2]): head for name, head in store.key_value_dir_get_bytes(f"{key}/head")}
  return [
    _join_pieces(store, f"{key}/{process}", heads[process], data if process == me else None)
    for process in range(jax.process_count())
  ]


_gathers = itertools.count()

_HEAD_BYTES, _PIECE_BYTES = 1 << 14, 1 << 20

_GATHER_SECONDS = 86400

_REMARK_SECONDS = 60.0


def _join_pieces(store: Any, key: str, head: bytes, mine: bytes | None) -> bytes:
  if mine is not None:
    return mine
  pieces = int.from_bytes(head[:4], "little")
  if not pieces:
    return head[4:]
  seconds = 600  # They are there.
  return b"".join(store.blocking_key_value_get_bytes(f"{key}/{i}", seconds * 1000) for i in range(pieces))


@contextlib.contextmanager
def _remarked(text: str) -> Generator[None, None, None]:
  """Logs a line where the body takes more than a moment."""
  late = threading.Timer(_REMARK_SECONDS, logging.info, [text])
  late.daemon = True
  late.start()
  try:
    yield
  finally:
    late.cancel()


def first_says(value: bool) -> bool:
  """What the first process says, to all of them; a call that all processes make."""
  if jax.process_count() == 1:
    return value
  return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def sum_over(parts: Sequence[int], counts: Integer[np.ndarray, "*axes"]) -> Integer[np.ndarray, "*axes"]:
  """Adds an array of integers over the parts of a batch; a call that all processes make.

  Args:
    parts: the part that each process feeds; see `mesh.data_parts`.
    counts: of this process's part.

  Raises:
    UserError: processes that feed the same part have counted differently.
  """
  if jax.process_count() == 1:
    return counts
  # As bytes: arrays of 64-bit integers would be cut to 32 on their way.
  everyone = multihost_utils.process_allgather(np.ascontiguousarray(counts)[..., None].view(np.uint8))
  return sum_parts(parts, np.asarray(everyone).view(counts.dtype)[..., 0])


def sum_parts(
  parts: Sequence[int], everyone: Integer[np.ndarray, "processes ..."]
) -> Integer[np.ndarray, "..."]:
  """`sum_over`, of what all processes have counted: [processes, ...]."""
  first = [parts.index(part) for part in range(max(parts) + 1)]
  for process, part in enumerate(parts):
    if not np.array_equal(everyone[process], everyone[first[part]]):
      raise UserError(
        f"processes {first[part]} and {process} feed the same rows to their devices, but have read them differently "
        f"({everyone[first[part]].tolist()} and {everyone[process].tolist()}): a file was readable on one host only; "
        "see the losses in their logs, mend it, and start the command again from the last checkpoint"
      )
  return everyone[first].sum(axis=0)


def host_name() -> str:
  """How this process calls itself in messages: its host, and its number where there are several."""
  several = jax.process_count() > 1
  number = f" (process {jax.process_index()} of {jax.process_count()})" if several else ""
  return socket.gethostname() + number


class StopSignal:
  """Whether this run was told to end soon: by Ctrl-C, or by SIGTERM, which is also how clusters announce a preemption.

  Use it as a context manager, in which `listen` says from when on there is something to save; until then and outside of
  it, a signal ends the process. Where there are several processes, one of them being told is enough; JAX then names a
  step at which all of them learn of it.

  Attributes:
    received: whether this process was told.
  """

  def __init__(self):
    """A signal that nobody listens for yet."""
    self.received = False
    self._stack = contextlib.ExitStack()

  def __enter__(self) -> "StopSignal":
    return self

  def listen(self) -> None:
    """Takes a signal as a request from now on."""
    if signals.is_watching():
      self._stack.enter_context(signals.listening(self._receive))
    # JAX's own handler is in place where processes have joined.
    elif jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._stack.callback(
        signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, lambda *_: self._receive())
      )

  def __exit__(self, *_: object) -> None:
    self._stack.close()

  def _receive(self) -> None:
    self.received = True
    if jax.process_count() > 1:
      # JAX's handler notes it, and tells the other processes.
      signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
      signal.raise_signal(signal.SIGTERM)
      signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

  def __call__(self, step: int) -> bool:
    """Whether to stop at this step; to be asked at every step, by all processes alike."""
    if jax.process_count() == 1:
      return self.received
    return multihost_utils.reached_preemption_sync_point(step)
