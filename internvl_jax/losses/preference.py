"""Preference losses: pure functions of log-probabilities, under TRL's names.

Letters: N pairs of a chosen and a rejected answer, of which some may be padding.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

Running: TypeAlias = dict[str, jax.Array]
"""What BCO carries from batch to batch: `reward_sum` and `batches`, float32 scalars."""


class PairLogProbs(NamedTuple):
  """Log-probabilities of answers, each summed over the answer's tokens; float32 [N].

  Attributes:
    chosen, rejected: by the policy.
    reference_chosen, reference_rejected: by the reference policy.
  """

  chosen: jax.Array
  rejected: jax.Array
  reference_chosen: jax.Array
  reference_rejected: jax.Array

  @property
  def chosen_ratio(self) -> jax.Array:
    """How much likelier the policy finds the chosen answer than the reference does, in logarithms."""
    return self.chosen - self.reference_chosen

  @property
  def rejected_ratio(self) -> jax.Array:
    """The same of the rejected answer."""
    return self.rejected - self.reference_rejected

  @property
  def margin(self) -> jax.Array:
    """The logits of DPO: how much the policy prefers the chosen answer more than the reference does."""
    return self.chosen_ratio - self.rejected_ratio


class LossSettings(NamedTuple):
  """What the losses have in common.

  Attributes:
    beta: how strongly the policy is held to the reference.
    label_smoothing: the share of pairs whose preference is taken to be the wrong way round.
  """

  beta: float
  label_smoothing: float


def pair_losses(
  kind: str, logps: PairLogProbs, weights: jax.Array, settings: LossSettings, running: Running
) -> jax.Array:
  """The loss of every pair [N], before weighting; what it is at padding must not be used.

  Args:
    kind: one of KINDS.
    logps: log-probabilities; for "ipo" those divided by the number of tokens.
    weights: float32 [N], 0 at padding.
    settings: of all losses.
    running: BCO's, updated with this batch (`update_running`).
  """
  return _LOSSES[kind](logps, weights, settings, running)


def initial_running() -> Running:
  """The state before the first batch."""
  return {"reward_sum": jnp.float32(0), "batches": jnp.float32(0)}


def update_running(running: Running, logps: PairLogProbs, weights: jax.Array, beta: float) -> Running:
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


def _sigmoid(logps, weights, settings, running):
  """DPO (arXiv:2305.18290), with label smoothing cDPO."""
  del weights, running
  return _smoothed(settings.beta * logps.margin, settings.label_smoothing)


def _smoothed(logits, smoothing):
  return -(1 - smoothing) * jax.nn.log_sigmoid(logits) - smoothing * jax.nn.log_sigmoid(-logits)


def _robust(logps, weights, settings, running):
  """An unbiased estimate of DPO's loss where labels are noisy (arXiv:2403.00409)."""
  del weights, running
  logits, noise = settings.beta * logps.margin, settings.label_smoothing
  kept = -(1 - noise) * jax.nn.log_sigmoid(logits)
  return (kept + noise * jax.nn.log_sigmoid(-logits)) / (1 - 2 * noise)


def _exo_pair(logps, weights, settings, running):
  """The reverse KL divergence of EXO (arXiv:2402.00856, equation 16); without smoothing it takes 0.001."""
  del weights, running
  logits, noise = settings.beta * logps.margin, settings.label_smoothing or 1e-3
  forward = jax.nn.sigmoid(logits) * (jax.nn.log_sigmoid(logits) - math.log(1 - noise))
  return forward + jax.nn.sigmoid(-logits) * (jax.nn.log_sigmoid(-logits) - math.log(noise))


def _hinge(logps, weights, settings, running):
  """SLiC's hinge (arXiv:2305.10425) on DPO's logits."""
  del weights, running
  return jax.nn.relu(1 - settings.beta * logps.margin)


def _ipo(logps, weights, settings, running):
  """IPO (arXiv:2310.12036, equation 17)."""
  del weights, running
  return (logps.margin - 1 / (2 * settings.beta)) ** 2


def _bco_pair(logps, weights, settings, running):
  """BCO (arXiv:2404.04656): a classifier of single answers, shifted by the running mean of rewards."""
  del weights
  shift = running["reward_sum"] / jnp.maximum(running["batches"], 1.0)
  chosen, rejected = settings.beta * logps.chosen_ratio, settings.beta * logps.rejected_ratio
  return -jax.nn.log_sigmoid(chosen - shift) - jax.nn.log_sigmoid(shift - rejected)


def _sppo_hard(logps, weights, settings, running):
  """SPPO (arXiv:2405.00675) with hard labels."""
  del weights, running
  half = 0.5 / settings.beta
  return (logps.chosen_ratio - half) ** 2 + (logps.rejected_ratio + half) ** 2


def _nca_pair(logps, weights, settings, running):
  """NCA (arXiv:2402.05369)."""
  del weights, running
  chosen, rejected = settings.beta * logps.chosen_ratio, settings.beta * logps.rejected_ratio
  return -jax.nn.log_sigmoid(chosen) - 0.5 * jax.nn.log_sigmoid(-chosen) - 0.5 * jax.nn.log_sigmoid(-rejected)


def _aot_pair(logps, weights, settings, running):
  """AOT (arXiv:2406.05882): the n-th best ratio of chosen answers against the n-th best of rejected ones."""
  del running
  return _transport(logps.chosen_ratio, logps.rejected_ratio, weights, settings)


def _aot(logps, weights, settings, running):
  """AOT for pairs: the policy's n-th largest preference against the reference's."""
  del running
  preferred = logps.chosen - logps.rejected
  return _transport(preferred, logps.reference_chosen - logps.reference_rejected, weights, settings)


def _transport(better, worse, weights, settings):
  """Losses of sorted against sorted values: those of real pairs come first, at the places of real pairs."""
  real = weights > 0
  # Padding is sorted to the end of both, and what came first is dealt to the pairs that are real.
  ordered = [jnp.sort(jnp.where(real, values, jnp.inf)) for values in (better, worse)]
  rank = jnp.maximum(jnp.cumsum(real) - 1, 0)
  above, below = (values[rank] for values in ordered)
  difference = jnp.where(real, above, 0.0) - jnp.where(real, below, 0.0)
  return _smoothed(settings.beta * difference, settings.label_smoothing)


_LOSSES: dict[str, Callable[..., jax.Array]] = {
  "sigmoid": _sigmoid,
  "hinge": _hinge,
  "ipo": _ipo,
  "bco_pair": _bco_pair,
  "sppo_hard": _sppo_hard,
  "nca_pair": _nca_pair,
  "robust": _robust,
  "aot": _aot,
  "aot_pair": _aot_pair,
  "exo_pair": _exo_pair,
}

KINDS = tuple(_LOSSES)
"""The losses by TRL's names."""
