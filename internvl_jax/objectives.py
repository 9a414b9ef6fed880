"""What a step minimizes: a batch and a model in, a sum that is already normalized out.

What all ways to learn have in common; `tasks/` has the objectives. Letters: A micro-batches, R rows, S tokens, D data
shards.
"""

import dataclasses
from typing import NamedTuple, Self, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from internvl_jax.batch import TokenBatch
from internvl_jax.models.attention import SharedPrompts
from internvl_jax.models.functional import ModelDef
from internvl_jax.models.internvl import Execution, InternVL, normalize_tiles
from internvl_jax.models.kernels import Kernels
from internvl_jax.models.moe import load_balancing_loss
from internvl_jax.parallel.rules import constrain, even_shares

Running: TypeAlias = dict[str, jax.Array]
"""Statistics that go on from batch to batch: float32 arrays by name, or none."""


class Outcome(NamedTuple):
  """What comes of a micro-batch beside its loss.

  Attributes:
    running: statistics that go on from batch to batch.
    terms: scalars for the log by name, already weighted: an optimizer step's are sums over its micro-batches.
  """

  running: Running
  terms: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardPass:
  """How a batch goes through the model, and how the losses of its rows are normalized.

  Attributes:
    model: the definition that parameters are bound to.
    how: how the forward pass is computed.
    normalize_type: statistics of the pixels.
    drop_path_rates: stochastic depth of the ViT's layers, 0 where they are frozen; empty where all are 0.
    dropout: adapters drop some of their inputs.
    shards: data shards D, whose rows balance their routers' load apart.
    all_gather: see `normalized_weights`.
    router_loss_coef: weight of the routers' load-balancing loss; 0 is off.
    fused_loss: logits are made in chunks and never together; False is the plain way, to check it by.
    both_features: pools have the features of compressed tiles, too, which takes a Flash; see `InternVL.extract_features`.
  """

  model: ModelDef[InternVL]
  how: Execution
  normalize_type: str
  drop_path_rates: tuple[float, ...] = ()
  dropout: bool = False
  shards: int = 1
  all_gather: bool = False
  router_loss_coef: float = 0.0
  fused_loss: bool = True
  both_features: bool = False

  def initial_running(self) -> Running:
    """The statistics before the first batch: none, by default."""
    return {}

  def plain(self) -> Self:
    """The same by the plainest code on one shard: what the operations of a step are counted by."""
    how = dataclasses.replace(self.how, kernels=Kernels(attention="plain"), remat=None)
    return dataclasses.replace(self, how=how, fused_loss=False, shards=1)

  def normalized(self, weights: Float[Array, "A R K"]) -> Float[Array, "A R K"]:
    """Weights of an optimizer batch [A, R, S], normalized; see `normalized_weights`."""
    return normalized_weights(weights, shards=self.shards, all_gather=self.all_gather)

  def hidden(
    self,
    model: InternVL,
    rows: TokenBatch,
    features: Float[Array, "D Q E"],
    key: Key[Array, ""] | None,
    shared: SharedPrompts | None = None,
  ) -> tuple[Float[Array, "R S E"], Float[Array, ""] | float]:
    """Hidden states [R, S, E] of a micro-batch and its routers' loss; without a key nothing is dropped."""
    x = model.embed(rows.input_ids, rows.image_index, features, self.how)
    hidden, router = model.decode(
      x,
      self.how,
      positions=rows.positions,
      segment_ids=rows.segment_ids,
      shared=shared,
      dropout_key=key if self.dropout else None,
    )
    return hidden, self._router_loss(router, rows)

  def _router_loss(self, router: dict[str, jax.Array], rows: TokenBatch) -> jax.Array | float:
    """The load-balancing loss of a decoder with experts; 0 without."""
    if not router or not self.router_loss_coef:
      return 0.0
    tokens = jnp.sum(rows.segment_ids > 0, axis=1)
    load, prob = router["router_load"], router["router_prob"]
    return self.router_loss_coef * load_balancing_loss(load, prob, tokens, shards=self.shards)

  def features(
    self, model: InternVL, tiles: UInt8[Array, "D T H W 3"], key: Key[Array, ""] | None
  ) -> Float[Array, "D Q E"]:
    """Features [D, T*P, E] of a pool of tiles [D, T, H, W, 3]; an empty pool runs no ViT, no key drops nothing.

    With `both_features` they are [D, T*(P+Q), E].
    """
    D, T = tiles.shape[:2]
    if T == 0:
      return jnp.zeros((D, 0, 0), self.how.dtype)
    return self.projected(model, self.encoded(model, tiles, key), D, both=self.both_features)

  def encoded(
    self, model: InternVL, tiles: UInt8[Array, "D T H W 3"], key: Key[Array, ""] | None
  ) -> Float[Array, "I N C"]:
    """The ViT's hidden states [I, N, C] of a pool of tiles [D, T, H, W, 3], I / D of each shard, the last of which are empty."""
    T, drop_path, dropout_key = tiles.shape[1], None, None
    if key is not None:
      path_key, dropout_key = jax.random.split(key)
      drop_path = (np.array(self.drop_path_rates), path_key) if any(self.drop_path_rates) else None
    # Empty tiles at the end of each pool, where its devices would not run as many each.
    tiles = jnp.pad(tiles, ((0, 0), (0, even_shares(T) - T), *[(0, 0)] * 3))
    tiles = constrain(tiles.reshape(-1, *tiles.shape[2:]), "tiles", None, None, None)
    pixels = normalize_tiles(tiles, self.normalize_type)
    return model.encode(
      pixels, self.how, drop_path=drop_path, dropout_key=dropout_key if self.dropout else None
    )

  def projected(
    self, model: InternVL, hidden: Float[Array, "I N C"], shards: int, *, both: bool
  ) -> Float[Array, "D Q E"]:
    """Features [D, Q, E] of the ViT's hidden states [I, N, C] of D shards' pools; see `InternVL.projected`."""
    features = model.projected(hidden, self.how, both=both)
    return constrain(features.reshape(shards, -1, features.shape[-1]), "rows", "tokens", None)


def normalized_weights(
  loss_weight: Float[Array, "A R S"], *, shards: int, all_gather: bool
) -> Float[Array, "A R S"]:
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
