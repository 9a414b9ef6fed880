"""Conversations with and without compressed tiles, as batches: pure numpy.

Samples are measured and packed at their full length, which the rows without compressed tiles have; what is compressed is
drawn afterwards, and leaves room at the ends of the other rows. So shapes do not depend on what is drawn.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int

from internvl_jax.data.load import batching
from internvl_jax.data.load.batching import MicroBatch, Padding
from internvl_jax.data.sample.lines import LineSchema
from internvl_jax.tasks.sft.data import DATA
from internvl_jax.tasks.vico.batch import FlashBatch, FullRows

Draw = Callable[[np.random.Generator, int], np.ndarray]
"""Draws which of a sample's tiles are compressed, bool [t], of t tiles at least one."""

# Tells these draws from those of augmentation.
_STREAM = 0x5F1A


@dataclasses.dataclass(frozen=True)
class Independently:
  """Each tile with this probability, by itself."""

  share: float

  def __call__(self, rng: np.random.Generator, tiles: int) -> Bool[np.ndarray, " tiles"]:
    return rng.random(tiles) < self.share


@dataclasses.dataclass(frozen=True)
class OneTile:
  """One tile of the sample."""

  def __call__(self, rng: np.random.Generator, tiles: int) -> Bool[np.ndarray, " tiles"]:
    return np.arange(tiles) == rng.integers(tiles)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashData:
  """Lines of conversations, and their batches; see `load.task.DataTask`.

  Attributes:
    draw: which tiles are compressed.
    seed: of what is drawn of a sample, with its epoch and its number: nothing else has an influence.
    features_per_tile: P and Q, image tokens of a tile and of one that is compressed.
    lines: what kind of line they are.
  """

  draw: Draw
  seed: int
  features_per_tile: tuple[int, int]
  lines: LineSchema = DATA.lines

  conversations = 1

  def assemble(self, micro_batches: Sequence[MicroBatch], padding: Padding) -> FlashBatch:
    """Pads A micro-batches twice, to the buckets of their full length.

    Args:
      micro_batches: A of them, each with R rows.
      padding: what to pad to.
    """
    shorter, kept = zip(
      *(
        shortened(micro, self.drawn(micro), self.features_per_tile, padding.image_token_id)
        for micro in micro_batches
      ),
      strict=True,
    )
    # Without pixels, which the other rows have.
    unseen = [micro._replace(tiles=micro.tiles[:, :0, :0]) for micro in micro_batches]
    full = batching.assemble(unseen, padding)
    least = (full.input_ids.shape[2], max(padding.at_least[1], full.tiles.shape[2]))
    rows = batching.assemble(
      shorter, dataclasses.replace(padding, at_least=least, features_per_tile=self.features_per_tile)
    )
    place = np.zeros_like(rows.input_ids)
    place[rows.segment_ids > 0] = np.concatenate(
      [offsets_in_rows(micro)[stay] for micro, stay in zip(micro_batches, kept, strict=True)]
    )
    return FlashBatch(
      rows=rows,
      full=FullRows(*(getattr(full, name) for name in FullRows._fields)),
      place=place,
      **owners_of_tiles(shorter, rows.tiles.shape[:3]),
    )

  def drawn(self, micro: MicroBatch) -> Bool[np.ndarray, " tiles"]:
    """Which tiles of a micro-batch are compressed, bool [sum of num_tiles]."""
    found = [np.zeros(0, np.bool_)]
    for count, epoch, index in zip(micro.num_tiles, micro.epochs, micro.indices, strict=True):
      if count:
        found.append(self.draw(np.random.default_rng((self.seed, _STREAM, epoch, index)), int(count)))
    return np.concatenate(found)


def shortened(
  micro: MicroBatch,
  compressed: Bool[np.ndarray, " tiles"],
  features_per_tile: tuple[int, int],
  image_token_id: int,
) -> tuple[MicroBatch, Bool[np.ndarray, " tokens"]]:
  """A micro-batch in which tiles are compressed: of their P image tokens, the first Q stay.

  Args:
    micro: samples of one segment each, no tile compressed.
    compressed: bool [sum of num_tiles].
    features_per_tile: P and Q.
    image_token_id: the id of image tokens.

  Returns:
    It, and which of the tokens stay, bool [sum of lengths].
  """
  usual, fewer = features_per_tile
  is_image = micro.input_ids == image_token_id
  tile, place = np.divmod(np.arange(is_image.sum()), usual)
  kept = np.ones(len(is_image), np.bool_)
  kept[is_image] = ~compressed[tile] | (place < fewer)
  owner = np.repeat(np.arange(len(micro.lengths)), micro.lengths)
  lengths = np.bincount(owner[kept], minlength=len(micro.lengths)).astype(np.int32)
  shorter = micro._replace(
    input_ids=micro.input_ids[kept],
    labels=micro.labels[kept],
    lengths=lengths,
    segments=lengths[:, None],
    compressed=compressed[None],
  )
  return shorter, kept


def offsets_in_rows(micro: MicroBatch) -> Int[np.ndarray, " tokens"]:
  """Computes int32 [sum of lengths]: where in its row each token is."""
  rows = np.repeat(micro.rows, micro.lengths)
  return (np.arange(len(rows)) - np.searchsorted(rows, rows)).astype(np.int32)


def owners_of_tiles(micro_batches: Sequence[MicroBatch], shape: Sequence[int]) -> dict[str, np.ndarray]:
  """The fields of `FlashBatch` that say what the tiles of pools [A, D, T] belong to, by name.

  Args:
    micro_batches: A of them, with compressed tiles.
    shape: A, D, T.
  """
  found = {name: np.zeros(shape, np.int32) for name in ("tile_row", "tile_segment")}
  weight = np.zeros(shape, np.float32)
  for a, micro in enumerate(micro_batches):
    assert micro.compressed is not None
    each = micro.num_rows // shape[1]
    owner = np.repeat(np.arange(len(micro.num_tiles)), micro.num_tiles)
    shard = micro.rows[owner] // each
    places = a, shard, np.arange(len(owner)) - np.searchsorted(shard, shard)
    taught = ~micro.happened("fully_masked")[owner]
    weight[places] = micro.compressed[0] & taught
    found["tile_row"][places] = micro.rows[owner] % each
    found["tile_segment"][places] = batching.segment_numbers(micro)[owner, 0]
  return {"tile_weight": weight, **found}
