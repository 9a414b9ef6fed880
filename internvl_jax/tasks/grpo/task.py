"""Reinforcement by verifiable rewards as a task."""

import functools

import jax
import numpy as np

from internvl_jax.batch import abstract_batch
from internvl_jax.config import TrainConfig
from internvl_jax.errors import UserError
from internvl_jax.hf.model import Source
from internvl_jax.losses.policy import PolicySettings
from internvl_jax.optim.labels import trainable_paths
from internvl_jax.parallel import batches
from internvl_jax.tasks.grpo.answering import make_answering
from internvl_jax.tasks.grpo.batch import GrpoBatch, PromptBatch
from internvl_jax.tasks.grpo.hooks import GrpoHooks
from internvl_jax.tasks.grpo.objective import GroupRelativePolicy
from internvl_jax.tasks.grpo.prompts import PromptData
from internvl_jax.tasks.grpo.sampler import Given, answered_at_once
from internvl_jax.tasks.preference.policy import COPIES, abstract_copies, reference_policy
from internvl_jax.tasks.task import Program, Task

ROLLOUT = "the rollout"
"""What plans call the program that samples answers."""

FORWARD = "the forward pass over its answers"
"""What plans call the program that decides answers, or only says how probable they are."""

SHOWN_TERMS = {"reward": "reward {:.3f}", "completions/mean_length": "length {:.1f}"}
"""Metrics that log lines show."""


def open_task(config: TrainConfig, source: Source) -> Task:
  """The task of a config, for a model.

  Raises:
    UserError: the model has attention windows.
  """
  grpo = config.grpo
  if any(source.config.text.windows):
    raise UserError(
      "grpo.reward_funcs: this model has attention windows, which count along a row, where answers lie behind each other "
      "and not behind their prompt; train another model"
    )
  policy = reference_policy(source, trainable_paths(config.model, source.model.shapes)) if grpo.beta else None
  copies = functools.partial(abstract_copies, source, bf16=config.training.bf16)
  data = PromptData()
  return Task(
    name="grpo",
    data=data,
    make_objective=functools.partial(
      GroupRelativePolicy,
      settings=PolicySettings(
        loss_type=grpo.loss_type,
        level=grpo.importance_sampling_level,
        epsilon=grpo.epsilon,
        epsilon_high=grpo.epsilon if grpo.epsilon_high is None else grpo.epsilon_high,
        beta=grpo.beta,
      ),
      generations=grpo.num_generations,
      longest=grpo.max_completion_length,
      temperature=grpo.temperature,
      reuses=grpo.num_iterations > 1,
      exact=not config.training.bf16 if grpo.exact_rollouts is None else grpo.exact_rollouts,
      reference=policy,
    ),
    batch=GrpoBatch,
    sizes=lambda tokens: {"G": grpo.num_generations},
    shown_terms=SHOWN_TERMS,
    beside=functools.partial(programs_beside, config),
    open_hooks=functools.partial(GrpoHooks, data),
    **({} if policy is None else {"twice": policy.parts, "abstract_copies": copies, "copy_prefix": COPIES}),
  )


def programs_beside(
  config: TrainConfig, objective: GroupRelativePolicy, mesh: jax.sharding.Mesh, batch: GrpoBatch
) -> dict[str, Program]:
  """The programs that answer the prompts of a step whose batch has these shapes."""
  answering = make_answering(config, objective, mesh, stop_ids=(0,))
  A, R, _ = batch.rows.input_ids.shape
  D, T, H, W = batch.rows.tiles.shape[1:5]
  sizes = {"R": R, "S": config.data.max_seq_length, "D": D, "T": T, "H": H, "W": W}

  def prompts(accumulation: int) -> PromptBatch:
    shapes = abstract_batch(PromptBatch, {**sizes, "A": accumulation}, jax.ShapeDtypeStruct)
    places = batches.batch_shardings(shapes, mesh)
    return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, places)

  k, step = answered_at_once(answering.at_once, A, R // D), jax.ShapeDtypeStruct((), np.int32)
  answers = (k, R, config.grpo.num_generations, config.grpo.max_completion_length)
  given = Given(*(jax.ShapeDtypeStruct(shape, np.int32) for shape in (answers, answers[:-1])))
  programs: dict[str, Program] = {ROLLOUT: (answering.sampler.sample, (prompts(k), step, given))}
  if answering.asks_forward:
    programs[FORWARD] = (answering.forward.compute, (batch, prompts(A).index, step))
  return programs
