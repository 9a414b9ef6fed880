"""A function applied to many items by processes, with as many items in flight as keep them busy."""

import concurrent.futures
import concurrent.futures.process
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from internvl_jax.data.where import DataError

T = TypeVar("T")
R = TypeVar("R")

# Items in flight for each worker: memory does not grow with their number.
_IN_FLIGHT = 4


def map_items(function: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[tuple[T, R]]:
  """Yields each item with the function's result, as they are done.

  Args:
    function: is sent to every worker once; picklable.
    items: small and picklable.
    workers: processes; up to 1, and for few items, this process does it.
  """
  if workers <= 1 or len(items) <= 1:  # Workers take seconds to start.
    for item in items:
      yield item, function(item)
    return
  prepare_for_workers()
  # Workers are started afresh: a forked copy of a process with JAX's threads may hang.
  context = multiprocessing.get_context("spawn")
  pool = concurrent.futures.ProcessPoolExecutor(
    min(workers, len(items)), context, initializer=_start, initargs=(function,)
  )
  running: dict[concurrent.futures.Future, T] = {}
  try:
    waiting = iter(items)
    for item in itertools.islice(waiting, _IN_FLIGHT * workers):
      running[pool.submit(_apply, item)] = item
    while running:
      done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
      for future in done:
        yield running.pop(future), future.result()
        for item in itertools.islice(waiting, 1):
          running[pool.submit(_apply, item)] = item
  except concurrent.futures.process.BrokenProcessPool as error:
    raise DataError(DIED) from error
  finally:
    # After an error nobody wants the rest, which may take minutes.
    pool.shutdown(wait=not running, cancel_futures=True)


DIED = (
  "a process that reads the data was killed, as the system does where memory runs out; the kernel's log (dmesg) tells; "
  "lower training.dataloader_num_workers or loader.prefetch, or find the file that kills it: "
  "python -m internvl_jax.doctor"
)
"""The message for the user where a worker has ended by itself."""


def prepare_for_workers() -> None:
  """Starts Python's tracker of what processes share, which leaves Ctrl-C and SIGTERM unblocked in this thread.

  Workers inherit which signals are blocked: those that a command has blocked are for itself alone.
  """
  blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
  resource_tracker.ensure_running()
  signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def end_with_parent() -> None:
  """Ends this process, a worker, as soon as the one that started it is gone: killed, that one could not end it."""
  parent = multiprocessing.parent_process()
  if parent is not None:
    threading.Thread(target=_end_after, args=(parent,), name="parent", daemon=True).start()


def _end_after(parent: Any) -> None:
  parent.join()  # Waits at a pipe of which only the parent has the other end.
  os._exit(1)


_function: Callable[[Any], Any] | None = None


def _start(function: Callable[[Any], Any]) -> None:
  global _function  # noqa: PLW0603 - sent once to each process, not with every item
  _function = function
  end_with_parent()


def _apply(item: Any) -> Any:
  assert _function is not None
  return _function(item)
