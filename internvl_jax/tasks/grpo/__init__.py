"""Reinforcement by verifiable rewards: GRPO (arXiv:2402.03300) and GSPO (arXiv:2507.18071)."""

from internvl_jax.config import TrainConfig

CONVERSATIONS = 1
"""A line is a prompt, and the answer that is wanted."""


def is_asked_for(config: TrainConfig) -> bool:
  """Whether the config asks for it."""
  return bool(config.grpo.reward_funcs)
