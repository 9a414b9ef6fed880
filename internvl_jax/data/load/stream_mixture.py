"""The samples of streams by number: read in order, measured as they come, kept as long as they are needed."""

import collections
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from internvl_jax.data.load.mixture import limits_of
from internvl_jax.data.load.samples import Settings
from internvl_jax.data.sample import compiled, video
from internvl_jax.data.sample.long_samples import UNREADABLE, kind_of_loss
from internvl_jax.data.sample.pool import TilePool
from internvl_jax.data.sample.sample import Sample, SampleMaker
from internvl_jax.data.source import streams
from internvl_jax.data.source.meta import DatasetSpec
from internvl_jax.data.where import DataError, Where

# Places of samples that were let go, for messages about the last batches.
_PLACES_KEPT = 1 << 14


class Cursor(NamedTuple):
  """A place in a mixture of streams, before a record.

  Attributes:
    record: how many records of all datasets came before.
    places: for each dataset: the pass, the place of the shard in the pass's order, and how many of the shard's records
      came before.
  """

  record: int
  places: tuple[tuple[int, int, int], ...]


class _Met(NamedTuple):
  """A sample that was met: a record, or a piece of one.

  Attributes:
    dataset: its number.
    where: the record.
    record: parsed; None where it cannot be.
    frames: how many to take of a video.
    piece: which piece it is.
    size: tokens, or why it is lost, and tiles.
    error: why it is lost.
    before: the place before its record.
    first: the number of the record's first sample.
  """

  dataset: int
  where: Where
  record: Any
  frames: int
  piece: int
  size: tuple[int, int]
  error: str
  before: Cursor
  first: int


