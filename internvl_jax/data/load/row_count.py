"""How many packed rows the samples of an epoch make: counted once for the same sizes, since millions take minutes."""

import contextlib
import hashlib
import os
import pathlib

import numpy as np
import tqdm

from internvl_jax.data.schedule import packing
from internvl_jax.data.schedule.packed_rows import packable
from internvl_jax.data.source.cache import cache_errors_named, whole_file


def count_rows(
  sizes: np.ndarray, packed: packing.PackSettings, cache: str | os.PathLike[str], *, quiet: bool
) -> int:
  """Counts the rows that samples make, or finds their number in the cache; 0 if none fits a row.

  Args:
    sizes: int64 [n, 2], tokens and tiles, in the order of the stream.
    packed: what a row may hold.
    cache: folder of caches.
    quiet: show no progress.

  Raises:
    DataError: the cache cannot be written.
  """
  sizes = packable(sizes, packed)
  digest = hashlib.sha256(repr((packing.ALGORITHM, packed)).encode())
  digest.update(np.ascontiguousarray(sizes).data)
  key = digest.hexdigest()[:16]
  path = pathlib.Path(cache) / f"rows-{key}.txt"
  with contextlib.suppress(FileNotFoundError, ValueError):  # Not there, or damaged.
    return int(path.read_text(encoding="ascii"))
  with tqdm.tqdm(total=len(sizes), desc="rows", unit="sample", disable=quiet) as bar:
    rows = packing.count_rows(sizes, packed, progress=bar.update)
  if rows:
    with cache_errors_named(cache), whole_file(path) as file:
      file.write(str(rows).encode())
  return rows
