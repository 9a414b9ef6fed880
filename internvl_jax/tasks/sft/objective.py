"""Supervised fine-tuning's objective: next-token cross-entropy.

Letters: A micro-batches, R rows, S tokens.
"""

import dataclasses
from collections.abc import Mapping

import jax
from jaxtyping import Array, Float, Key

from internvl_jax.batch import TokenBatch
from internvl_jax.losses import lm
from internvl_jax.models.internvl import InternVL
from internvl_jax.objectives import ForwardPass, Outcome, Running


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedFineTuning(ForwardPass):
  """Next-token cross-entropy on the answers."""

  def weights(self, batch: TokenBatch) -> Float[Array, "A R S"]:
    """Normalized weights [A, R, S] of an optimizer batch's tokens."""
    return self.normalized(batch.loss_weight)

  def loss(
    self,
    params: Mapping[str, jax.Array],
    batch: TokenBatch,
    weights: Float[Array, "R S"],
    key: Key[Array, ""],
    running: Running,
    *,
    share: float = 1.0,
  ) -> tuple[Float[Array, ""], Outcome]:
    """The weighted sum of a micro-batch's token losses.

    Args:
      params: all parameters by path.
      batch: one micro-batch: fields of TokenBatch without their leading A.
      weights: float32 [R, S], of `weights`.
      key: randomness of this micro-batch.
      running: see `Outcome`.
      share: weight of this micro-batch in what is not a sum over tokens.
    """
    model = self.model.bind(params)
    vision_key, text_key = jax.random.split(key)
    features = self.features(model, batch.tiles, vision_key)
    hidden, router_loss = self.hidden(model, batch, features, text_key)
    loss = self._language_loss(model, hidden, batch, weights) + share * router_loss
    return loss, Outcome(running, {})

  def _language_loss(
    self, model: InternVL, hidden: jax.Array, batch: TokenBatch, weights: jax.Array
  ) -> jax.Array:
    if not self.fused_loss:
      return lm.cross_entropy(model.logits(hidden), batch.targets, weights)
    with jax.named_scope("lm_head"):
      kernel = model.language_model.output_embedding
      return lm.chunked_linear_cross_entropy(hidden, kernel, batch.targets, weights)
