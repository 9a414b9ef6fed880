"""InternVL3.5-Flash in checkpoints: its entries of config.json, its tensors, and what is refused.

Only the internvl layout has a form: transformers knows no Flash.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Any

from internvl_jax.errors import UserError
from internvl_jax.hf.files import shown
from internvl_jax.hf.weights import Checkpoint, misfits
from internvl_jax.models.checkpoint_names import TRANSPOSE, Row, linear, norm, row
from internvl_jax.models.flash import HEADS, PARTS, FlashConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.trees import submodule_of

NAME = "InternVL3.5-Flash"

_THRESHOLDS = {
  "flash_relative_threshold": "relative_threshold",
  "flash_absolute_threshold": "absolute_threshold",
}


def _attention(path: str) -> list[Row]:
  """Rows of one of torch's MultiheadAttention, which names its first projection in its own way."""
  return [
    row(f"{path}.in_proj.kernel", f"{path}.in_proj_weight", TRANSPOSE),
    row(f"{path}.in_proj.bias", f"{path}.in_proj_bias"),
    *linear(f"{path}.out_proj"),
  ]


def _block(path: str) -> list[Row]:
  return [
    *linear(f"{path}.linear_1", f"{path}.0"),
    *linear(f"{path}.linear_2", f"{path}.3"),
    *norm(f"{path}.layer_norm", f"{path}.5"),
  ]


_POOLING = "pooling_before_gating"

TABLE: list[Row] = [
  *norm("mlp2.layer_norm", "mlp2.0"),
  *linear("mlp2.linear_1", "mlp2.1"),
  *linear("mlp2.linear_2", "mlp2.4"),
  *linear("mlp2.linear_3", "mlp2.7"),
  row(f"{_POOLING}.query_token", f"{_POOLING}.query_token"),
  *(line for number in range(1, 5) for line in _attention(f"{_POOLING}.attn{number}")),
  *(line for number in range(1, 5) for line in norm(f"{_POOLING}.norm{number}")),
  *(line for number in range(1, 5) for line in _block(f"gating.block{number}")),
  *norm("gating.gate.layer_norm", "gating.gate.0"),
  *linear("gating.gate.linear", "gating.gate.1"),
]
"""Names of the tensors that a Flash has beside those of every InternVL, in the internvl layout."""


def read(config: Mapping[str, Any]) -> FlashConfig | None:
  """The router that a config.json of the internvl layout describes; None for a model without.

  Raises:
    UserError: thresholds are missing, or are there without the router.
  """
  if not config.get("flash_mode"):
    if stated := [name for name in _THRESHOLDS if config.get(name) is not None]:
      raise UserError(
        f"config.json: {stated[0]}={shown(config[stated[0]])} without flash_mode; set flash_mode to true if this is an "
        f"{NAME}, or delete the entry"
      )
    return None
  if missing := [name for name in _THRESHOLDS if config.get(name) is None]:
    raise UserError(
      f"config.json: flash_mode is true ({NAME}), but the entry {missing[0]} is missing; add it (published models have 0.1 "
      "to 0.5)"
    )
  return FlashConfig(**{ours: float(config[name]) for name, ours in _THRESHOLDS.items()})


def written(model: InternVLConfig) -> dict[str, Any]:
  """Its entries of config.json; none for a model without."""
  flash = model.flash
  if flash is None:
    return {}
  return {"flash_mode": True, **{name: getattr(flash, ours) for name, ours in _THRESHOLDS.items()}}


def table(model: InternVLConfig, layout: str) -> list[Row]:
  """Names of its tensors in a layout; none for a model without a router.

  Raises:
    UserError: the layout has no form for it.
  """
  if model.flash is None:
    return []
  if layout != "internvl":
    raise UserError(
      f"the hf layout has no form for {NAME}, which transformers does not know; write the internvl layout"
    )
  return TABLE


def check_is_none(config: Mapping[str, Any]) -> None:
  """Refuses a config.json of the hf layout that says it is a Flash.

  Raises:
    UserError: it does.
  """
  if read(config) is not None:
    raise UserError(
      f"config.json says flash_mode=True ({NAME}) in the hf layout, of which no Flash is published; take the checkpoint in "
      "the internvl layout"
    )


def check_sizes(model: InternVLConfig) -> None:
  """Refuses a ViT that the router of a Flash cannot be put behind; one without a router is not looked at.

  Raises:
    UserError: its width or the selected layer do not suit.
  """
  if model.flash is None:
    return
  width, depth = model.vision.hidden_size, model.vision.num_layers
  if width % HEADS:
    raise UserError(
      f"config.json: vision_config.hidden_size={width} does not divide into the {HEADS} heads of {NAME}'s pooling"
    )
  if model.vision.layers_run(model.select_layer) != depth:
    raise UserError(
      f"the ViT's layer {model.select_layer} is selected (select_layer, model.vision_select_layer), but {NAME} reads the "
      "last one; set it to -1"
    )


def check_tensors(checkpoint: Checkpoint, model: InternVLConfig) -> None:
  """Refuses tensors of a Flash whose config.json says that it is none.

  Raises:
    UserError: it names one of them.
  """
  found = [name for name in checkpoint.shapes if submodule_of(name.removeprefix("model.")) in PARTS]
  if found and model.flash is None:
    raise UserError(
      f"{checkpoint.where[found[0]]}: holds the tensor {checkpoint.key(found[0])} of an {NAME}, but config.json does not "
      "describe one (flash_mode, flash_relative_threshold and flash_absolute_threshold in the internvl layout); take "
      "config.json and weights of one model"
    )


def check_fit(
  checkpoint: Checkpoint, table: Sequence[Row], shapes: Mapping[str, Any], fresh: Set[str]
) -> None:
  """Refuses tensors that are not those of the router which config.json describes, in one line.

  Args:
    checkpoint: the tensors.
    table: their names.
    shapes: shapes of the model's parameters, by path.
    fresh: paths of parameters that it need not hold.

  Raises:
    UserError: it names the first that does not fit.
  """
  wanted = {path: leaf for path, leaf in shapes.items() if submodule_of(path) in PARTS and path not in fresh}
  names = [name for name in checkpoint.shapes if submodule_of(name) in PARTS]
  if problems := misfits(checkpoint, table, wanted, names):
    more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
    raise UserError(
      f"{checkpoint.place}: config.json describes an {NAME} (flash_mode), but its router's tensors do not fit: "
      f"{problems[0]}{more}; take config.json and weights of one model"
    )
