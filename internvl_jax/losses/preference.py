"""Preference losses: pure functions of log-probabilities, and the table of them under TRL's names.

A new loss is a function and a line of `LOSSES`: the configuration, its checks and the objective read all else
from there. `preference.loss_type` names it, `preference.loss_weights` weights it.

Letters: N pairs of a chosen and a rejected answer, of which some may be padding.
"""

import dataclasses
import math
from typing import NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Running: TypeAlias = dict[str, jax.Array]
"""What BCO carries from batch to batch: `reward_sum` and `batches`, float32 scalars."""


class PairLogProbs(NamedTuple):
  """Log-probabilities of answers, each summed over the answer's tokens; float32 [N].

  Attributes:
    chosen, rejected: by the policy.
    reference_chosen, reference_rejected: by the reference policy.
  """

  chosen: Float[Array, " N"]
  rejected: Float[Array, " N"]
  reference_chosen: Float[Array, " N"]
  reference_rejected: Float[Array, " N"]

  @property
  def chosen_ratio(self) -> Float[Array, " N"]:
    """How much likelier the policy finds the chosen answer than the reference does, in logarithms."""
    return self.chosen - self.reference_chosen

  @property
  def rejected_ratio(self) -> Float[Array, " N"]:
    """The same of the rejected answer."""
    return self.rejected - self.reference_rejected

  @property
  def margin(self) -> Float[Array, " N"]:
    """The logits of DPO: how much the policy prefers the chosen answer more than the reference does."""
    return self.chosen_ratio - self.rejected_ratio

  def per_token(
    self, chosen_tokens: Float[Array, " N"], rejected_tokens: Float[Array, " N"]
  ) -> "PairLogProbs":
    """Means over the answers' tokens, of which there are float32 [N]; an empty answer counts as one token."""
    chosen, rejected = jnp.maximum(chosen_tokens, 1.0), jnp.maximum(rejected_tokens, 1.0)
    return PairLogProbs(
      self.chosen / chosen,
      self.rejected / rejected,
      self.reference_chosen / chosen,
      self.reference_rejected / rejected,
    )


class LossSettings(NamedTuple):
  """What the losses have in common.

  Attributes:
    beta: how strongly the policy is held to the reference.
    label_smoothing: the share of pairs whose preference is taken to be the wrong way round.
  """

  beta: float
  label_smoothing: float


def pair_losses(
  kind: str, logps: PairLogProbs, weights: Float[Array, " N"], settings: LossSettings, running: Running
) -> Float[Array, " N"]:
  """The loss of every pair [N], before weighting; what it is at padding must not be used.

  Args:
    kind: a name in LOSSES.
    logps: log-probabilities; where the loss is `per_token`, those of `PairLogProbs.per_token`.
    weights: float32 [N], 0 at padding.
    settings: of all losses.
    running: BCO's, updated with this batch (`update_running`).
  """
  return LOSSES[kind].function(logps, weights, settings, running)


def initial_running() -> Running:
  """The state before the first batch."""
  return {"reward_sum": jnp.float32(0), "batches": jnp.float32(0)}


def update_running(
  running: Running, logps: PairLogProbs, weights: Float[Array, " N"], beta: float
) -> Running:
  """Adds a batch's mean reward to the running mean.

  Every batch counts alike, however many pairs it has (as in TRL, which tells its running mean only the mean of each
  batch). A batch without pairs does not count. It is a constant to the gradient.
  """
  total = jnp.sum(weights)
  rewards = beta * (logps.chosen_ratio + logps.rejected_ratio) / 2
  mean = jnp.sum(jnp.where(weights > 0, rewards, 0.0) * weights) / jnp.where(total > 0, total, 1.0)
  found = jax.lax.stop_gradient((total > 0).astype(jnp.float32))
  return {
    "reward_sum": running["reward_sum"] + jax.lax.stop_gradient(found * mean),
    "batches": running["batches"] + found,
  }


def _sigmoid(logps: PairLogProbs, weights: jax.Array, settings: LossSettings, running: Running) -> jax.Array:
  """DPO; with label smoothing cDPO."""
  del weights, running
  return _smoothed(settings.beta * logps.margin, settings.label_smoothing)


def _smoothed(logits: jax.Array, smoothing: float) -> jax.Array:
  return -(1 - smoothing) * jax.nn.log_sigmoid(logits) - smoothing * jax.nn.log_sigmoid(-logits)


def _robust(logps: PairLogProbs, weights: jax.Array, settings: LossSettings, running: Running) -> jax.Array:
  """An unbiased estimate of DPO's loss where labels are noisy (robust DPO)."""
  del weights, running
  logits, noise = settings.beta * logps.margin, settings.label_smoothing
  kept = -(1 - noise) * jax.nn.log_sigmoid(logits)
  return (kept + noise * jax.nn.log_sigmoid(-logits)) / (1 - 2 * noise)


def _exo_pair(logps: PairLogProbs, weights: jax.Array, settings: LossSettings, running: Running) -> jax.Array:
  """The reverse KL divergence of EXO (equation 16); without smoothing it takes 0.001."""
  del weights, running
  logits, noise = settings.beta * logps.margin, settings.label_smoothing or 1e-3
  forward = jax.nn.sigmoid(logits) * (jax.nn.log_sigmoid(logits) - math.log(1 - noise))
  return forward + jax.nn.sigmoid(-logits) * (jax.nn.log_sigmoid(-logits) - math.log(noise))


