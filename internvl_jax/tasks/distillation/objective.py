"""Distillation's objective: cross-entropy of the labels, and divergence from a teacher that was asked before.

Letters: A micro-batches, R rows, S tokens.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from internvl_jax.losses import distillation
from internvl_jax.losses.distillation import Divergence, Losses, TopK
from internvl_jax.models.internvl import InternVL
from internvl_jax.objectives import ForwardPass, Outcome, Running
from internvl_jax.tasks.distillation.batch import DistillationBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(ForwardPass):
  """(1 - weight) * cross-entropy + weight * T^2 * KL, of each target (arXiv:1503.02531, section 2).

  Attributes:
    divergence: the kind of KL, and T.
    weight: of the divergence.
  """

  divergence: Divergence
  weight: float

  def weights(self, batch: DistillationBatch) -> Float[Array, "A R S"]:
    """Normalized weights [A, R, S] of an optimizer batch's tokens."""
    return self.normalized(batch.rows.loss_weight)

  def loss(
    self,
    params: Mapping[str, jax.Array],
    batch: DistillationBatch,
    weights: Float[Array, "R S"],
    key: Key[Array, ""],
    running: Running,
    *,
    share: float = 1.0,
  ) -> tuple[Float[Array, ""], Outcome]:
    """The weighted sum of a micro-batch's token losses; see `SupervisedFineTuning.loss`."""
    model, rows = self.model.bind(params), batch.rows
    vision_key, text_key = jax.random.split(key)
    features = self.features(model, rows.tiles, vision_key)
    hidden, router_loss = self.hidden(model, rows, features, text_key)
    found = self._token_losses(model, hidden, batch)
    label, teacher = (jnp.sum(losses * weights) for losses in found)
    terms = {"losses/cross_entropy": label, "losses/teacher": teacher}
    total = (1 - self.weight) * label + self.weight * teacher + share * router_loss
    return total, Outcome(running, jax.lax.stop_gradient(terms))

  def _token_losses(self, model: InternVL, hidden: jax.Array, batch: DistillationBatch) -> Losses:
    teacher, targets = TopK(batch.ids, batch.logps, batch.tail), batch.rows.targets
    if not self.fused_loss:
      return distillation.token_losses(model.logits(hidden), targets, teacher, self.divergence)
    with jax.named_scope("lm_head"):
      kernel = model.language_model.output_embedding
      return distillation.linear_token_losses(hidden, kernel, targets, teacher, self.divergence)
