"""Padded rows of token ids with their images, as what the language model reads.

Letters: B rows, S tokens of a padded row, T tiles, D width of the language model.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.batch import NO_IMAGE
from internvl_jax.models.internvl import Execution, normalize_tiles


def pool_tiles(tiles: Sequence[np.ndarray]) -> np.ndarray:
  """Concatenates tiles [t, H, W, 3] of rows to uint8 [T, H, W, 3], padded to a power of two: few programs are compiled."""
  pool = np.concatenate(tiles)
  room = 1 << (len(pool) - 1).bit_length() if len(pool) else 0
  padded = np.zeros((room, *pool.shape[1:]), np.uint8)
  padded[: len(pool)] = pool
  return padded


def embed_rows(
  model: Any,
  how: Execution,
  input_ids: jax.Array,
  segment_ids: jax.Array,
  tiles: jax.Array,
  *,
  image_token_id: int,
  normalize_type: str,
) -> jax.Array:
  """Embeds token ids, and puts the tiles' features in the places of image tokens, in order.

  Args:
    model: the bound model.
    how: how the forward pass is computed.
    input_ids: int [B, S], padded.
    segment_ids: int [B, S], 0 where a row is padding.
    tiles: uint8 [T, H, W, 3], those of all rows in order; see `pool_tiles`.
    image_token_id: id of <IMG_CONTEXT>.
    normalize_type: statistics of the pixels.

  Returns:
    [B, S, D] in the dtype of `how`.
  """
  features = jnp.zeros((1, 0, 0), how.dtype)
  if tiles.shape[0]:
    encoded = model.extract_features(normalize_tiles(tiles, normalize_type), how)
    features = encoded.reshape(1, -1, encoded.shape[-1])
  is_image = (input_ids == image_token_id) & (segment_ids > 0)
  order = jnp.cumsum(is_image.reshape(-1)).reshape(input_ids.shape) - 1
  return model.embed(input_ids, jnp.where(is_image, order, NO_IMAGE), features, how)
