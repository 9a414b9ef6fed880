"""Preference optimization as a task."""

import functools

from internvl_jax.config import TrainConfig
from internvl_jax.hf.model import Source
from internvl_jax.losses.preference import LossSettings
from internvl_jax.optim.labels import trainable_paths
from internvl_jax.tasks.preference.batch import PreferenceBatch, pairs_of_row
from internvl_jax.tasks.preference.data import PairData
from internvl_jax.tasks.preference.hooks import PreferenceHooks
from internvl_jax.tasks.preference.lines import FRAME_NAME, PairLines
from internvl_jax.tasks.preference.objective import PreferenceOptimization
from internvl_jax.tasks.preference.policy import COPIES, abstract_copies, reference_policy
from internvl_jax.tasks.task import Task

SHOWN_TERMS = {
  "rewards/accuracies": "rewards/accuracies {:.3f}",
  "rewards/margins": "rewards/margins {:.3g}",
}
"""Metrics of `PreferenceOptimization` that log lines show."""


def open_task(config: TrainConfig, source: Source) -> Task:
  """The task of a config, for a model."""
  asked = config.preference
  # A window of attention counts along the row, in which a shared prompt is too far from its second answer.
  shares = asked.share_prompts and not any(source.config.text.windows)
  data = PairData(lines=PairLines(share_prompts=shares))
  in_memory = not asked.precompute_reference
  policy = reference_policy(source, trainable_paths(config.model, source.model.shapes))
  copies = functools.partial(abstract_copies, source, bf16=config.training.bf16)
  return Task(
    name="preference",
    data=data,
    make_objective=functools.partial(
      PreferenceOptimization,
      terms=asked.terms,
      settings=LossSettings(asked.beta, asked.label_smoothing),
      rpo_alpha=asked.rpo_alpha,
      reference=policy if in_memory else None,
      shares_prompts=shares,
    ),
    batch=PreferenceBatch,
    sizes=lambda tokens: {"K": pairs_of_row(tokens)},
    held_out={"preference.eval_meta_path": asked.eval_meta_path},
    frame_name=FRAME_NAME,
    shown_terms=SHOWN_TERMS,
    open_hooks=functools.partial(PreferenceHooks, data),
    **({"twice": policy.parts, "abstract_copies": copies, "copy_prefix": COPIES} if in_memory else {}),
  )
