"""Policy-gradient losses of GRPO and GSPO: pure functions of log-probabilities, and the table of them under TRL's names.

    rewards [N, G] -> group_advantages -> one number an answer
    log-probabilities, advantages -> policy_losses -> a loss a token; times token_weights, summed: the loss of a step

A new loss is a function and a line of `LOSSES`. `grpo.loss_type` names it. How far ratios are of tokens (GRPO) or of whole
answers (GSPO) is `PolicySettings.level`.

Letters: N prompts, G answers of a prompt; A micro-batches, R rows, S tokens of a row, K answers that a row has room for.
"""

import dataclasses
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Scale = Literal["group", "batch", "none"]
Level = Literal["token", "sequence"]
Normalization = Literal["answers", "tokens", "tokens of micro-batch", "constant"]

_STD_EPSILON = 1e-4
"""Added to standard deviations, as in TRL."""


# --- Advantages -----------------------------------------------------------------------------------------------


class Advantages(NamedTuple):
  """How much better an answer is than others to the same prompt.

  Attributes:
    values: float32 [N, G]; 0 of answers without a reward, and of degenerate groups.
    degenerate: bool [N], groups that nothing can be learned from: their rewards are all equal, or fewer than two.
  """

  values: np.ndarray
  degenerate: np.ndarray


def group_advantages(rewards: Float[np.ndarray, "N G"], scale: Scale = "group") -> Advantages:
  """Rewards less their group's mean, over a standard deviation: GRPO (arXiv:2402.03300, 4.1.2), on the host.

  Standard deviations are of a sample (with N - 1), as TRL and PyTorch have them.

  Args:
    rewards: float [N, G], NaN where an answer has none; where `scale` is "batch", of all hosts.
    scale: divides by the standard deviation of the group, by that of all rewards (arXiv:2508.08221), or by nothing
      (Dr. GRPO, arXiv:2503.20783).
  """
  rewards = np.asarray(rewards, np.float64)
  known = ~np.isnan(rewards)
  count = known.sum(axis=1, keepdims=True)
  mean = np.where(known, rewards, 0.0).sum(axis=1, keepdims=True) / np.maximum(count, 1)
  distance = np.where(known, rewards - mean, 0.0)
  highest = np.where(known, rewards, -np.inf).max(axis=1)
  lowest = np.where(known, rewards, np.inf).min(axis=1)
  degenerate = (count[:, 0] < 2) | (highest == lowest)
  match scale:
    case "group":
      variance = (distance**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1)
      distance = distance / (np.sqrt(variance) + _STD_EPSILON)
    case "batch":
      spread = np.std(rewards[known], ddof=1) if known.sum() > 1 else 0.0
      distance = distance / (spread + _STD_EPSILON)
    case "none":
      pass
  # Of equal rewards rounding alone would remain, divided by a small number.
  return Advantages(np.where(degenerate[:, None], 0.0, distance).astype(np.float32), degenerate)


# --- Losses of tokens -----------------------------------------------------------------------------------------


class TokenLogProbs(NamedTuple):
  """Log-probabilities of the tokens to predict, each given those before it; float32 [R, S], anything at other places.

  Attributes:
    policy: by what is trained.
    old: by what sampled the answers; None: by the policy as it is now, so that all ratios are 1.
    reference: by the reference policy; None where `PolicySettings.beta` is 0.
  """

  policy: Float[Array, "*rows S"]
  old: Float[Array, "*rows S"] | None = None
  reference: Float[Array, "*rows S"] | None = None


class PolicySettings(NamedTuple):
  """What the losses have in common.

  Attributes:
    loss_type: a name in LOSSES.
    level: ratios are of each token, or of each answer per token: the geometric mean of its tokens' (GSPO, equation 7).
    epsilon: how far below 1 a ratio counts.
    epsilon_high: how far above 1 it does (DAPO's "clip higher", arXiv:2503.14476); CISPO's largest ratio itself.
    beta: weight of the KL divergence from the reference policy.
  """

  loss_type: str
  level: Level = "token"
  epsilon: float = 0.2
  epsilon_high: float = 0.2
  beta: float = 0.0


class TokenLosses(NamedTuple):
  """What comes of every token [R, S], before weighting; 0 at tokens of no answer.

  Attributes:
    loss: what is minimized.
    kl: the estimate of the KL divergence from the reference policy, times the ratio; None without one.
    clipped_low: 1 where a ratio is clipped from below, so that a bad answer is no longer pushed down; else 0.
    clipped_high: 1 where it is clipped from above, so that a good answer is no longer pushed up; else 0.
  """

  loss: Float[Array, "*rows S"]
  kl: Float[Array, "*rows S"] | None
  clipped_low: Float[Array, "*rows S"]
  clipped_high: Float[Array, "*rows S"]


