"""Sampled answers are the policy's: a cache that answers share tells what whole rows tell, on any mesh, step after step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE, TokenBatch
from internvl_jax.losses.policy import PolicySettings
from internvl_jax.models.internvl import Execution
from internvl_jax.parallel import batches
from internvl_jax.step import TrainStep
from internvl_jax.tasks.grpo.batch import GrpoBatch, PromptBatch
from internvl_jax.tasks.grpo.draws import Draws
from internvl_jax.tasks.grpo.objective import GroupRelativePolicy
from internvl_jax.tasks.grpo.rows import Answers, answer_rows
from internvl_jax.tasks.grpo.sampler import Given, Sampler
from tests.support.harness import Harness, make_batch, toy

STOPS, G, L = (3, 4, 5, 6, 7), 3, 5


def prompts_of(accumulation=1, shards=1, rows=8):
  """Prompts of random tokens and of many lengths, some about an image; the last one is missing."""
  made = make_batch(rows=rows // accumulation, shards=shards, accumulation=accumulation)
  index = np.arange(rows, dtype=np.int32).reshape(made.input_ids.shape[:2])
  index[-1, -1] = -1
  real = (made.segment_ids > 0) & (index[..., None] >= 0)
  empty = np.full_like(made.targets, IGNORE_INDEX)
  fields = {"input_ids": 0, "positions": 0, "segment_ids": 0, "image_index": NO_IMAGE}
  cut = {name: np.where(real, getattr(made, name), fill).astype("i4") for name, fill in fields.items()}
  tokens = TokenBatch(**cut, targets=empty, loss_weight=np.zeros_like(made.loss_weight), tiles=made.tiles)
  return PromptBatch(rows=tokens, index=index)


def opened(mesh=None, **settings):
  """A policy on a mesh: the harness, its objective and its sampler."""
  harness = Harness(toy(), mesh=mesh)
  objective = GroupRelativePolicy(
    model=harness.model,
    how=Execution(),
    normalize_type="imagenet",
    shards=harness.shards,
    settings=PolicySettings("dapo"),
    generations=G,
    longest=L,
    temperature=settings.get("temperature", 1.0),
  )
  sampler = Sampler(
    objective=objective, mesh=harness.mesh, stop_ids=STOPS, longest=L, draws=Draws(generations=G), **settings
  )
  return harness, objective, sampler


def sampled(harness, sampler, prompts, step=0):
  params = {**harness.frozen, **harness.state.params}
  given = Given.nothing(*prompts.index.shape, G, L)
  found = sampler(params, batches.place_batch(prompts, harness.mesh), step, given)
  return Answers.of(*map(np.asarray, found), prompts.index >= 0, STOPS)


def batch_of(prompts, answers):
  rows = answer_rows(prompts.rows, answers, 32)
  shape = answers.lengths.shape
  real = (answers.lengths > 0).astype("f4")
  advantages = np.random.default_rng(1).normal(size=shape).astype("f4") * real
  old = np.zeros_like(rows.sampled)
  return GrpoBatch(**rows._asdict(), advantages=advantages, present=real, kept=real, old=old)


@pytest.fixture(scope="module")
def one():
  return opened()


@pytest.fixture(scope="module")
def answers(one):
  return sampled(one[0], one[2], prompts_of())


def test_the_cache_tells_what_whole_rows_tell(one, answers):
  """Answers of all lengths there are; each token's log-probability, by the sampler and by the step's forward pass."""
  harness, objective, _ = one
  assert set(answers.lengths[0, :-1].flat) >= {1, 2, L} and not answers.lengths[0, -1].any()
  batch = batch_of(prompts_of(), answers)
  micro = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), batch)
  params = {**harness.frozen, **harness.state.params}
  logps = np.asarray(jax.jit(objective.forward)(params, micro)[1])
  real = batch.owner[0] > 0
  np.testing.assert_allclose(logps[real], batch.sampled[0][real], atol=2e-5)
  assert np.ptp(logps[real]) > 1


def test_what_is_drawn_depends_on_step_and_prompt_and_on_nothing_else(one, answers):
  harness, _, sampler = one
  again = sampled(harness, sampler, prompts_of())
  for ours, theirs in zip(again, answers, strict=True):
    np.testing.assert_array_equal(ours, theirs)
  other = sampled(harness, sampler, prompts_of(), step=1)
  assert (other.tokens != answers.tokens).any()
  groups = answers.tokens[0, :-1]
  assert (groups[:, 0] != groups[:, 1]).any()


def test_cold_answers_are_the_likeliest(one):
  harness, _, sampler = one
  cold = dataclasses.replace(sampler, temperature=1e-4)
  found = sampled(harness, cold, prompts_of())
  chosen = dataclasses.replace(sampler, draws=Draws(generations=G, top_k=1))
  for group, lengths in zip(found.tokens[0], found.lengths[0], strict=True):
    assert len({tuple(tokens[:n]) for tokens, n in zip(group, lengths, strict=True)}) == 1
  np.testing.assert_array_equal(found.lengths, sampled(harness, chosen, prompts_of()).lengths)


def step_on(harness, objective, batch):
  """Loss, gradient norm and terms of one step."""
  step = TrainStep(objective=objective, optimizer=harness.step.optimizer, seed=0, places=harness.step.places)
  placed = batches.place_batch(batch, harness.mesh)
  _, metrics = jax.jit(step.__call__)(harness.state, harness.frozen, placed, np.float32(1e-3))
  return jax.tree.map(float, {"loss": metrics.loss, "norm": metrics.grad_norm, **metrics.terms})


@pytest.mark.slow
@pytest.mark.parametrize(
  ("mesh", "accumulation"),
  [({"data": 2, "fsdp": 2, "tensor": 2}, 1), ({"data": 2}, 2), ({"sequence": 2}, 1)],
)
def test_a_mesh_samples_the_same_answers_and_learns_the_same(one, answers, mesh, accumulation):
  harness, objective, sampler = opened(mesh)
  prompts = prompts_of(accumulation, harness.shards)
  found = sampled(harness, sampler, prompts)
  flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
  np.testing.assert_array_equal(flat(found.lengths), flat(answers.lengths))
  ours, theirs = (
    step_on(harness, objective, batch_of(prompts, found)),
    step_on(*one[:2], batch_of(prompts_of(), answers)),
  )
  assert theirs["norm"] > 1e-3
  for name, value in theirs.items():
    np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
