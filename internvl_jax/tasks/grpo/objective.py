"""Reinforcement's objective: clipped ratios of answers that were sampled, weighted by their advantages.

Letters: A micro-batches, R rows, S tokens, G answers of a prompt.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from internvl_jax.batch import TokenBatch
from internvl_jax.losses import lm, policy, vocab_parallel
from internvl_jax.losses.policy import PolicySettings, TokenLogProbs, TokenWeights
from internvl_jax.models.attention import SharedPrompts
from internvl_jax.models.internvl import InternVL
from internvl_jax.objectives import ForwardPass, Outcome, Running
from internvl_jax.parallel.rules import constrain
from internvl_jax.tasks.grpo.batch import GrpoBatch
from internvl_jax.tasks.preference.policy import ReferencePolicy


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupRelativePolicy(ForwardPass):
  """GRPO (arXiv:2402.03300) and GSPO (arXiv:2507.18071). Nothing is dropped: ratios would be of two different models.

  Attributes:
    settings: of the loss.
    generations: G.
    longest: the most tokens of an answer.
    temperature: that answers are sampled at.
    reuses: rows are learned from more than once, and `GrpoBatch.old` is what ratios are over; else all ratios are 1.
    reference: the policy as it was at the start; None where `settings.beta` is 0.
  """

  settings: PolicySettings
  generations: int
  longest: int
  temperature: float = 1.0
  reuses: bool = False
  reference: ReferencePolicy | None = None

  def weights(self, batch: GrpoBatch) -> TokenWeights:
    """Normalized weights [A, R, S] of an optimizer batch's tokens."""
    return policy.token_weights(
      self.settings.loss_type,
      batch.owner,
      batch.present,
      batch.kept,
      longest=self.longest,
      shards=self.shards,
    )

  def loss(
    self,
    params: Mapping[str, jax.Array],
    batch: GrpoBatch,
    weights: TokenWeights,
    key: Key[Array, ""],
    running: Running,
    *,
    share: float = 1.0,
  ) -> tuple[Float[Array, ""], Outcome]:
    """The weighted sum of a micro-batch's losses; see `SupervisedFineTuning.loss`."""
    del key
    model = self.model.bind(params)
    features = self.features(model, batch.rows.tiles, None)
    logps, router_loss = self._logps(model, batch, features)
    found = policy.policy_losses(
      TokenLogProbs(
        policy=logps,
        old=_whole_rows(batch.old) if self.reuses else None,
        reference=self._reference_logps(params, batch, features),
      ),
      batch.advantages,
      _whole_rows(batch.owner),
      self.settings,
    )
    terms = {
      "entropy": -logps,
      "clip_ratio/low_mean": found.clipped_low,
      "clip_ratio/high_mean": found.clipped_high,
      "rollout/logp_difference": jnp.abs((batch.old if self.reuses else logps) - batch.sampled),
    }
    if self.reuses:
      terms["policy_ratio_deviation"] = jnp.abs(jnp.exp(logps - batch.old) - 1)
    if found.kl is not None:
      terms["kl"] = found.kl
    means = {name: _weighted(values, weights.tokens) for name, values in terms.items()}
    loss = _weighted(found.loss, weights.loss) + share * router_loss
    return loss, Outcome(running, jax.lax.stop_gradient(means))

  def forward(
    self, params: Mapping[str, jax.Array], batch: GrpoBatch
  ) -> tuple[Float[Array, "R S E"], Float[Array, "R S"]]:
    """A micro-batch by the forward pass of `loss`.

    Returns:
      the hidden states [R, S, E] whose logits are at the temperature, and the log-probabilities [R, S] of tokens to predict.
    """
    model = self.model.bind(params)
    hidden, _ = self._hidden(model, batch, self.features(model, batch.rows.tiles, None))
    return hidden, self._token_logps(model, hidden, batch.rows)

  def _reference_logps(
    self, params: Mapping[str, jax.Array], batch: GrpoBatch, features: jax.Array
  ) -> jax.Array | None:
    if self.reference is None:
      return None
    model = self.reference.bind(params)
    if not self.reference.shares_features:
      features = self.features(model, batch.rows.tiles, None)
    return jax.lax.stop_gradient(self._logps(model, batch, features)[0])

  def _logps(
    self, model: InternVL, batch: GrpoBatch, features: jax.Array
  ) -> tuple[jax.Array, jax.Array | float]:
    hidden, router_loss = self._hidden(model, batch, features)
    return self._token_logps(model, hidden, batch.rows), router_loss

  def _hidden(
    self, model: InternVL, batch: GrpoBatch, features: jax.Array
  ) -> tuple[jax.Array, jax.Array | float]:
    shared = SharedPrompts(batch.parent, answers=self.generations)
    hidden, router_loss = self.hidden(model, batch.rows, features, None, shared)
    # Logits are linear in them.
    return hidden if self.temperature == 1 else hidden / self.temperature, router_loss

  def _token_logps(self, model: InternVL, hidden: jax.Array, rows: TokenBatch) -> jax.Array:
    """Log p [R, S] of the tokens to predict, 0 where there is none."""
    if not self.fused_loss:
      return _whole_rows(-lm.token_losses(model.logits(hidden), rows.targets))
    with jax.named_scope("lm_head"):
      head = model.language_model.output_embedding
      return _whole_rows(-vocab_parallel.linear_token_losses(hidden, head, rows.targets))


def _whole_rows(values: jax.Array) -> jax.Array:
  """Gathers the tokens of each row [R, S], whose answers are summed over."""
  return constrain(values, "rows", None)


def _weighted(values: jax.Array, weights: jax.Array) -> jax.Array:
  return jnp.sum(jnp.where(weights > 0, values, 0.0) * weights)
