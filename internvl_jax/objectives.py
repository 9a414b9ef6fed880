"""What a step minimises: a batch and a model in, a sum that is already normalised out.

Letters: A micro-batches, R rows, S tokens, D data shards.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.batch import SFTBatch
from internvl_jax.losses import lm
from internvl_jax.models.internvl import Execution, InternVL, normalize_tiles
from internvl_jax.models.moe import load_balancing_loss
from internvl_jax.parallel.rules import constrain, even_shares


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedFineTuning:
  """Next-token cross-entropy on the answers.

  Attributes:
    how: how the forward pass is computed.
    normalize_type: statistics of the pixels.
    fused_loss: use the chunked linear cross-entropy (use_liger).
    drop_path_rates: stochastic depth of the ViT's layers, 0 where they are frozen; empty where all are 0.
    dropout: adapters drop some of their inputs.
    shards: data shards D, whose rows balance their routers' load apart.
    router_loss_coef: weight of the routers' load-balancing loss; 0 is off.
  """

  how: Execution
  normalize_type: str
  fused_loss: bool
  drop_path_rates: tuple[float, ...] = ()
  dropout: bool = False
  shards: int = 1
  router_loss_coef: float = 0.0

  def loss(
    self, model: InternVL, batch: SFTBatch, weights: jax.Array, key: jax.Array, *, share: float = 1.0
  ) -> jax.Array:
    """The weighted sum of a micro-batch's token losses.

    Args:
      model: the model.
      batch: one micro-batch: fields of SFTBatch without their leading A.
      weights: float32 [R, S] from `normalized_weights`.
      key: randomness of this micro-batch.
      share: weight of this micro-batch in what is not a sum over tokens.
    """
    vision_key, text_key = jax.random.split(key)
    features = self._features(model, batch.tiles, vision_key)
    x = model.embed(batch.input_ids, batch.image_index, features, self.how)
    hidden, router = model.decode(
      x,
      self.how,
      positions=batch.positions,
      segment_ids=batch.segment_ids,
      dropout_key=text_key if self.dropout else None,
    )
    return self._language_loss(model, hidden, batch, weights) + share * self._router_loss(router, batch)

  def _language_loss(self, model: InternVL, hidden, batch: SFTBatch, weights: jax.Array) -> jax.Array:
    if not self.fused_loss:
      return lm.cross_entropy(model.logits(hidden), batch.targets, weights)
    with jax.named_scope("lm_head"):
      kernel = model.language_model.output_embedding
      return lm.chunked_linear_cross_entropy(hidden, kernel, batch.targets, weights)

  def _router_loss(self, router: dict[str, jax.Array], batch: SFTBatch) -> jax.Array | float:
    """The load-balancing loss of a decoder with experts; 0 without."""
    if not router or not self.router_loss_coef:
      return 0.0
    tokens = jnp.sum(batch.segment_ids > 0, axis=1)
    load, prob = router["router_load"], router["router_prob"]
    return self.router_loss_coef * load_balancing_loss(load, prob, tokens, shards=self.shards)

  def _features(self, model: InternVL, tiles: jax.Array, key: jax.Array) -> jax.Array:
    """Features [D, T*P, E] of a pool of tiles [D, T, H, W, 3]; an empty pool runs no ViT."""
    D, T = tiles.shape[:2]
    if T == 0:
      return jnp.zeros((D, 0, 0), self.how.dtype)
    path_key, dropout_key = jax.random.split(key)
    drop_path = (np.array(self.drop_path_rates), path_key) if any(self.drop_path_rates) else None
    # Empty tiles at the end of each pool, where its devices would not run as many each.
    tiles = jnp.pad(tiles, ((0, 0), (0, even_shares(T) - T), *[(0, 0)] * 3))
    tiles = constrain(tiles.reshape(-1, *tiles.shape[2:]), "tiles", None, None, None)
    pixels = normalize_tiles(tiles, self.normalize_type)
    features = model.extract_features(
      pixels, self.how, drop_path=drop_path, dropout_key=dropout_key if self.dropout else None
    )
    return constrain(features.reshape(D, -1, features.shape[-1]), "rows", "tokens", None)


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
