"""Whether processes that hold the same part of a parameter hold the same numbers in it.

Each host reads a checkpoint from its own disk, and large files are compared in parts only (`facts`). Where a file differs
elsewhere, hosts that have both read that place would train copies which are not the same, and nobody would see it. What
one host alone has read is the same for all: nobody has anything else. So what is compared is what several of them hold,
after it was read, wherever it came from.
"""

import concurrent.futures
import json
import socket
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from internvl_jax.parallel.distributed import DisagreementError, all_gather_bytes

_THREADS = 4
"""Each takes a checksum of a gigabyte in about a second."""

_SHOWN = 3


def check_replicas(params: Mapping[str, jax.Array], name: str) -> None:
  """Compares what several processes hold; all of them call this.

  Args:
    params: by path.
    name: where they were read.

  Raises:
    DisagreementError: they differ; in all processes, with the same words.
  """
  if jax.process_count() == 1:
    return
  mine = checksums(params, jax.process_index(), lambda device: device.process_index)
  said = all_gather_bytes(json.dumps([socket.gethostname(), mine]).encode())
  if line := difference([json.loads(text) for text in said], name):
    raise DisagreementError(line)


def checksums(
  params: Mapping[str, jax.Array], process: int, process_of: Callable[[Any], int]
) -> dict[str, int]:
  """CRC-32 of the parts that a process holds and others hold as well, by path and place.

  Args:
    params: by path.
    process: its number.
    process_of: of a device.
  """
  parts = dict(_shared_parts(params, process, process_of))
  with concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="replicas") as pool:
    return dict(zip(parts, pool.map(_checksum, parts.values()), strict=True))


def _shared_parts(
  params: Mapping[str, jax.Array], process: int, process_of: Callable[[Any], int]
) -> Iterator[tuple[str, jax.Array]]:
  for path, array in sorted(params.items()):
    holders: dict[str, set[int]] = {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
      holders.setdefault(_place(index), set()).add(process_of(device))
    for shard in array.addressable_shards:
      place = _place(shard.index)
      if process_of(shard.device) == process and len(holders[place]) > 1:
        yield f"{path}{place}", shard.data


def _place(index: tuple[slice, ...]) -> str:
  """A part as in `array[0:4, :]`; empty for all of it."""
  axes = [
    ":" if (axis.start, axis.stop) == (None, None) else f"{axis.start or 0}:{axis.stop}" for axis in index
  ]
  return f"[{', '.join(axes)}]" if any(axis != ":" for axis in axes) else ""


def _checksum(part: jax.Array) -> int:
  # Layer by layer, which are forgotten again: an array keeps its copy on the host for as long as it lives.
  layers = (part[i] for i in range(len(part))) if part.ndim > 1 else iter([part])
  total = 0
  for layer in layers:
    total = zlib.crc32(np.ascontiguousarray(layer).reshape(-1).view(np.uint8).data, total)
  return total


def difference(said: Sequence[tuple[str, Mapping[str, int]]], name: str) -> str | None:
  """One line that names a parameter that differs, and who has what; None if none does.

  Args:
    said: host and checksums of each process.
    name: where they were read.
  """
  values: dict[str, dict[int, list[str]]] = {}
  for process, (host, sums) in enumerate(said):
    for place, total in sums.items():
      values.setdefault(place, {}).setdefault(total, []).append(f"{host} (process {process})")
  differing = [place for place, found in values.items() if len(found) > 1]
  if not differing:
    return None
  ranked = sorted(values[differing[0]].items(), key=lambda item: -len(item[1]))
  shown = [
    f"{total:08x} on {', '.join(hosts[:_SHOWN])}"
    + (f" and {len(hosts) - _SHOWN} more" if hosts[_SHOWN:] else "")
    for total, hosts in ranked[:_SHOWN]
  ]
  more = f", and {len(differing) - 1} more differ" if differing[1:] else ""
  return (
    f"the processes of this run have read different weights: the checksum of {differing[0]} is {', '.join(shown)}{more}; "
    f"give all hosts the same files of {name}"
  )
