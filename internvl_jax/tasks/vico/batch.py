"""The batch of ViCO's stages: numpy arrays, as `internvl_jax.batch` has them."""

from typing import Annotated, NamedTuple

from internvl_jax.batch import Array, Axes, TokenBatch


class FullRows(NamedTuple):
  """Rows in which no tile is compressed: fields of TokenBatch."""

  input_ids: Annotated[Array, Axes("int32", "A", "R", "S")]
  positions: Annotated[Array, Axes("int32", "A", "R", "S")]
  segment_ids: Annotated[Array, Axes("int32", "A", "R", "S")]
  image_index: Annotated[Array, Axes("int32", "A", "R", "S")]


class FlashBatch(NamedTuple):
  """One optimizer step's batch: every sample twice, with and without compressed tiles.

  Attributes:
    rows: the samples with some of their tiles compressed. A tile has P + Q features in its pool, the Q of which are its
      tokens where it is compressed.
    full: the same samples in the same rows, no tile compressed; a tile has P features.
    place: int32 [A, R, S], where each token of `rows` is in its row of `full`.
    tile_weight: float32 [A, D, T], 1 of a compressed tile whose sample supervises something, before normalization; else 0.
    tile_row: int32 [A, D, T], which of its shard's rows a tile is in.
    tile_segment: int32 [A, D, T], the segment of that row; 0 of an unused place.
  """

  rows: TokenBatch
  full: FullRows
  place: Annotated[Array, Axes("int32", "A", "R", "S")]
  tile_weight: Annotated[Array, Axes("float32", "A", "D", "T")]
  tile_row: Annotated[Array, Axes("int32", "A", "D", "T")]
  tile_segment: Annotated[Array, Axes("int32", "A", "D", "T")]
