"""Threads that stand for the processes of a run which exchange messages."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from internvl_jax.data.source.hosts import Hosts

SECONDS = 60
"""Longer than anything here takes: who waits for so long waits for nothing."""


class Exchange:
  """All-gathers among threads, in calls that all of them make in one order."""

  def __init__(self, count):
    self._barrier, self._parts, self.calls = threading.Barrier(count, timeout=SECONDS), [b""] * count, 0

  def hosts(self, me):
    def gather(part):
      self._parts[me] = part
      if not self._barrier.wait():
        self.calls += 1
      parts = list(self._parts)
      self._barrier.wait()
      return parts

    return Hosts(me=me, count=len(self._parts), gather=gather)


def on_hosts(count: int, work: Callable[[Hosts], Any]) -> tuple[Exchange, list[Any]]:
  """Calls work(hosts) on so many; returns the exchange, and what each returned or raised."""
  exchange = Exchange(count)

  def call(me):
    try:
      return work(exchange.hosts(me))
    except Exception as error:
      return error

  with ThreadPoolExecutor(count) as pool:
    return exchange, list(pool.map(call, range(count)))
