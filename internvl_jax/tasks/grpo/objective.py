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
    exact: the gradient computes the forward pass once more for itself. What it has to keep would have XLA round the one that
      counts otherwise than in a program without a gradient.
    reference: the policy as it was at the start; None where `settings.beta` is 0.
  """

  settings: PolicySettings
  generations: int
  longest: int
  temperature: float = 1.0
  reuses: bool = False
  exact: bool = False
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
    if self.exact:
      features, (logps, router_loss) = None, jax.checkpoint(self.logps)(dict(params), batch)
    else:
      features = self.features(self.model.bind(params), batch.rows.tiles, None)
      logps, router_loss = self.logps(params, batch, features)
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
    }
    if not (
      self.exact and self.reuses
    ):  # There, `old` is what was sampled, and the ratio compares this step with it.
      terms["rollout/logp_difference"] = jnp.abs((batch.old if self.reuses else logps) - batch.sampled)
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
    hidden, _ = self._hidden(model, batch, None)
    return hidden, self._token_logps(model, hidden, batch.rows)

  def logps(
    self, params: Mapping[str, jax.Array], batch: GrpoBatch, features: Float[Array, "D Q E"] | None = None
  ) -> tuple[Float[Array, "R S"], Float[Array, ""] | float]:
    """The log-probabilities [R, S] of `forward`, and the routers' loss; `features` of the tiles, if they are there already."""
    model = self.model.bind(params)
    hidden, router_loss = self._hidden(model, batch, features)
    return self._token_logps(model, hidden, batch.rows), router_loss

  def _reference_logps(
    self, params: Mapping[str, jax.Array], batch: GrpoBatch, features: jax.Array | None
  ) -> jax.Array | None:
    if self.reference is None:
      return None
    model = self.reference.bind(params)
    hidden, _ = self._hidden(model, batch, features if self.reference.shares_features else None)
    return jax.lax.stop_gradient(self._token_logps(model, hidden, batch.rows))

  def _hidden(
    self, model: InternVL, batch: GrpoBatch, features: jax.Array | None
  ) -> tuple[jax.Array, jax.Array | float]:
    if features is None:
      features = self.features(model, batch.rows.tiles, None)
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
