"""Preference optimization's objective: losses of pairs of answers against a reference policy.

Letters: A micro-batches, R rows, S tokens, K pairs of a row.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from internvl_jax.batch import IGNORE_INDEX, TokenBatch
from internvl_jax.losses import lm, preference, vocab_parallel
from internvl_jax.losses.preference import LossSettings, PairLogProbs
from internvl_jax.models.attention import SharedPrompts
from internvl_jax.models.internvl import InternVL
from internvl_jax.objectives import ForwardPass, Outcome, Running
from internvl_jax.parallel.rules import constrain
from internvl_jax.tasks.preference.batch import PreferenceBatch
from internvl_jax.tasks.preference.policy import ReferencePolicy


class PreferenceWeights(NamedTuple):
  """Normalized weights of an optimizer batch.

  Attributes:
    pairs: float32 [A, R, K].
    tokens: float32 [A, R, S], of the chosen answers' tokens.
  """

  pairs: Float[Array, "A R K"]
  tokens: Float[Array, "A R S"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceOptimization(ForwardPass):
  """A weighted sum of preference losses, and the chosen answers' cross-entropy: MPO (arXiv:2411.10442).

  Attributes:
    terms: names of losses (`preference.LOSSES`) and their weights.
    settings: what the losses have in common.
    rpo_alpha: weight of the cross-entropy; None leaves it out.
    reference: the reference policy; None: its log-probabilities come with the batch.
    shares_prompts: the answers of a pair may share their prompt's tokens.
  """

  terms: tuple[tuple[str, float], ...]
  settings: LossSettings
  rpo_alpha: float | None = None
  reference: ReferencePolicy | None = None
  shares_prompts: bool = False

  def initial_running(self) -> Running:
    """BCO's running mean before the first batch."""
    return preference.initial_running()

  def weights(self, batch: PreferenceBatch) -> PreferenceWeights:
    """Normalized weights of an optimizer batch's pairs, and of the tokens of its chosen answers."""
    chosen = jnp.where(_in_chosen(batch), batch.rows.loss_weight, 0.0)
    return PreferenceWeights(self.normalized(batch.pair_weight), self.normalized(chosen))

  def loss(
    self,
    params: Mapping[str, jax.Array],
    batch: PreferenceBatch,
    weights: PreferenceWeights,
    key: Key[Array, ""],
    running: Running,
    *,
    share: float = 1.0,
  ) -> tuple[Float[Array, ""], Outcome]:
    """The weighted sum of a micro-batch's losses; see `SupervisedFineTuning.loss`."""
    policy, rows = self.model.bind(params), batch.rows
    vision_key, text_key = jax.random.split(key)
    features = self.features(policy, rows.tiles, vision_key)
    hidden, router_loss = self.hidden(policy, rows, features, text_key, self._shared(batch))
    token_losses = self._token_losses(policy, hidden, rows)
    reference = self._reference_logps(params, batch, features)
    logps = _pair_logps(_sums(token_losses, batch), reference)
    flat = weights.pairs.reshape(-1)
    running = preference.update_running(running, logps, flat, self.settings.beta)
    total, terms = self._weighted_losses(logps, _lengths(batch), flat, running)
    terms |= self._rewards(logps, flat)
    if self.rpo_alpha is not None:
      terms["nll_loss"] = jnp.sum(token_losses * weights.tokens)
      total += self.rpo_alpha * terms["nll_loss"]
    return total + share * router_loss, Outcome(running, jax.lax.stop_gradient(terms))

  def drift(
    self, params: Mapping[str, jax.Array], batch: PreferenceBatch
  ) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How far the policy is from the reference on a micro-batch, nothing being dropped.

    Returns:
      DPO's loss, and the largest |log-ratio| of an answer relative to 1 + |its log-probability|.
    """
    reference = self._reference_logps(params, batch, None)
    logps = _pair_logps(self.answer_logps(params, batch), reference)
    real = batch.pair_weight.reshape(-1) > 0
    losses = preference.pair_losses(
      "sigmoid", logps, real, LossSettings(self.settings.beta, 0.0), preference.initial_running()
    )
    ratios = jnp.stack([logps.chosen_ratio, logps.rejected_ratio])
    relative = jnp.abs(ratios) / (1 + jnp.abs(jnp.stack([logps.chosen, logps.rejected])))
    mean = jnp.sum(jnp.where(real, losses, 0.0)) / jnp.maximum(jnp.sum(real), 1)
    return mean, jnp.max(jnp.where(real, relative, 0.0))

  def answer_logps(self, params: Mapping[str, jax.Array], batch: PreferenceBatch) -> Float[Array, "R K 2"]:
    """The policy's log-probabilities [R, K, 2] of a micro-batch's answers, nothing being dropped."""
    return self._answer_logps(self.model.bind(params), batch, None)

  def _reference_logps(
    self, params: Mapping[str, jax.Array], batch: PreferenceBatch, features: jax.Array | None
  ) -> jax.Array:
    """The reference's log-probabilities [R, K, 2]; `features` are the policy's, where it has them already."""
    if self.reference is None:
      # What is not known of padding must not get into gradients; of a real pair, it makes the step non-finite.
      return jnp.where(batch.pair_weight[..., None] > 0, batch.reference, 0.0)
    shared = features if self.reference.shares_features else None
    return jax.lax.stop_gradient(self._answer_logps(self.reference.bind(params), batch, shared))

  def _answer_logps(self, model: InternVL, batch: PreferenceBatch, features: jax.Array | None) -> jax.Array:
    rows = batch.rows
    if features is None:
      features = self.features(model, rows.tiles, None)
    hidden, _ = self.hidden(model, rows, features, None, self._shared(batch))
    return _sums(self._token_losses(model, hidden, rows), batch)

  def _shared(self, batch: PreferenceBatch) -> SharedPrompts | None:
    return SharedPrompts(batch.parent, answers=2) if self.shares_prompts else None

  def _token_losses(self, model: InternVL, hidden: jax.Array, rows: TokenBatch) -> jax.Array:
    """-log p [R, S] of the tokens to predict, 0 where there is none."""
    if not self.fused_loss:
      return lm.token_losses(model.logits(hidden), rows.targets)
    with jax.named_scope("lm_head"):
      return vocab_parallel.linear_token_losses(hidden, model.language_model.output_embedding, rows.targets)

  def _weighted_losses(self, logps: PairLogProbs, lengths: jax.Array, weights: jax.Array, running: Running):
    """The weighted sum of all kinds, and the sum of each."""
    means = logps.per_token(lengths[:, 0], lengths[:, 1])
    total, terms = jnp.float32(0), {}
    for kind, factor in self.terms:
      values = means if preference.LOSSES[kind].per_token else logps
      losses = preference.pair_losses(kind, values, weights, self.settings, running)
      terms[f"losses/{kind}"] = jnp.sum(jnp.where(weights > 0, losses, 0.0) * weights)
      total += factor * terms[f"losses/{kind}"]
    return total, terms

  def _rewards(self, logps: PairLogProbs, weights: jax.Array) -> dict[str, jax.Array]:
    """TRL's metrics of a batch, under its names."""
    beta = self.settings.beta
    chosen, rejected = beta * logps.chosen_ratio, beta * logps.rejected_ratio
    values = {
      "rewards/chosen": chosen,
      "rewards/rejected": rejected,
      "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
      "rewards/margins": chosen - rejected,
      "logps/chosen": logps.chosen,
      "logps/rejected": logps.rejected,
    }
    return {name: jnp.sum(jnp.where(weights > 0, value, 0.0) * weights) for name, value in values.items()}


