"""Supervised fine-tuning: next-token prediction on the answers of conversations."""

from internvl_jax.config import TrainConfig

CONVERSATIONS = 1
"""A line is one."""


def is_asked_for(config: TrainConfig) -> bool:
  """True: it is what a config asks for that asks for nothing else."""
  del config
  return True
