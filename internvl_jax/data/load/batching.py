"""From samples to the padded batch of an optimizer step: pure numpy.

Letters as in `internvl_jax.batch`: A micro-batches, R rows, S tokens of a row, D data shards, T tiles of a
shard's pool, P tokens of a tile; and G samples of a micro-batch, one or, packed, several a row, each of J segments.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE, TokenBatch
from internvl_jax.data.sample.notes import Note
from internvl_jax.data.sample.sample import Sample
from internvl_jax.data.schedule.shapes import tile_bucket

EVENTS = ("unreadable", "truncated", "fully_masked", "over_long", "shrunk", "split")
"""Events of a sample: it could not be read; lost its end, or a piece without supervision; supervises nothing; is
lost because it is too long; got fewer tiles or frames; is a second, third, ... piece."""


class MicroBatch(NamedTuple):
  """The samples of one micro-batch end to end, without padding: what travels from a worker process.

  Attributes:
    input_ids: int32 [sum of lengths].
    labels: int32 [sum of lengths], not shifted.
    lengths: int32 [G], tokens of each sample; 0 for one that was dropped.
    segments: int32 [G, J], tokens of each segment; 0 likewise.
    shared: int32 [G], tokens of each sample's first segment that its others follow as well; see `Sample`.
    indices: int64 [G], index of each sample in the mixture; -1 for one that was dropped.
    epochs: int64 [G], how often the data of each were run through before; with the index, what seeds all that is drawn of a
      sample. -1 for one that was dropped.
    rows: int32 [G], the row of each sample, ascending.
    num_rows: R.
    tiles: uint8 [sum of num_tiles or more, H, W, 3]: those of the samples, then unused memory of any content. (Between processes
      they may travel as `pool.SharedTiles`.)
    num_tiles: int32 [G], tiles of each sample.
    datasets: int32 [G], the dataset of each sample.
    events: bool [G, EVENTS].
    errors: messages of the samples that were lost; one for each of length 0.
    notes: what one should know about how images were taken.
    compressed: bool [J, sum of num_tiles], which tiles are compressed in each segment of their samples; None: none is.
  """

  input_ids: np.ndarray
  labels: np.ndarray
  lengths: np.ndarray
  segments: np.ndarray
  shared: np.ndarray
  indices: np.ndarray
  epochs: np.ndarray
  rows: np.ndarray
  num_rows: int
  tiles: np.ndarray
  num_tiles: np.ndarray
  datasets: np.ndarray
  events: np.ndarray
  errors: tuple[str, ...]
  notes: tuple[Note, ...] = ()
  compressed: np.ndarray | None = None

  def happened(self, event: str) -> np.ndarray:
    """Computes bool [G]: which samples an event happened to."""
    return self.events[:, EVENTS.index(event)]


class Lost(NamedTuple):
  """The place of a sample that could not be made.

  Attributes:
    dataset: index of its dataset.
    event: "unreadable", "over_long" or "fully_masked".
    message: why, in one line.
  """

  dataset: int
  event: str
  message: str


def pack_rows(
  rows: Sequence[Sequence[Sample | Lost]],
  *,
  tiles: np.ndarray,
  tokens_per_tile: int,
  image_token_id: int,
  tokens_per_compressed_tile: int = 0,
) -> MicroBatch:
  """Joins the rows of a micro-batch.

  Args:
    rows: the samples of each row, in their order.
    tiles: the tiles of all samples in this order, then unused memory of any content.
    tokens_per_tile: image tokens of one tile.
    image_token_id: the id of image tokens.
    tokens_per_compressed_tile: image tokens of one that is compressed; samples without a compressed tile need none.

  Raises:
    DataError: the image tokens of a sample's segment are not those of its tiles.
  """
  places = [place for row in rows for place in row]
  samples = [place for place in places if isinstance(place, Sample)]
  for sample in samples:
    _check_image_tokens(sample, tokens_per_tile, tokens_per_compressed_tile, image_token_id)
  assert len(tiles) >= sum(len(s.tiles) for s in samples)
  none = np.zeros(0, np.int32)
  segments = [sample.lengths or (len(sample.input_ids),) for sample in samples]
  read = [isinstance(place, Sample) for place in places]
  return MicroBatch(
    input_ids=np.concatenate([none, *(s.input_ids for s in samples)]),
    labels=np.concatenate([none, *(s.labels for s in samples)]),
    lengths=_scatter(read, [len(s.input_ids) for s in samples], np.int32),
    segments=_scatter(read, segments or np.zeros((0, 1)), np.int32),
    shared=_scatter(read, [s.shared for s in samples], np.int32),
    indices=_scatter(read, [s.index for s in samples], np.int64, empty=-1),
    epochs=_scatter(read, [s.epoch for s in samples], np.int64, empty=-1),
    rows=np.repeat(np.arange(len(rows), dtype=np.int32), [len(row) for row in rows]),
    num_rows=len(rows),
    tiles=tiles,
    num_tiles=_scatter(read, [len(s.tiles) for s in samples], np.int32),
    datasets=np.array([place.dataset for place in places], np.int32),
    events=np.array([_events(place) for place in places], np.bool_).reshape(-1, len(EVENTS)),
    errors=tuple(place.message for place in places if isinstance(place, Lost)),
    notes=tuple(note for sample in samples for note in sample.notes),
    compressed=_compressed(samples),
  )


def _compressed(samples: Sequence[Sample]) -> np.ndarray | None:
  """Which tiles are compressed, bool [J, sum of tiles]; None where none is."""
  if all(sample.compressed is None for sample in samples):
    return None
  segments = len(samples[0].lengths) or 1
  none = (np.zeros((segments, len(s.tiles)), np.bool_) for s in samples)
  return np.concatenate(
    [empty if s.compressed is None else s.compressed for s, empty in zip(samples, none, strict=True)], axis=1
  )


def _events(place: Sample | Lost) -> list[bool]:
  if isinstance(place, Lost):
    return [event == place.event for event in EVENTS]
  return [False, place.truncated, place.fully_masked, False, place.shrunk, place.piece > 0]


def _scatter(where: Sequence[bool], values: ArrayLike, dtype: type, empty: int = 0) -> np.ndarray:
  """Computes [G, ...]: the values at the True places in order, `empty` elsewhere."""
  values = np.asarray(values, dtype)
  out = np.full((len(where), *values.shape[1:]), empty, dtype)
  out[np.array(where, np.bool_)] = values
  return out


def _check_image_tokens(
  sample: Sample, tokens_per_tile: int, tokens_per_compressed_tile: int, image_token_id: int
) -> None:
  for number, segment in enumerate(sample.segments()):
    found = int((segment.input_ids == image_token_id).sum())
    fewer = 0 if sample.compressed is None else int(sample.compressed[number].sum())
    wanted = len(sample.tiles) * tokens_per_tile - fewer * (tokens_per_tile - tokens_per_compressed_tile)
    if found != (0 if number and sample.shared else wanted):
      compressed = f", of which {fewer} are compressed to {tokens_per_compressed_tile}," if fewer else ""
      raise sample.where.error(
        f"{found} image tokens but {len(sample.tiles)} tiles of {tokens_per_tile} tokens{compressed} = {wanted}; the "
        "tokenizer and the images disagree"
      )


def check_planned(
  sample: Sample, planned: np.ndarray, index_of: Callable[[int], str] = lambda index: ""
) -> None:
  """Refuses a sample whose size is not the one that was planned: its row might not hold it.

  Args:
    sample: as it was decoded.
    planned: int64 [2], its tokens and tiles by the index of sizes.
    index_of: returns the folder of that index for a sample of the mixture, "" where its line states its sizes itself.

  Raises:
    DataError: the numbers differ.
  """
  tokens, tiles = planned.tolist()
  if (tokens, tiles) == (len(sample.input_ids), len(sample.tiles)):
    return
  found = f"it has {len(sample.input_ids)} tokens and {len(sample.tiles)} tiles, but {tokens} and {tiles} were planned: "
  if index := index_of(sample.index):
    raise sample.where.error(
      f"{found}its files were replaced since they were measured; delete the cache of sizes, {index}, on every host "
      "and start again"
    )
  raise sample.where.error(
    f"{found}the image's size is not what the line says, or it was replaced; correct the line's width and height"
  )


def _bucket(needed: int, buckets: Sequence[int]) -> int:
  return next(size for size in buckets if size >= needed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Padding:
  """The sizes that a batch is padded to.

  Attributes:
    data_shards: D; divides R.
    image_token_id: the id of image tokens.
    sequence_sizes: the buckets for S, ascending.
    tile_sizes: the user's buckets for T; see `tile_bucket`.
    loss_reduction: weight of a token, n being the supervised tokens of its segment: "token" 1, "sample" 1/n,
      "square" 1/sqrt(n).
    at_least: the least tokens of a row and tiles of a pool to pad to, because other hosts have them.
    features_per_tile: P and Q where the model computes the features of compressed tiles as well as the usual ones
      (`InternVL.extract_features`): a tile has P + Q of them then. None: the usual P.
  """

  data_shards: int
  image_token_id: int
  sequence_sizes: Sequence[int]
  tile_sizes: Sequence[int] = ()
  loss_reduction: str = "token"
  at_least: tuple[int, int] = (0, 0)
  features_per_tile: tuple[int, int] | None = None


def assemble(micro_batches: Sequence[MicroBatch], padding: Padding) -> TokenBatch:
  """Pads A micro-batches to the smallest buckets that hold them all.

  Rows are dealt to shards in blocks of R/D, and a shard's pool holds its rows' tiles in order of the rows. So
  the features of the pool are in the order of the shard's image tokens, and `image_index` counts these; every further
  segment of a sample counts again from where its first began. The samples' segments are those of the row, numbered from
  1, each with positions of its own; those of segments that share a prompt go on from the tokens that they share.

  Args:
    micro_batches: A of them, each with R rows. The memory of a single one becomes the batch's.
    padding: what to pad to.
  """
  accumulation, rows = len(micro_batches), micro_batches[0].num_rows
  lengths = np.stack([_row_sums(micro, micro.lengths) for micro in micro_batches])  # [A, R]
  num_tiles = np.stack([_row_sums(micro, micro.num_tiles) for micro in micro_batches])
  length = _bucket(max(int(lengths.max()), padding.at_least[0]), padding.sequence_sizes)
  by_shard = (accumulation, padding.data_shards, rows // padding.data_shards)
  fullest = int(num_tiles.reshape(by_shard).sum(-1).max())
  pool = tile_bucket(max(fullest, padding.at_least[1]), padding.tile_sizes)

  real = np.arange(length) < lengths[:, :, None]  # [A, R, S]

  def padded(values: list[np.ndarray], empty: int, dtype: type) -> np.ndarray:
    """Pads the samples' numbers, which are end to end, to [A, R, S]."""
    out = np.full(real.shape, empty, dtype)
    out[real] = np.concatenate(values)
    return out

  input_ids = padded([micro.input_ids for micro in micro_batches], 0, np.int32)
  labels = padded([_predictable(micro) for micro in micro_batches], IGNORE_INDEX, np.int32)
  weights = padded([_token_weights(micro, padding.loss_reduction) for micro in micro_batches], 0, np.float32)
  targets = np.full_like(labels, IGNORE_INDEX)
  targets[:, :, :-1] = labels[:, :, 1:]
  loss_weight = np.zeros_like(weights)
  loss_weight[:, :, :-1] = weights[:, :, 1:]
  return TokenBatch(
    input_ids=input_ids,
    targets=targets,
    loss_weight=np.where(targets != IGNORE_INDEX, loss_weight, np.float32(0)),
    positions=padded([_positions(micro) for micro in micro_batches], 0, np.int32),
    segment_ids=padded([_segment_ids(micro) for micro in micro_batches], 0, np.int32),
    image_index=padded(
      [_image_index(micro, padding) for micro in micro_batches],
      NO_IMAGE,
      np.int32,
    ),
    tiles=_pools(micro_batches, num_tiles.reshape(by_shard).sum(-1), pool),
  )