def _in_chosen(batch: PreferenceBatch) -> jax.Array:
  """Bool [A, R, S]: the tokens of chosen answers."""

  def of_row(answers: jax.Array, segments: jax.Array) -> jax.Array:
    chosen = jnp.zeros(1 + answers.size, bool).at[answers[:, 0]].set(True)
    return chosen.at[0].set(False)[segments]

  return jax.vmap(jax.vmap(of_row))(batch.answers, batch.rows.segment_ids)


def _sums(token_losses: jax.Array, batch: PreferenceBatch) -> jax.Array:
  """Log-probabilities [R, K, 2] of the chosen and rejected answers, from token losses [R, S]."""
  return -_by_answer(token_losses, batch)


def _lengths(batch: PreferenceBatch) -> jax.Array:
  """Supervised tokens of each answer, [R*K, 2]."""
  return _by_answer((batch.rows.targets != IGNORE_INDEX).astype(jnp.float32), batch).reshape(-1, 2)


def _by_answer(values: jax.Array, batch: PreferenceBatch) -> jax.Array:
  """Sums [R, K, 2] of values [R, S] over the segments that a micro-batch's answers are; 0 where there is no pair."""
  values, segments = (constrain(x, "rows", None) for x in (values, batch.rows.segment_ids))
  most = 1 + batch.answers[0].size
  add = lambda value, segment: jnp.zeros(most).at[segment].add(value)  # noqa: E731
  sums = jax.vmap(add)(values, segments)
  found = jax.vmap(lambda row, answers: row[answers])(sums, batch.answers)
  return jnp.where(batch.answers > 0, found, 0.0)


def _pair_logps(policy: jax.Array, reference: jax.Array) -> PairLogProbs:
  """Pairs end to end, from [R, K, 2] each."""
  policy, reference = policy.reshape(-1, 2), reference.reshape(-1, 2)
  return PairLogProbs(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1])
