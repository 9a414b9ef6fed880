"""Reinforcement by verifiable rewards as a task."""

import functools
from typing import Any

import jax
import numpy as np

from internvl_jax.batch import abstract_batch
from internvl_jax.config import TrainConfig
from internvl_jax.errors import UserError
from internvl_jax.hf.model import Source
from internvl_jax.losses.policy import PolicySettings
from internvl_jax.optim.labels import trainable_paths
from internvl_jax.parallel import batches
from internvl_jax.task_arguments import GrpoConfig
from internvl_jax.tasks.grpo.batch import GrpoBatch, PromptBatch
from internvl_jax.tasks.grpo.hooks import GrpoHooks
from internvl_jax.tasks.grpo.objective import GroupRelativePolicy
from internvl_jax.tasks.grpo.prompts import PromptData
from internvl_jax.tasks.grpo.sampler import answered_at_once, make_sampler
from internvl_jax.tasks.preference.policy import COPIES, abstract_copies, reference_policy
from internvl_jax.tasks.task import Task

ROLLOUT = "the rollout"
"""What plans call the program that samples answers."""

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
      reference=policy,
    ),
    batch=GrpoBatch,
    sizes=lambda tokens: {"G": grpo.num_generations},
    shown_terms=SHOWN_TERMS,
    beside=functools.partial(_rollout, grpo, config.data.max_seq_length),
    open_hooks=functools.partial(GrpoHooks, data),
    **({} if policy is None else {"twice": policy.parts, "abstract_copies": copies, "copy_prefix": COPIES}),
  )


def _rollout(
  grpo: GrpoConfig, prompt: int, objective: GroupRelativePolicy, mesh: jax.sharding.Mesh, batch: GrpoBatch
) -> dict[str, tuple[Any, tuple[Any, ...]]]:
  """The program that samples the answers of a step whose batch has these shapes, behind prompts of so many tokens."""
  A, R, _ = batch.rows.input_ids.shape
  D, T, H, W = batch.rows.tiles.shape[1:5]
  most = answered_at_once(grpo, A, R // D)
  sizes = {"A": most, "R": R, "S": prompt, "D": D, "T": T, "H": H, "W": W}
  prompts = abstract_batch(PromptBatch, sizes, jax.ShapeDtypeStruct)
  prompts = jax.tree.map(
    lambda leaf, place: leaf.update(sharding=place), prompts, batches.batch_shardings(prompts, mesh)
  )
  sampler = make_sampler(grpo, objective, mesh, stop_ids=(0,))
  return {ROLLOUT: (sampler.sample, (prompts, jax.ShapeDtypeStruct((), np.int32)))}