def policy_losses(
  logps: TokenLogProbs,
  advantages: Float[Array, "*rows K"],
  owner: Int[Array, "*rows S"],
  settings: PolicySettings,
) -> TokenLosses:
  """The loss of every token [R, S].

  GSPO-token (arXiv:2507.18071, 4.3) needs no setting: of one advantage an answer, its values and gradients are GSPO's.

  Args:
    logps: of the tokens to predict.
    advantages: float32 [R, K], of each answer of a row.
    owner: int32 [R, S], which answer of its row the token to predict belongs to, counted from 1; 0: to none. Rows whose
      tokens are sharded have to be gathered before, for ratios of answers.
    settings: of all losses.
  """
  real = owner > 0
  policy = jnp.where(real, logps.policy, 0.0)
  old = jax.lax.stop_gradient(policy) if logps.old is None else jnp.where(real, logps.old, 0.0)
  log_ratio = policy - old
  if settings.level == "sequence":
    lengths = by_answer(real.astype(jnp.float32), owner, advantages.shape[-1])
    means = by_answer(log_ratio, owner, advantages.shape[-1]) / jnp.maximum(lengths, 1.0)
    log_ratio = by_token(means, owner)
  ratio, advantage = jnp.exp(log_ratio), by_token(advantages, owner)
  loss = LOSSES[settings.loss_type].function(ratio, advantage, policy, settings)
  low, high = LOSSES[settings.loss_type].range(settings)
  kl = None
  if settings.beta:
    assert logps.reference is not None, "a KL divergence needs a reference policy"
    # As a sum over answers that the old policy sampled, it needs their ratios: only so is its gradient that of the KL
    # divergence, also where all ratios are 1 (arXiv:2512.02556, 3.1, and TRL's default).
    kl = ratio * kl_divergence(policy, jnp.where(real, logps.reference, 0.0))
    loss = loss + settings.beta * kl
  return TokenLosses(
    loss=jnp.where(real, loss, 0.0),
    kl=kl,
    clipped_low=((ratio < low) & (advantage < 0)).astype(jnp.float32),
    clipped_high=((ratio > high) & (advantage > 0)).astype(jnp.float32),
  )


def kl_divergence(
  policy: Float[Array, "*tokens"], reference: Float[Array, "*tokens"]
) -> Float[Array, "*tokens"]:
  """The KL divergence of policy from reference, estimated by a sampled token: never negative, and right in the mean.

  "k3" of http://joschu.net/blog/kl-approx.html, GRPO's equation 4; of log-probabilities of any shape.
  """
  difference = reference - policy
  return jnp.exp(difference) - difference - 1.0


def by_answer(
  values: Float[Array, "*rows S"], owner: Int[Array, "*rows S"], answers: int
) -> Float[Array, "*rows K"]:
  """Sums [R, K] of values [R, S] over each row's answers; see `policy_losses` for `owner`."""
  flat = owner.reshape(-1, owner.shape[-1])
  rows = jnp.arange(flat.shape[0])[:, None]
  sums = jnp.zeros((flat.shape[0], 1 + answers), values.dtype)
  sums = sums.at[rows, flat].add(values.reshape(flat.shape))
  return sums[:, 1:].reshape(*owner.shape[:-1], answers)


def by_token(values: Float[Array, "*rows K"], owner: Int[Array, "*rows S"]) -> Float[Array, "*rows S"]:
  """At each token [R, S] the value [R, K] of its answer; 0 at tokens of none."""
  padded = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(1, 0)])
  return jnp.take_along_axis(padded, owner, axis=-1)


def _clipped(ratio: jax.Array, advantage: jax.Array, logp: jax.Array, settings: PolicySettings) -> jax.Array:
  """PPO's clipped surrogate (arXiv:1707.06347, equation 7)."""
  del logp
  bounded = jnp.clip(ratio, 1 - settings.epsilon, 1 + settings.epsilon_high)
  return -jnp.minimum(ratio * advantage, bounded * advantage)


def _clipped_weight(
  ratio: jax.Array, advantage: jax.Array, logp: jax.Array, settings: PolicySettings
) -> jax.Array:
  """CISPO: REINFORCE with importance weights that have an upper bound, which no token loses its gradient by."""
  weight = jax.lax.stop_gradient(jnp.minimum(ratio, settings.epsilon_high))
  return -weight * advantage * logp


