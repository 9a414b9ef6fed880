"""Micro-batches decoded ahead, by worker processes or by threads."""

import dataclasses
import functools
import os
import shutil
from typing import Any, cast

import grain
import numpy as np
from absl import flags

from internvl_jax.data.load import batching
from internvl_jax.data.load.samples import Samples
from internvl_jax.data.sample.long_samples import OVER_LONG, UNREADABLE, UNSUPERVISED, kind_of_loss
from internvl_jax.data.sample.pool import SharedSlots, SharedTiles, TilePool, keep_freed_memory
from internvl_jax.data.sample.sample import Sample
from internvl_jax.data.schedule.order import Places
from internvl_jax.data.schedule.schedule import MicroBatchRows
from internvl_jax.data.source.workers import DIED, end_with_parent, prepare_for_workers
from internvl_jax.data.where import DataError

_EVENTS = {UNREADABLE: "unreadable", OVER_LONG: "over_long", UNSUPERVISED: "fully_masked"}

# Arrays below this size travel through the pipe: making a shared-memory block costs more than copying them.
_SHARED_MEMORY_MIN_BYTES = 1 << 18
_NEVER = 1 << 62


@dataclasses.dataclass(frozen=True)
class MicroBatchSource:
  """Random access to the micro-batches of the stream, decoded on demand: what Grain's workers call.

  Attributes:
    samples: decodes them.
    rows: the samples of the R rows of each element, of all hosts.
    mine: the rows that this host decodes.
    count: number of elements.
    tile_size: side of a tile in pixels.
    tokens_per_tile: image tokens of one tile.
    image_token_id: the id of image tokens.
    max_tiles: capacity for the tiles of a micro-batch.
    shared: where worker processes write the tiles; None: to memory of their own.
    measured: the sizes of samples are known, and a sample of another size is an error.
  """

  samples: Samples
  rows: MicroBatchRows
  mine: range
  count: int
  tile_size: int
  tokens_per_tile: int
  image_token_id: int
  max_tiles: int = 0
  shared: SharedSlots | None = None
  measured: bool = False

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, element: int) -> batching.MicroBatch:
    pool = TilePool(self.tile_size, self.max_tiles)
    if self.shared is None:
      return self._make(element, pool)
    slot = self.shared.claim()
    if slot is None:
      return _without_room(self._make(element, pool))
    try:
      pool = TilePool(self.tile_size, self.max_tiles, functools.partial(self.shared.array, slot))
      micro = self._make(element, pool)
      if pool.allocated:
        return micro._replace(tiles=SharedTiles(slot, micro.tiles.shape))
    except BaseException:
      self.shared.release(slot)
      raise
    self.shared.release(slot)
    return _without_room(micro)

  def _make(self, element: int, pool: TilePool) -> batching.MicroBatch:
    return batching.pack_rows(
      [self._row(places, pool) for places in self.rows[element][self.mine.start : self.mine.stop]],
      tiles=pool.tiles,
      tokens_per_tile=self.tokens_per_tile,
      image_token_id=self.image_token_id,
    )

  def _row(self, places: Places, pool: TilePool) -> list[Sample | batching.Lost]:
    return [self._sample(int(e), int(i), pool) for e, i in zip(*places, strict=True)]

  def _sample(self, epoch: int, index: int, pool: TilePool) -> Sample | batching.Lost:
    # A lost sample travels beside the others, so that the main process decides about it, and only once the batch
    # is consumed: the same moment for any number of workers.
    dataset = self.samples.dataset_of(index)
    planned = self.samples.size_of(np.array([index]))[0] if self.measured else None
    if planned is not None and planned[0] <= 0:
      # Its place has no room, even if what was wrong is mended by now.
      return batching.Lost(dataset, _EVENTS[int(planned[0])], self.samples.why_lost(index))
    start = pool.used
    try:
      sample = self.samples.decode(epoch, index, pool)
      if planned is not None:
        batching.check_planned(sample, planned, self.samples.index_of)
      return dataclasses.replace(sample, epoch=epoch)
    except DataError as error:
      pool.rewind(start)
      return batching.Lost(dataset, _EVENTS[kind_of_loss(error)], str(error))


def _without_room(micro: batching.MicroBatch) -> batching.MicroBatch:
  """Copies what is sent from one process to another without unused memory, which would be sent too."""
  return micro._replace(tiles=micro.tiles[: micro.num_tiles.sum()])


class DecodedAhead:
  """A source's elements in order, decoded ahead by worker processes or by threads of this one."""

  def __init__(self, source: MicroBatchSource, workers: int, prefetch: int):
    """Starts to decode.

    Args:
      source: the micro-batches.
      workers: processes; 0: threads.
      prefetch: micro-batches made ahead, by each worker.
    """
    keep_freed_memory()
    self._shared: SharedSlots | None = None
    if workers:
      prepare_for_workers()
      # Each worker's queue, what it is making and what it made last; and the batches that the trainer holds.
      slots, micro_bytes = workers * (prefetch + 2) + 2, source.max_tiles * 3 * source.tile_size**2
      self._shared = SharedSlots.create(slots, micro_bytes)
      source = dataclasses.replace(source, shared=self._shared)
      # What finds no slot goes through pipes: blocks in /dev/shm have names, which a killed process leaves there.
      threshold = _shared_memory_threshold(slots * micro_bytes) if self._shared is None else _NEVER
      self._iterator = iter(_by_processes(source, workers, prefetch, threshold))
    else:
      self._iterator = iter(_by_threads(source, prefetch))

  def __next__(self) -> batching.MicroBatch:
    try:
      micro = next(self._iterator)
    except RuntimeError as error:
      if "terminated unexpectedly" not in str(error):  # Grain's words.
        raise
      raise DataError(DIED) from error
    if isinstance(micro.tiles, SharedTiles):
      assert self._shared is not None
      return micro._replace(tiles=self._shared.open(micro.tiles))
    return micro

  def close(self) -> None:
    """Ends the workers. What was handed out can still be read."""
    self._iterator.close()
    if self._shared is not None:
      self._shared.close()


def _by_threads(source: MicroBatchSource, prefetch: int) -> grain.IterDataset:
  threads = min(prefetch, os.cpu_count() or 1)
  dataset = grain.MapDataset.source(cast(Any, source))  # grain names the index differently
  return dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))


def _by_processes(source: MicroBatchSource, workers: int, prefetch: int, threshold: int) -> grain.IterDataset:
  if not flags.FLAGS.is_parsed():
    # Grain's process prefetch reads absl flags of its own, which only `app.run` parses; in a test, a notebook or
    # another program their defaults are right.
    flags.FLAGS.mark_as_parsed()
  dataset = grain.MapDataset.source(cast(Any, source))
  # A worker decodes one micro-batch at a time: threads within it would only contend for the interpreter lock.
  iterable = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  options = grain.experimental.DatasetOptions(min_shm_size=threshold)
  iterable = grain.experimental.WithOptionsIterDataset(iterable, options)
  return iterable.mp_prefetch(
    grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch), _start_worker
  )


def _start_worker(index: int, count: int) -> None:
  del index, count
  keep_freed_memory()
  end_with_parent()


def _shared_memory_threshold(in_flight: int) -> int:
  """Finds from which size in bytes on arrays travel through shared memory."""
  # A full /dev/shm (64 MB by default in Docker) kills the worker with a bus error; pipes are slower but safe.
  try:
    free = shutil.disk_usage("/dev/shm").free
  except OSError:  # a system without it
    free = 0
  return _SHARED_MEMORY_MIN_BYTES if in_flight < free else _NEVER
