"""Training of InternVL3.5-Flash in two stages (ViCO, arXiv:2510.12793; arXiv:2508.18265, section 2.4).

The consistency stage teaches the model to answer alike whether tiles are compressed or not; the router stage teaches its
router which tiles may be.
"""

from internvl_jax.config import TrainConfig

CONVERSATIONS = 1
"""A line is one."""


def is_asked_for(config: TrainConfig) -> bool:
  """Whether the config asks for one of the stages."""
  return config.flash.stage != "none"


def _consistency(config: TrainConfig) -> None:
  config.flash.stage = "consistency"


def _router(config: TrainConfig) -> None:
  config.flash.stage = "router"


VARIANTS = {"flash-consistency": _consistency, "flash-router": _router}
"""Variants of the recipe that is planned for."""