def _row_sums(micro: MicroBatch, values: np.ndarray) -> np.ndarray:
  """Computes [R]: sums of the rows' samples from [G]."""
  return np.bincount(micro.rows, values, micro.num_rows).astype(np.int64)


def numbers_in_rows(present: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """Computes int32 [n]: the number within its row, from 1, of each that is present; one that is not takes none.

  Args:
    present: bool [n].
    rows: int [n], ascending.
  """
  so_far = present.cumsum()
  before = np.concatenate([[0], so_far])[np.searchsorted(rows, rows)]
  return (so_far - before).astype(np.int32)


def segment_numbers(micro: MicroBatch) -> np.ndarray:
  """Computes int32 [G, J]: the number of each segment within its row, from 1; one without tokens takes none."""
  present = micro.segments.ravel() > 0
  numbers = numbers_in_rows(present, micro.rows.repeat(micro.segments.shape[1]))
  return numbers.reshape(micro.segments.shape)


def _segment_ids(micro: MicroBatch) -> np.ndarray:
  """Computes int32 [sum of lengths]: the number of each token's segment within its row."""
  return np.repeat(segment_numbers(micro).ravel(), micro.segments.ravel())


def _offsets(segments: np.ndarray) -> np.ndarray:
  """Computes int32 [sum of lengths]: 0, 1, ... within each segment."""
  lengths = segments.ravel()
  starts = lengths.cumsum() - lengths
  return (np.arange(lengths.sum()) - np.repeat(starts, lengths)).astype(np.int32)


def _positions(micro: MicroBatch) -> np.ndarray:
  """Computes int32 [sum of lengths]: places within each segment, behind the tokens that it shares."""
  before = np.zeros_like(micro.segments)
  before[:, 1:] = micro.shared[:, None]
  return _offsets(micro.segments) + before.ravel().repeat(micro.segments.ravel())


def parents(micro: MicroBatch) -> np.ndarray:
  """Returns int32 [sum of lengths]: for attention's mask, the segment whose prompt a token sees besides its own.

  Tokens that a sample's segments share have the number of their own segment, the first; tokens of the others have it,
  too; all else has 0.
  """
  numbers = segment_numbers(micro)
  until = micro.segments.copy()
  until[:, 0] = micro.shared
  until[micro.shared == 0] = 0
  first = np.broadcast_to(numbers[:, :1], numbers.shape)
  lengths = micro.segments.ravel()
  sees = _offsets(micro.segments) < until.ravel().repeat(lengths)
  return np.where(sees, first.ravel().repeat(lengths), 0).astype(np.int32)


def _predictable(micro: MicroBatch) -> np.ndarray:
  """The labels without those of the first token of each segment; see `tokenize.supervised`."""
  labels = micro.labels.copy()
  labels[_offsets(micro.segments) == 0] = IGNORE_INDEX
  return labels


def _token_weights(micro: MicroBatch, loss_reduction: str) -> np.ndarray:
  """Computes float32 [sum of lengths]: the weight of each token's label."""
  owner = np.repeat(np.arange(micro.segments.size), micro.segments.ravel())
  count = np.bincount(owner, micro.labels != IGNORE_INDEX, micro.segments.size)
  power = {"token": 0.0, "square": -0.5, "sample": -1.0}[loss_reduction]
  return (np.maximum(count, 1.0) ** power).astype(np.float32)[owner]


def _image_index(micro: MicroBatch, padding: Padding) -> np.ndarray:
  """Computes int32 [sum of lengths]: the index of a token's feature in its shard's pool, or NO_IMAGE."""
  is_image = micro.input_ids == padding.image_token_id
  if padding.features_per_tile is not None:
    index = np.full(is_image.shape, NO_IMAGE, np.int32)
    index[is_image] = _mixed_index(micro, padding.data_shards, *padding.features_per_tile)
    return index
  before = np.concatenate([[0], is_image.cumsum(dtype=np.int32)])  # image tokens before each token
  ends = micro.segments.cumsum().reshape(micro.segments.shape)
  firsts = before[ends - micro.segments]  # [G, J]
  # All segments of a sample show its tiles once; one that shares its prompt has no image tokens.
  features = before[ends[:, 0]] - firsts[:, 0]
  shards = _shards_of(micro, padding.data_shards)
  start = np.concatenate([[0], features.cumsum()])
  first_features = start[:-1] - start[np.searchsorted(shards, shards)]
  shift = (firsts - first_features[:, None]).ravel().astype(np.int32)
  return np.where(is_image, before[:-1] - np.repeat(shift, micro.segments.ravel()), np.int32(NO_IMAGE))


def _mixed_index(micro: MicroBatch, data_shards: int, usual: int, compressed: int) -> np.ndarray:
  """Computes int32 [image tokens]: the index of each one's feature, where a tile has those of both resolutions.

  Args:
    micro: the samples.
    data_shards: D.
    usual: P, a tile's first features.
    compressed: Q, those behind them, which are its tokens where it is compressed.
  """
  tiles, segments = int(micro.num_tiles.sum()), micro.segments.shape[1]
  chosen = micro.compressed if micro.compressed is not None else np.zeros((segments, tiles), np.bool_)
  owner = np.repeat(np.arange(len(micro.num_tiles)), micro.num_tiles)
  shards = _shards_of(micro, data_shards)[owner]
  first = (np.arange(tiles) - np.searchsorted(shards, shards)) * (usual + compressed)
  # A segment shows the tiles of its sample in their order, unless it sees those of the first.
  shows = (np.arange(segments)[:, None] == 0) | (micro.shared[owner] == 0)
  shows &= (micro.segments > 0).T[:, owner]
  order = np.argsort((owner * segments + np.arange(segments)[:, None])[shows], kind="stable")
  starts = (first + usual * chosen)[shows][order]
  counts = np.where(chosen, compressed, usual)[shows][order]
  return (np.repeat(starts - counts.cumsum() + counts, counts) + np.arange(counts.sum())).astype(np.int32)


def _shards_of(micro: MicroBatch, data_shards: int) -> np.ndarray:
  """Computes int [G]: the data shard of each sample."""
  return micro.rows // (micro.num_rows // data_shards)


def _pools(micro_batches: Sequence[MicroBatch], used: np.ndarray, pool: int) -> np.ndarray:
  """Computes uint8 [A, D, T, H, W, 3] from the tiles end to end and how many each shard uses, [A, D]."""
  if used.size == 1 and len(micro_batches[0].tiles) >= pool:
    # A whole batch already, but for what is not used; copying it would be the most of what this process does.
    tiles = np.asarray(micro_batches[0].tiles)[:pool]
    tiles[used.item() :] = 0
    return tiles[None, None]
  tiles = np.zeros((*used.shape, pool, *micro_batches[0].tiles.shape[1:]), np.uint8)
  ends = used.cumsum(-1)
  for a, micro in enumerate(micro_batches):
    for d, (end, count) in enumerate(zip(ends[a], used[a], strict=True)):
      tiles[a, d, :count] = micro.tiles[end - count : end]
  return tiles
