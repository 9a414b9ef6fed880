"""What a step minimises: a batch and a model in, a sum that is already normalised out.

Letters: A micro-batches, R rows, S tokens, D data shards.
"""

import dataclasses

import jax
import jax.numpy as jnp

from internvl_jax.batch import SFTBatch
from internvl_jax.losses import lm
from internvl_jax.models.internvl import Execution, InternVL, normalize_tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedFineTuning:
  """Next-token cross-entropy on the answers.

  Attributes:
    how: how the forward pass is computed.
    normalize_type: statistics of the pixels.
    fused_loss: use the chunked linear cross-entropy (use_liger).
    drop_path_rate: stochastic depth of the ViT; 0 where the ViT is frozen.
  """

  how: Execution
  normalize_type: str
  fused_loss: bool
  drop_path_rate: float

  def loss(self, model: InternVL, batch: SFTBatch, weights: jax.Array, key: jax.Array) -> jax.Array:
    """The weighted sum of a micro-batch's token losses.

    Args:
      model: the model.
      batch: one micro-batch: fields of SFTBatch without their leading A.
      weights: float32 [R, S] from `normalized_weights`.
      key: randomness of this micro-batch.
    """
    features = self._features(model, batch.tiles, key)
    x = model.embed(batch.input_ids, batch.image_index, features, self.how)
    hidden = model.decode(x, self.how, positions=batch.positions, segment_ids=batch.segment_ids)
    if not self.fused_loss:
      return lm.cross_entropy(model.logits(hidden), batch.targets, weights)
    kernel = model.language_model.lm_head.kernel[...]
    flat = hidden.reshape(-1, hidden.shape[-1])
    return lm.chunked_linear_cross_entropy(flat, kernel, batch.targets.reshape(-1), weights.reshape(-1))

  def _features(self, model: InternVL, tiles: jax.Array, key: jax.Array) -> jax.Array:
    """Features [D, T*P, E] of a pool of tiles [D, T, H, W, 3]; an empty pool runs no ViT."""
    D, T = tiles.shape[:2]
    if T == 0:
      return jnp.zeros((D, 0, 0), self.how.dtype)
    drop_path = (self.drop_path_rate, key) if self.drop_path_rate > 0 else None
    pixels = normalize_tiles(tiles.reshape(D * T, *tiles.shape[2:]), self.normalize_type)
    features = model.extract_features(pixels, self.how, drop_path=drop_path)
    return features.reshape(D, -1, features.shape[-1])


def normalized_weights(loss_weight: jax.Array, *, shards: int, all_gather: bool) -> jax.Array:
  """Divides token weights so that the optimizer batch's loss is their plain weighted sum.

  Args:
    loss_weight: float32 [A, R, S].
    shards: data shards D that the rows are dealt to.
    all_gather: one denominator for the whole optimizer batch (exact under any split). Otherwise each shard's
      micro-batch has its own and the A*D means are averaged, as the reference's data parallel ranks do; one
      without any supervised token adds 0 to that average.
  """
  A, R, S = loss_weight.shape
  if all_gather:
    return loss_weight / jnp.maximum(jnp.sum(loss_weight), jnp.finfo(jnp.float32).tiny)
  parts = loss_weight.reshape(A, shards, R // shards, S)
  total = jnp.sum(parts, axis=(2, 3), keepdims=True)
  parts = jnp.where(total > 0, parts / jnp.where(total > 0, total, 1.0), 0.0) / (A * shards)
  return parts.reshape(A, R, S)
