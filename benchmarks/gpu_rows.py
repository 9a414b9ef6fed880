"""Rows as packing makes them, from numbers alone: several segments, image tokens that fit the tiles, a little padding."""

from collections.abc import Sequence

import numpy as np

from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE, TokenBatch
from internvl_jax.data.schedule.shapes import tile_bucket

SHARES = (0.26, 0.20, 0.16, 0.13, 0.11, 0.08, 0.05)
"""Of a row's tokens, those of each segment; the rest, one in a hundred, is padding."""

IMAGES = 0.82
"""The most of a segment's tokens that stand for tiles."""


def segment_lengths(tokens: int, shares: Sequence[float] = SHARES) -> list[int]:
  """Lengths of the segments of a row of so many tokens."""
  return [max(2, int(share * tokens)) for share in shares]


def segment_ids(tokens: int, shares: Sequence[float] = SHARES) -> np.ndarray:
  """The segments of a row, int32 [tokens]: from 1, 0 at padding."""
  lengths = segment_lengths(tokens, shares)
  ids = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
  return np.pad(ids, (0, tokens - len(ids)))


def causal_pairs(tokens: int, window: int | None = None) -> int:
  """Pairs of a token and one that it sees in such a row, within its segment and a window."""
  counts = [np.arange(1, length + 1) for length in segment_lengths(tokens)]
  return int(sum((count if window is None else np.minimum(count, window)).sum() for count in counts))


def tiles_of(length: int, per_tile: int, images: float = IMAGES) -> int:
  """Tiles of a segment of that length, of whose tokens at most a share stands for them."""
  return int(images * length) // per_tile


def packed_batch(
  tokens: int,
  *,
  per_tile: int,
  side: int,
  image_token: int,
  pool: int | None = None,
  shares: Sequence[float] = SHARES,
) -> TokenBatch:
  """One packed row and its pool of tiles, as an optimizer step takes them.

  Of each segment the first token is text, then its tiles' tokens follow, then text, of which the second half is
  supervised.

  Args:
    tokens: of the row.
    per_tile: tokens that stand for a tile.
    side: of a tile, in pixels.
    image_token: the id at image tokens; text tokens are drawn from the ids below it.
    pool: tiles of the pool, which are never fewer than the row shows; None takes the size that the loader pads them to.
    shares: of the row's tokens, those of each segment.
  """
  rng = np.random.default_rng(0)
  ids = segment_ids(tokens, shares)
  shown = IMAGES if pool is None else min(IMAGES, pool * per_tile / tokens)
  row = {
    "input_ids": np.where(ids > 0, rng.integers(3, image_token, tokens, dtype=np.int32), 0).astype(np.int32),
    "targets": np.full(tokens, IGNORE_INDEX, np.int32),
    "positions": np.zeros(tokens, np.int32),
    "segment_ids": ids,
    "image_index": np.full(tokens, NO_IMAGE, np.int32),
  }
  start = features = 0
  for length in segment_lengths(tokens, shares):
    images = per_tile * tiles_of(length, per_tile, shown)
    row["positions"][start : start + length] = np.arange(length)
    row["input_ids"][start + 1 : start + 1 + images] = image_token
    row["image_index"][start + 1 : start + 1 + images] = features + np.arange(images)
    answer = start + 1 + images + (length - 1 - images) // 2
    row["targets"][answer - 1 : start + length - 1] = row["input_ids"][answer : start + length]
    start, features = start + length, features + images
  needed = features // per_tile
  tiles = rng.integers(
    0, 256, (1, 1, tile_bucket(needed) if pool is None else pool, side, side, 3), dtype=np.uint8
  )
  whole = {name: value[None, None] for name, value in row.items()}
  weight = (whole["targets"] != IGNORE_INDEX).astype(np.float32)
  return TokenBatch(**whole, loss_weight=weight, tiles=tiles)
