"""Answers are decided by the step's own forward pass: its numbers are theirs to the bit, whatever proposed them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.batch import abstract_batch
from internvl_jax.config import TrainConfig
from internvl_jax.models.internvl import Execution
from internvl_jax.tasks.grpo.answering import Answering
from internvl_jax.tasks.grpo.batch import GrpoBatch
from internvl_jax.tasks.grpo.draws import Draws
from internvl_jax.tasks.grpo.forward import AnswerForward
from internvl_jax.tasks.grpo.sampler import Given
from internvl_jax.tasks.grpo.task import FORWARD, ROLLOUT, programs_beside
from tests.tasks.test_grpo_sampler import G, L, opened, prompts_of, sampled, step_on


def answering_of(objective, sampler, draws):
  return Answering(
    sampler=dataclasses.replace(sampler, draws=draws),
    forward=AnswerForward(objective=objective, mesh=sampler.mesh, draws=draws),
  )


def params_of(harness):
  return {**harness.frozen, **harness.state.params}


def batch_to_learn(answering, prompts, found):
  """The step's batch, with advantages of no meaning."""
  answers = answering.answers(found)
  real = (answers.lengths > 0).astype("f4")[:, answering.own(prompts)]
  advantages = np.random.default_rng(1).normal(size=real.shape).astype("f4") * real
  return answering.rows(prompts, answers)._replace(advantages=advantages, present=real, kept=real)


@pytest.mark.parametrize(
  ("mesh", "accumulation", "temperature"),
  [
    (None, 1, 1.0),
    (None, 2, 0.7),
    pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, 1, 1.0, marks=pytest.mark.slow),
    pytest.param({"data": 2}, 2, 1.0, marks=pytest.mark.slow),
    pytest.param({"sequence": 2}, 1, 1.0, marks=pytest.mark.slow),
  ],
)
def test_the_rollouts_numbers_are_the_steps(mesh, accumulation, temperature):
  """Two programs, one that answers and one that learns: their log-probabilities differ by exactly 0."""
  harness, objective, sampler = opened(mesh, temperature=temperature)
  objective = dataclasses.replace(objective, exact=True)
  sampler = dataclasses.replace(sampler, objective=objective)
  prompts, draws = prompts_of(accumulation, harness.shards), Draws(generations=G)
  answering = answering_of(objective, sampler, draws)
  found = answering(params_of(harness), prompts, 0)
  told = step_on(harness, objective, batch_to_learn(answering, prompts, found))
  assert told["rollout/logp_difference"] == 0.0
  assert told["entropy"] > 0.1 and told["norm"] > 1e-3
  assert found.counts["rollout/undecided_answers"] == 0
  # The decoder's own are not.
  assert 0 < found.counts["rollout/decoder_difference"] < 1e-5


@pytest.mark.parametrize("narrowed", [{}, {"top_k": 5}, {"top_p": 0.8}])
def test_a_decoder_that_is_wrong_changes_nothing(narrowed):
  """It takes longer. bfloat16 draws other tokens now and then; the decided answers are those of a right one."""
  harness, objective, sampler = opened()
  prompts, draws = prompts_of(), Draws(generations=G, **narrowed)
  rough = dataclasses.replace(objective, how=Execution(dtype=jnp.bfloat16))
  right = answering_of(objective, sampler, draws)
  wrong = answering_of(objective, dataclasses.replace(sampler, objective=rough), draws)
  apart = 0
  for step in range(6):
    ours = right(params_of(harness), prompts, step)
    theirs = wrong(params_of(harness), prompts, step)
    lengths = right.answers(ours).lengths
    within = np.arange(L) < lengths[..., None]
    np.testing.assert_array_equal(lengths, wrong.answers(theirs).lengths)
    np.testing.assert_array_equal(ours.tokens[within], theirs.tokens[within])
    np.testing.assert_array_equal(ours.logps[within], theirs.logps[within])
    assert ours.counts["rollout/redrawn_tokens"] == 0 == theirs.counts["rollout/undecided_answers"]
    apart += theirs.counts["rollout/redrawn_tokens"]
  assert apart > 0


def test_what_is_decided_is_what_whole_forward_passes_draw():
  """Token by token, each by a forward pass over all that is there: the same answers."""
  harness, objective, sampler = opened()
  prompts, draws = prompts_of(), Draws(generations=G)
  answering = answering_of(objective, sampler, draws)
  found = answering(params_of(harness), prompts, 3)
  tokens = np.full_like(found.tokens, 11)
  index = jnp.asarray(prompts.index)
  for place in range(L):
    told = answering.forward(
      params_of(harness),
      jax.tree.map(jnp.asarray, answering.rows(prompts, answering.answers(found._replace(tokens=tokens)))),
      index,
      3,
    )
    tokens[..., place] = np.asarray(told.tokens)[..., place]
  lengths = answering.answers(found).lengths
  within = np.arange(L) < lengths[..., None]
  assert set(lengths[0, :-1].flat) >= {1, L}
  np.testing.assert_array_equal(tokens[within], found.tokens[within])


def test_answers_go_on_from_how_they_begin():
  harness, _, sampler = opened()
  prompts = prompts_of()
  plain = sampled(harness, sampler, prompts)
  begun = np.full(plain.tokens.shape, 11, np.int32)
  given = Given(begun, np.full(plain.lengths.shape, 2, np.int32))
  tokens, logps = map(np.asarray, sampler(params_of(harness), prompts, 0, given))
  real = prompts.index >= 0
  assert (tokens[real][..., :2] == 11).all() and (tokens[real][..., 2:] != 11).any()
  # Of a token that is given, too, it says how probable it was.
  assert (logps[real][..., :2] < 0).all()


@pytest.mark.parametrize(
  ("exact", "iterations", "told"),
  [(True, 1, {ROLLOUT, FORWARD}), (False, 1, {ROLLOUT}), (False, 2, {ROLLOUT, FORWARD})],
)
def test_plans_know_all_programs(exact, iterations, told):
  """Those that run beside the step, at its shapes."""
  harness, objective, _ = opened()
  config = TrainConfig()
  config.grpo.num_generations, config.grpo.max_completion_length = G, L
  config.grpo.num_iterations, config.data.max_seq_length = iterations, 16
  sizes = {"A": 2, "R": 4, "S": 40, "D": 1, "T": 3, "H": 16, "W": 16, "G": G}
  batch = abstract_batch(GrpoBatch, sizes, jax.ShapeDtypeStruct)
  programs = programs_beside(config, dataclasses.replace(objective, exact=exact), harness.mesh, batch)
  assert programs.keys() == told
  for program, inputs in programs.values():
    tokens, logps = sorted(jax.tree.leaves(jax.eval_shape(program, params_of(harness), *inputs)), key=str)
    assert tokens.shape == logps.shape == (2, 4, G, L)