def _range_around_1(settings: PolicySettings) -> tuple[float, float]:
  return 1 - settings.epsilon, 1 + settings.epsilon_high


def _below_bound(settings: PolicySettings) -> tuple[float, float]:
  return 0.0, settings.epsilon_high


class Surrogate(Protocol):
  """The loss [R, S] of tokens by their ratios, advantages and log-probabilities, without the KL divergence."""

  def __call__(
    self,
    ratio: Float[Array, "*rows S"],
    advantage: Float[Array, "*rows S"],
    logp: Float[Array, "*rows S"],
    settings: PolicySettings,
    /,
  ) -> Float[Array, "*rows S"]: ...


class Range(Protocol):
  """The lowest and the highest ratio that are not clipped."""

  def __call__(self, settings: PolicySettings, /) -> tuple[float, float]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyLoss:
  """A loss of sampled answers.

  Attributes:
    paper: where it comes from, an arXiv id; None: TRL's own.
    normalization: what the sum over tokens is divided by; see `token_weights`.
    function: the loss of a token.
    range: of ratios that are not clipped.
  """

  paper: str | None
  normalization: Normalization
  function: Surrogate = _clipped
  range: Range = _range_around_1


LOSSES: dict[str, PolicyLoss] = {
  "grpo": PolicyLoss(paper="2402.03300", normalization="answers"),
  "bnpo": PolicyLoss(paper=None, normalization="tokens of micro-batch"),
  "dr_grpo": PolicyLoss(paper="2503.20783", normalization="constant"),
  "dapo": PolicyLoss(paper="2503.14476", normalization="tokens"),
  "cispo": PolicyLoss(
    paper="2506.13585", normalization="tokens", function=_clipped_weight, range=_below_bound
  ),
}
"""The losses by TRL's names."""


# --- Weights of tokens ----------------------------------------------------------------------------------------


class TokenWeights(NamedTuple):
  """Normalized weights of an optimizer batch's tokens [A, R, S]; 0 at tokens that are not learned.

  Attributes:
    loss: of losses; their weighted sum is the step's.
    tokens: of what is averaged over tokens, for the log.
    answers: of what is averaged over an answer's tokens and then over answers, for the log.
  """

  loss: Float[Array, "A R S"]
  tokens: Float[Array, "A R S"]
  answers: Float[Array, "A R S"]


def token_weights(
  loss_type: str,
  owner: Int[Array, "A R S"],
  present: Float[Array, "A R K"],
  kept: Float[Array, "A R K"],
  *,
  longest: int,
  shards: int = 1,
) -> TokenWeights:
  """Weights by which losses of tokens sum to the loss of an optimizer batch, however it is split.

  Sums are divided by the number of all answers, each being the mean of its tokens ("answers") or a sum over the most tokens
  there may be ("constant"); by the number of all tokens ("tokens"); or by that of the tokens of a data shard's micro-batch,
  of which the mean is taken ("tokens of micro-batch"; this one depends on the split, as TRL's does).
  Answers that are not kept have no weight, and count among all answers, as in TRL.

  Args:
    loss_type: a name in LOSSES, which says what is divided by.
    owner: int32 [A, R, S]; see `policy_losses`.
    present: float32 [A, R, K], 1 where a row has such an answer, else 0.
    kept: float32 [A, R, K], 1 where it is learned from; 0 where there is none, or where it was cut and is masked.
    longest: the most tokens of an answer.
    shards: data shards D that the rows are dealt to.
  """
  A, R, S = owner.shape
  learned = by_token(kept * present, owner)
  lengths = by_token(by_answer((owner > 0).astype(jnp.float32), owner, kept.shape[-1]), owner)
  number = jnp.maximum(jnp.sum(present), 1.0)
  tokens = learned / jnp.maximum(jnp.sum(learned), 1.0)
  answers = learned / jnp.maximum(lengths, 1.0) / number
  match LOSSES[loss_type].normalization:
    case "answers":
      loss = answers
    case "tokens":
      loss = tokens
    case "constant":
      loss = learned / (longest * number)
    case "tokens of micro-batch":
      parts = learned.reshape(A, shards, R // shards, S)
      total = jnp.maximum(jnp.sum(parts, axis=(2, 3), keepdims=True), 1.0)
      loss = (parts / total / (A * shards)).reshape(A, R, S)
  return TokenWeights(loss, tokens, answers)
