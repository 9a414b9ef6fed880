"""Losses of GRPO and GSPO are TRL's: values and gradients, in rows that hold several answers; and so are advantages."""

import json
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.losses import policy
from internvl_jax.losses.policy import PolicySettings, TokenLogProbs
from internvl_jax.task_arguments import GrpoConfig

RECORDED = json.loads((Path(__file__).parents[1] / "assets" / "policy_losses.json").read_text())
CASES = RECORDED["cases"]
LENGTHS = np.array(RECORDED["lengths"])
A, N = LENGTHS.shape
T = np.array(RECORDED["policy"]).shape[-1]
# TRL sees an answer that is cut as one without tokens; here it has some, and is not kept.
CUT = LENGTHS == 0
HELD = np.where(CUT, 2, LENGTHS)
R, S, K = 3, 16, 3
# Answer of a micro-batch -> its row and its number in it; one row stays empty, and rows are not full.
ROW, NUMBER = np.array([0, 2, 0, 2]), np.array([1, 2, 2, 1])
ROUNDING = 1e-6


def places(answer, a):
  """Where an answer's tokens are in its row: 1 before its first, and the row's answers apart."""
  start = 1 + 7 * (NUMBER[answer] - 1)
  return slice(start, start + HELD[a, answer])


def in_rows(values, fill=np.nan):
  """[A, N, T] as TRL has them -> [A, R, S], `fill` where no answer is."""
  rows = np.full((A, R, S), fill, np.float32)
  for a, answer in np.ndindex(A, N):
    rows[a, ROW[answer], places(answer, a)] = np.asarray(values)[a, answer, : HELD[a, answer]]
  return jnp.asarray(rows)


def by_answer(values, fill=0.0):
  """[A, N] -> [A, R, K]."""
  rows = np.full((A, R, K), fill, np.float32)
  rows[:, ROW, NUMBER - 1] = values
  return jnp.asarray(rows)


OWNER = in_rows(np.broadcast_to(NUMBER[None, :, None], (A, N, T)), fill=0).astype(jnp.int32)
PRESENT, KEPT = by_answer(np.ones((A, N))), by_answer(~CUT)


def settings_of(case):
  names = ("loss_type", "level", "epsilon", "epsilon_high", "beta")
  return PolicySettings(*(case[name] for name in names))


def step_loss(logps, case):
  """The loss of an optimizer batch [A, R, S], a sum over micro-batches as the step has it, and what it is made of."""
  weights = policy.token_weights(
    case["loss_type"], OWNER, PRESENT, KEPT, longest=RECORDED["longest"], shards=1
  )
  old, reference = (in_rows(RECORDED[name]) for name in ("old", "reference"))
  parts = []
  for a in range(A):
    of_micro = TokenLogProbs(
      logps[a], old[a] if case["old"] else None, reference[a] if case["beta"] else None
    )
    advantages = by_answer(RECORDED["advantages"], fill=np.nan)[a]
    parts.append(policy.policy_losses(of_micro, advantages, OWNER[a], settings_of(case)))
  found = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
  return jnp.sum(found.loss * weights.loss), (found, weights)


def case_name(case):
  return "-".join(str(case[name]) for name in ("loss_type", "level", "beta", "old"))


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_losses_and_gradients_are_trls(case):
  """Wherever answers are in rows, over both micro-batches; what other places hold does not matter."""
  (loss, _), gradient = jax.value_and_grad(step_loss, has_aux=True)(in_rows(RECORDED["policy"]), case)
  np.testing.assert_allclose(loss, case["loss"], rtol=ROUNDING, atol=ROUNDING)
  np.testing.assert_allclose(gradient, in_rows(case["gradient"], fill=0.0), rtol=ROUNDING, atol=ROUNDING)
  assert np.any(gradient)


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_logged_shares_are_trls(case):
  """TRL's are of each micro-batch, ours of the step: a mean weighted by what each micro-batch counts."""
  _, (found, weights) = step_loss(in_rows(RECORDED["policy"]), case)
  tokens = LENGTHS.sum(axis=1)
  counted = weights.tokens if case["level"] == "token" else weights.answers

  def recorded(name, share):
    return np.dot(case["metrics"][name], share)

  of_tokens = tokens / tokens.sum()
  shares = of_tokens if case["level"] == "token" else np.full(A, 1 / A)
  if case["beta"]:
    np.testing.assert_allclose(jnp.sum(found.kl * weights.tokens), recorded("kl", of_tokens), rtol=1e-5)
  pairs = (
    (("cispo_clip_ratio", found.clipped_high),)
    if case["loss_type"] == "cispo"
    else (("clip_ratio/low_mean", found.clipped_low), ("clip_ratio/high_mean", found.clipped_high))
  )
  for name, clipped in pairs:
    np.testing.assert_allclose(jnp.sum(clipped * counted), recorded(name, shares), rtol=1e-5, atol=1e-7)
    assert np.any(clipped) == case["old"], "the recording clips where answers are old"


