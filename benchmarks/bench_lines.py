"""What a run does with a long annotation file before its first sample: of `bench_data.py --lines`."""

import multiprocessing
import os
import pathlib
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from internvl_jax.data.schedule import order as orders
from internvl_jax.data.source import jsonl


def measure(folder: pathlib.Path, count: int) -> dict[str, Any]:
  """Writes an annotation file of so many lines, and times what a run does with it before the first sample."""
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / "lines.jsonl"
  with path.open("w") as file:
    for start in range(0, count, 10_000):
      file.writelines(
        f'{{"id": {i}, "conversations": [{{"from": "human", "value": "What is {i} + 1?"}}, '
        f'{{"from": "gpt", "value": "{i + 1}"}}]}}\n'
        for i in range(start, min(start + 10_000, count))
      )
  print(f"{count} lines, {path.stat().st_size / 1e6:.0f} MB")
  result: dict[str, Any] = {"lines": count, "bytes": path.stat().st_size}
  cache = folder / "lines_cache"
  for name, action in (
    ("first opening", open_file),
    ("second opening", open_file),
    ("1000 random reads", read_lines),
    ("order of an epoch", order_lines),
  ):
    result[name] = in_fresh_process(action, str(path), str(cache), count)
    seconds, grown, peak = (result[name][key] for key in ("seconds", "grown_mb", "peak_mb"))
    print(f"{name:<20}{seconds:>9.3f} s, memory {grown:+.0f} MB, at its peak {peak:+.0f} MB")
  return result


def in_fresh_process(action: Callable[..., Any], *args: Any) -> dict[str, float]:
  """Seconds of an action, and by how much the process's own memory grew: after it, and at its peak."""
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    return pool.apply(_measure, (action, *args))


def _measure(action: Callable[..., Any], *args: Any) -> dict[str, float]:
  prepared = action(*args)
  before, peak = _memory_mb(), _peak_mb()
  start = time.perf_counter()
  kept = prepared()
  seconds = time.perf_counter() - start
  grown = _memory_mb() - before
  del kept
  return {"seconds": seconds, "grown_mb": grown, "peak_mb": max(0, _peak_mb() - peak)}


def _memory_mb() -> float:
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _peak_mb() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def open_file(path: str, cache: str, count: int) -> Callable[[], Any]:
  del count
  return lambda: jsonl.JsonlFile(path, "lines", cache=cache)


def read_lines(path: str, cache: str, count: int) -> Callable[[], Any]:
  file, chosen = (
    jsonl.JsonlFile(path, "lines", cache=cache),
    np.random.default_rng(0).integers(0, count, 1000),
  )
  return lambda: [file.read(index)["id"] for index in chosen.tolist()]


def order_lines(path: str, cache: str, count: int) -> Callable[[], Any]:
  del path, cache
  order = orders.EpochOrder(count, 0, shuffle=True)
  return lambda: (order, order.places(0, 1))
