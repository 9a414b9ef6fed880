"""The registry of vision towers: a line each. What a line holds is in the tower's file, `models/towers/<name>.py`."""

from collections.abc import Mapping
from typing import Any

from internvl_jax.errors import UserError
from internvl_jax.hf.files import shown
from internvl_jax.models.towers import internvit
from internvl_jax.models.towers.tower import Form, Tower, VisionConfig

TOWERS: list[Tower] = [
  internvit.TOWER,
]
"""All vision towers. The first is that of a `vision_config` without `model_type`."""


def model_types(layout: str) -> dict[str, str]:
  """The towers that a layout of that name has a form for: what its `vision_config` calls one -> the tower's name."""
  return {tower.forms[layout].model_type: tower.name for tower in TOWERS if layout in tower.forms}


def form_named(config: Mapping[str, Any], layout: str) -> Form:
  """The form of the tower that a `vision_config` of the layout is of.

  Raises:
    UserError: a tower that is not in the registry.
  """
  forms = {tower.forms[layout].model_type: tower.forms[layout] for tower in TOWERS if layout in tower.forms}
  name = config.get("model_type", next(iter(forms)))
  if not isinstance(name, str) or name not in forms:
    raise UserError(
      f"config.json: vision_config.model_type={shown(name)} is not supported; known: {sorted(forms)}"
    )
  return forms[name]


def form_of(config: VisionConfig, layout: str) -> Form:
  """The form that a layout of that name has for a tower.

  Raises:
    UserError: it has none.
  """
  tower = next(tower for tower in TOWERS if tower.config is type(config))
  if layout not in tower.forms:
    other = next(iter(tower.forms))
    raise UserError(f"the {layout} layout has no form for {tower.name}; write the {other} layout")
  return tower.forms[layout]