def test_gspo_of_tokens_is_gspo():
  """GSPO-token (arXiv:2507.18071, equations 13 and 14): the answer's ratio for values, each token's own for gradients."""
  case = next(case for case in CASES if case["level"] == "sequence" and not case["beta"] and case["old"])

  def by_definition(logps):
    held = jnp.arange(T) < LENGTHS[..., None]
    log_ratio = jnp.where(held, logps - jnp.array(RECORDED["old"]), 0.0)
    of_answer = log_ratio.sum(-1) / jnp.maximum(LENGTHS, 1)
    stop = jax.lax.stop_gradient
    ratio = jnp.exp(stop(of_answer)[..., None] + logps - stop(logps))
    advantage = jnp.array(RECORDED["advantages"])[..., None]
    bounded = jnp.clip(ratio, 1 - case["epsilon"], 1 + case["epsilon_high"])
    losses = -jnp.minimum(ratio * advantage, bounded * advantage) * held
    return jnp.sum(losses.sum(-1) / jnp.maximum(LENGTHS, 1)) / LENGTHS.size

  logps = jnp.array(RECORDED["policy"])
  value, gradient = jax.value_and_grad(by_definition)(logps)
  np.testing.assert_allclose(value, case["loss"], rtol=ROUNDING)
  np.testing.assert_allclose(gradient, case["gradient"], rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls(scale):
  found = policy.group_advantages(np.array(RECORDED["rewards"], np.float32), scale)
  np.testing.assert_allclose(found.values, RECORDED["scaled"][scale], rtol=ROUNDING, atol=ROUNDING)
  assert found.degenerate.tolist() == [False, True, False, True]


def test_equal_rewards_teach_nothing_however_they_are_rounded():
  """0.1 in float32 has no exact mean; its rounding error over a deviation of 1e-4 would be an advantage."""
  for rewards in (np.full((2, 7), 0.1, np.float32), np.full((1, 3), np.nan)):
    found = policy.group_advantages(rewards, "group")
    assert not found.values.any() and found.degenerate.all()


@pytest.mark.parametrize("kind", policy.LOSSES)
def test_weights_are_of_the_step_however_it_is_split(kind):
  """Two micro-batches, or all rows in one; but for bnpo, whose denominators are those of its parts."""

  def joined(array):
    return array.reshape(1, A * R, -1)

  found = policy.token_weights(kind, OWNER, PRESENT, KEPT, longest=7).loss
  whole = policy.token_weights(kind, joined(OWNER), joined(PRESENT), joined(KEPT), longest=7).loss
  if kind != "bnpo":
    np.testing.assert_allclose(found.reshape(whole.shape), whole, rtol=1e-6)
    return
  assert not np.allclose(found.reshape(whole.shape), whole)
  # Each row of the six by itself, two of them empty, is a part.
  shards = policy.token_weights(kind, joined(OWNER), joined(PRESENT), joined(KEPT), longest=7, shards=A * R)
  rows = np.asarray(shards.loss[0].sum(axis=-1))
  np.testing.assert_allclose(rows[np.asarray(joined(PRESENT)[0].any(-1))], 1 / (A * R), rtol=1e-6)


def test_an_empty_step_weighs_nothing():
  none = jnp.zeros((1, R, K))
  found = policy.token_weights("grpo", jnp.zeros((1, R, S), jnp.int32), none, none, longest=7)
  assert not any(np.any(leaf) for leaf in found)


def test_a_new_loss_is_one_line(monkeypatch):
  """REINFORCE: the log-probability times the advantage, whatever sampled the answer."""
  line = policy.PolicyLoss(
    paper="10.1007/BF00992696",
    normalization="tokens",
    function=lambda ratio, advantage, logp, settings: -advantage * logp,
  )
  monkeypatch.setitem(policy.LOSSES, "reinforce", line)
  case = {**CASES[0], "loss_type": "reinforce", "beta": 0.0}
  loss, (_, weights) = step_loss(in_rows(RECORDED["policy"]), case)
  advantage = by_answer(RECORDED["advantages"])[:, :, :, None] * (
    OWNER[:, :, None] == jnp.arange(1, K + 1)[:, None]
  )
  expected = -jnp.nansum(in_rows(RECORDED["policy"]) * jnp.nansum(advantage, axis=2) * weights.tokens)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_the_configuration_takes_what_there_is():
  hints = typing.get_type_hints(GrpoConfig)
  assert set(typing.get_args(hints["loss_type"])) == set(policy.LOSSES)
  for field, alias in (("importance_sampling_level", policy.Level), ("scale_rewards", policy.Scale)):
    assert typing.get_args(hints[field]) == typing.get_args(alias)