def _hinge(logps: PairLogProbs, weights: jax.Array, settings: LossSettings, running: Running) -> jax.Array:
  """SLiC's hinge on DPO's logits."""
  del weights, running
  return jax.nn.relu(1 - settings.beta * logps.margin)


def _ipo(logps: PairLogProbs, weights: jax.Array, settings: LossSettings, running: Running) -> jax.Array:
  """IPO (equation 17)."""
  del weights, running
  return (logps.margin - 1 / (2 * settings.beta)) ** 2


def _bco_pair(logps: PairLogProbs, weights: jax.Array, settings: LossSettings, running: Running) -> jax.Array:
  """BCO: a classifier of single answers, shifted by the running mean of rewards."""
  del weights
  shift = running["reward_sum"] / jnp.maximum(running["batches"], 1.0)
  chosen, rejected = settings.beta * logps.chosen_ratio, settings.beta * logps.rejected_ratio
  return -jax.nn.log_sigmoid(chosen - shift) - jax.nn.log_sigmoid(shift - rejected)


def _sppo_hard(
  logps: PairLogProbs, weights: jax.Array, settings: LossSettings, running: Running
) -> jax.Array:
  """SPPO with hard labels."""
  del weights, running
  half = 0.5 / settings.beta
  return (logps.chosen_ratio - half) ** 2 + (logps.rejected_ratio + half) ** 2


def _nca_pair(logps: PairLogProbs, weights: jax.Array, settings: LossSettings, running: Running) -> jax.Array:
  """NCA."""
  del weights, running
  chosen, rejected = settings.beta * logps.chosen_ratio, settings.beta * logps.rejected_ratio
  return -jax.nn.log_sigmoid(chosen) - 0.5 * jax.nn.log_sigmoid(-chosen) - 0.5 * jax.nn.log_sigmoid(-rejected)


def _aot_pair(logps: PairLogProbs, weights: jax.Array, settings: LossSettings, running: Running) -> jax.Array:
  """AOT, unpaired: the n-th best ratio of chosen answers against the n-th best of rejected ones."""
  del running
  return _transport(logps.chosen_ratio, logps.rejected_ratio, weights, settings)


def _aot(logps: PairLogProbs, weights: jax.Array, settings: LossSettings, running: Running) -> jax.Array:
  """AOT for pairs: the policy's n-th largest preference against the reference's."""
  del running
  preferred = logps.chosen - logps.rejected
  return _transport(preferred, logps.reference_chosen - logps.reference_rejected, weights, settings)


def _transport(better: jax.Array, worse: jax.Array, weights: jax.Array, settings: LossSettings) -> jax.Array:
  """Losses of sorted against sorted values: those of real pairs come first, at the places of real pairs."""
  real = weights > 0
  # Padding is sorted to the end of both, and what came first is dealt to the pairs that are real.
  ordered = [jnp.sort(jnp.where(real, values, jnp.inf)) for values in (better, worse)]
  rank = jnp.maximum(jnp.cumsum(real) - 1, 0)
  above, below = (values[rank] for values in ordered)
  difference = jnp.where(real, above, 0.0) - jnp.where(real, below, 0.0)
  return _smoothed(settings.beta * difference, settings.label_smoothing)


class PairLoss(Protocol):
  """The loss of every pair [N]; arguments as of `pair_losses`."""

  def __call__(
    self, logps: PairLogProbs, weights: Float[Array, " N"], settings: LossSettings, running: Running, /
  ) -> Float[Array, " N"]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
  """A preference loss, and what the rest of the program has to know of it.

  Attributes:
    function: computes it.
    paper: where it comes from, an arXiv id.
    smoothed: `LossSettings.label_smoothing` changes it.
    per_token: it is about the mean log-probability of an answer's tokens, not about their sum.
  """

  function: PairLoss
  paper: str
  smoothed: bool = False
  per_token: bool = False


LOSSES: dict[str, PreferenceLoss] = {
  "sigmoid": PreferenceLoss(function=_sigmoid, paper="2305.18290", smoothed=True),
  "hinge": PreferenceLoss(function=_hinge, paper="2305.10425"),
  "ipo": PreferenceLoss(function=_ipo, paper="2310.12036", per_token=True),
  "bco_pair": PreferenceLoss(function=_bco_pair, paper="2404.04656"),
  "sppo_hard": PreferenceLoss(function=_sppo_hard, paper="2405.00675"),
  "nca_pair": PreferenceLoss(function=_nca_pair, paper="2402.05369"),
  "robust": PreferenceLoss(function=_robust, paper="2403.00409", smoothed=True),
  "aot": PreferenceLoss(function=_aot, paper="2406.05882", smoothed=True),
  "aot_pair": PreferenceLoss(function=_aot_pair, paper="2406.05882", smoothed=True),
  "exo_pair": PreferenceLoss(function=_exo_pair, paper="2402.00856", smoothed=True),
}
"""The losses by TRL's names. The weight of one is its entry of `preference.loss_weights`, or the field that TRL has for
it, such as `preference.sigmoid_loss_weight`."""


def smoothed() -> list[str]:
  """Names of the losses that label smoothing changes."""
  return sorted(kind for kind, loss in LOSSES.items() if loss.smoothed)