class StreamMixture:
  """Samples of streams by their number, as `samples.Samples`, from the oldest that is still needed on.

  Attributes:
    names: of the datasets.
  """

  def __init__(self, settings: Settings, specs: Sequence[DatasetSpec], lane: int, lanes: int):
    """Opens the streams.

    Args:
      settings: of the loader.
      specs: what the meta file says.
      lane: number of this host.
      lanes: how many hosts read shards of their own.

    Raises:
      DataError: a stream cannot be opened, or has fewer shards than there are hosts.
    """
    self._settings, self._specs, self._lane, self._lanes = settings, specs, lane, lanes
    self._seed = settings.training.seed
    self.names = [spec.name for spec in specs]
    opened = [streams.open_stream(spec.key, spec.annotation, spec.name) for spec in specs]
    for stream in opened:
      if stream.num_shards < lanes:
        raise DataError(
          f"{stream.path}: dataset {stream.dataset!r} has {stream.num_shards} shards, and {lanes} hosts read one each at "
          f"least; write it into {lanes} files or more"
        )
    self._streams = opened
    self._makers = [self._maker(spec, stream) for spec, stream in zip(specs, opened, strict=True)]
    weights = np.cumsum([spec.repeat_time for spec in specs])
    self._shares = weights / weights[-1]
    self._lock = threading.RLock()
    self._wheres: collections.OrderedDict[int, tuple[Where, int]] = collections.OrderedDict()
    self.go_to(0, Cursor(0, ((0, 0, 0),) * len(specs)))

  def _maker(self, spec: DatasetSpec, stream: streams.Stream) -> SampleMaker:
    """The maker of samples of a stream, in the form of its first records."""
    settings = self._settings
    return SampleMaker(
      spec=spec,
      data=settings.data,
      tokenizer=settings.tokenizer,
      tokens_per_tile=settings.tokens_per_tile,
      limits=limits_of(settings.data, settings.loader.on_over_length),
      lines=settings.task.lines.recognized(_first_of(stream)),
    )

  # --- Reading ----------------------------------------------------------------------------------------------

  def go_to(self, sample: int, cursor: Cursor) -> None:
    """Goes to a place, of which the first sample has this number."""
    with self._lock:
      self._met: dict[int, _Met] = {}
      self._next, self._cursor = sample, cursor
      self._readers: list[Iterator[streams.Entry] | None] = [None] * len(self._specs)

  def place_of(self, sample: int) -> tuple[int, Cursor]:
    """A place, and the number of its first sample, from which on all samples are met from this one on."""
    with self._lock:
      self._read_to(sample)
      if sample == self._next:
        return sample, self._cursor
      met = self._met[sample]
      return met.first, met.before

  def let_go(self, sample: int) -> None:
    """Forgets the samples before this one."""
    with self._lock:
      for index in [index for index in self._met if index < sample]:
        met = self._met.pop(index)
        self._wheres[index] = met.where, met.dataset
      while len(self._wheres) > _PLACES_KEPT:
        self._wheres.popitem(last=False)

  def _read_to(self, end: int) -> None:
    """Reads on until the samples before this one are met."""
    while self._next < end:
      before = self._cursor
      number = int(np.searchsorted(self._shares, self._draw(before.record), side="right"))
      entry = self._next_entry(number)
      for met in self._measured(number, entry, before):
        self._met[self._next] = met
        self._next += 1

  def _draw(self, record: int) -> float:
    """A number in [0, 1) for a record: which dataset it is of."""
    if len(self._specs) == 1:
      return 0.0
    return float(np.random.default_rng((self._seed, self._lane, record)).random())

  def _next_entry(self, number: int) -> streams.Entry:
    """The next record of a dataset, after which the place is that behind it."""
    round_, shard, record = self._cursor.places[number]
    rounds = 0
    while True:
      mine = self._shards(number, round_)
      if shard >= len(mine):
        round_, shard, record, rounds = round_ + 1, 0, 0, rounds + 1
        if rounds > 1:
          stream = self._streams[number]
          raise DataError(f"{stream.path}: dataset {stream.dataset!r}: the stream is empty: 0 records")
        continue
      reader = self._readers[number]
      if reader is None:
        reader = self._readers[number] = _whole(self._streams[number].records(mine[shard]))
        for _ in range(record):
          next(reader, None)
      entry = next(reader, None)
      if entry is not None:
        self._move(number, (round_, shard, record + 1))
        return entry
      self._readers[number] = None
      shard, record = shard + 1, 0

  def _move(self, number: int, place: tuple[int, int, int]) -> None:
    places = list(self._cursor.places)
    places[number] = place
    self._cursor = Cursor(self._cursor.record + 1, tuple(places))

  def _shards(self, number: int, round_: int) -> list[int]:
    """The shards of a dataset that this host reads in a pass, in order."""
    count = self._streams[number].num_shards
    order = np.arange(count)
    if self._settings.loader.shuffle:
      training = self._settings.training
      seed = training.seed if training.data_seed is None else training.data_seed
      order = np.random.default_rng((seed, number, round_)).permutation(count)
    return order[self._lane :: self._lanes].tolist()

  def _measured(self, number: int, entry: streams.Entry, before: Cursor) -> Iterator[_Met]:
    """Yields the samples of a record, one that is lost if it has none."""
    data, maker = self._settings.data, self._makers[number]
    rng = np.random.default_rng((self._seed, number, self._lane, before.record))
    frames = video.num_wanted(rng, data.min_num_frame, data.max_num_frame)
    met = _Met(number, entry.where, None, frames, 0, (UNREADABLE, 0), "", before, self._next)
    try:
      record = entry.make()
      size = maker.measure(record, entry.where, frames)
    except DataError as error:
      yield met._replace(error=str(error))
      return
    met = met._replace(record=record)
    try:
      row_tiles = maker.limits.row_tiles
      if size.tokens <= maker.limits.tokens and (row_tiles is None or size.tiles <= row_tiles):
        yield met._replace(size=(size.tokens, size.tiles))
        return
      sizes = maker.pieces(record, entry.where, frames)
    except DataError as error:
      yield met._replace(size=(kind_of_loss(error), 0), error=str(error), record=None)
      return
    for piece, found in enumerate(sizes):
      yield met._replace(piece=piece, size=found)

  # --- Samples ----------------------------------------------------------------------------------------------

  def _at(self, index: int) -> _Met:
    with self._lock:
      self._read_to(index + 1)
      return self._met[index]

  def max_tiles(self) -> int:
    """The most tiles that one sample may have."""
    return self._settings.data.max_seq_length // self._settings.tokens_per_tile

  def dataset_of(self, index: int) -> int:
    """The number of the dataset that a sample is of."""
    with self._lock:
      return self._wheres[index][1] if index in self._wheres else self._at(index).dataset

  def where(self, index: int) -> Where:
    """The record that a sample comes from."""
    with self._lock:
      return self._wheres[index][0] if index in self._wheres else self._at(index).where

  def record(self, index: int) -> tuple[Any, dict[str, Any]]:
    """The record that a sample comes from, and what of it is read; of samples that were not let go."""
    met = self._at(index)
    return met.record, self._makers[met.dataset].lines.plain(met.record, met.where)

  def decode(self, epoch: int, index: int, pool: TilePool | None = None) -> Sample:
    """A sample, decoded. Augmentation and a video's frames depend on seed, host and number alone.

    Raises:
      DataError: it cannot be made.
    """
    met = self._at(index)
    if met.record is None:
      raise DataError(met.error)
    rng = np.random.default_rng((self._seed, epoch, self._lane, index))
    made = self._makers[met.dataset].make(
      met.record, met.where, rng, frames=met.frames, piece=met.piece, pool=pool
    )
    return dataclasses.replace(made, dataset=met.dataset, index=index)

  def size_of(self, indices: np.ndarray) -> np.ndarray:
    """Tokens and tiles of samples, int64 [n, 2]; reads on as far as they reach."""
    return np.array([self._at(index).size for index in indices.tolist()], np.int64).reshape(-1, 2)

  sizes_now = size_of

  def index_of(self, index: int) -> str:
    """Always "": sizes are not kept."""
    del index
    return ""

  def why_lost(self, index: int) -> str:
    """Why a sample whose size has no tokens is lost."""
    return self._at(index).error

  def dataset_lines(self) -> list[str]:
    """One line for each stream, and one on what decodes their images."""
    lines = [
      f"{spec.name}: a stream of unknown length, {stream.num_shards} shards, drawn {spec.repeat_time:g} times, root "
      f"{spec.root or '.'}, {spec.annotation} ({stream.kind}, {maker.lines.form_name})"
      for spec, stream, maker in zip(self._specs, self._streams, self._makers, strict=True)
    ]
    return [*lines, compiled.note()]

  def close(self) -> None:
    """Closes what is read."""
    with self._lock:
      self._readers = [None] * len(self._specs)


def _whole(entries: Iterator[streams.Entry]) -> Iterator[streams.Entry]:
  """The records of a shard; one that cannot be read on ends with a record that cannot be made, and is counted as such."""
  where = None
  try:
    for entry in entries:
      where = entry.where
      yield entry
  except DataError as error:
    broken = error

    def make() -> Any:
      raise broken

    yield streams.Entry(where or Where("", "", 0), make)


def _first_of(stream: streams.Stream) -> Iterator[Any]:
  """The first record of a stream, if it can be read."""
  for entry in _whole(stream.records(0)):
    try:
      yield entry.make()
    except DataError:
      continue  # It is said when its turn comes.
    return
