"""Reinforcement by verifiable rewards: GRPO (arXiv:2402.03300) and GSPO (arXiv:2507.18071)."""

from internvl_jax.config import TrainConfig

CONVERSATIONS = 1
"""A line is a prompt, and the answer that is wanted."""


def is_asked_for(config: TrainConfig) -> bool:
  """Whether the config asks for it."""
  return bool(config.grpo.reward_funcs)


def longest_sample(config: TrainConfig) -> int:
  """Tokens of the longest prompt with its answers."""
  from internvl_jax.tasks.grpo.rows import longest_row

  return longest_row(
    config.data.max_seq_length, config.grpo.num_generations, config.grpo.max_completion_length
  )


def _grpo(config: TrainConfig) -> None:
  """With groups of 8 answers of at most 512 tokens to prompts of 2,048, one prompt a device."""
  config.grpo.reward_funcs = ("exact_match",)
  config.data.use_packed_ds = False
  config.data.max_seq_length = 2048
  config.data.dynamic_image_size, config.data.max_dynamic_patch = True, 6


VARIANTS = {"grpo": _grpo}
"""Variants of the recipe that is planned for."""
