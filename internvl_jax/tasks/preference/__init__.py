"""Preference optimization of pairs of a chosen and a rejected answer (MPO, arXiv:2411.10442)."""

from typing import TYPE_CHECKING

from internvl_jax.config import TrainConfig

if TYPE_CHECKING:
  from internvl_jax.data.sample.line_keys import OtherKind

CONVERSATIONS = 2
"""A line becomes the prompt with each answer."""

HAS_SCRIPTS = True
"""The reference has published scripts that learn so."""


def is_asked_for(config: TrainConfig) -> bool:
  """Whether the config asks for it."""
  return config.preference.loss_type is not None


def other_kind() -> "OtherKind":
  """Pairs, to tasks whose lines are others."""
  from internvl_jax.tasks.preference.lines import PAIRS

  return PAIRS


def _mpo(config: TrainConfig) -> None:
  """With the losses of the published recipes."""
  config.preference.loss_type = "sigmoid,bco_pair"
  config.preference.rpo_alpha = 1.0


VARIANTS = {"mpo": _mpo}
"""Variants of the recipe that is planned for."""
