"""Distillation of a larger model: its next-token probabilities are learned beside the labels (arXiv:1503.02531)."""

from internvl_jax.config import TrainConfig

CONVERSATIONS = 1
"""A line is one."""


def is_asked_for(config: TrainConfig) -> bool:
  """Whether the config names a teacher."""
  return config.distillation.teacher is not None


def _distill(config: TrainConfig) -> None:
  """From any teacher: a step has its probabilities, and not the teacher."""
  config.distillation.teacher = "teacher"


VARIANTS = {"distill": _distill}
"""Variants of the recipe that is planned for."""
