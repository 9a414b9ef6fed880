"""A function applied to many items by processes, with as many items in flight as keep them busy."""

import concurrent.futures
import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

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
  # Workers are started afresh: a forked copy of a process with JAX's threads may hang.
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(
    min(workers, len(items)), context, initializer=_start, initargs=(function,)
  ) as pool:
    waiting, running = iter(items), {}
    for item in itertools.islice(waiting, _IN_FLIGHT * workers):
      running[pool.submit(_apply, item)] = item
    while running:
      done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
      for future in done:
        yield running.pop(future), future.result()
        for item in itertools.islice(waiting, 1):
          running[pool.submit(_apply, item)] = item


_function: Callable[[Any], Any] | None = None


def _start(function: Callable[[Any], Any]) -> None:
  global _function  # noqa: PLW0603 - sent once to each process, not with every item
  _function = function


def _apply(item: Any) -> Any:
  assert _function is not None
  return _function(item)
