"""Finds the published recipe from which a configuration differs least."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

from internvl_jax.config import FIELDS, OF_THE_REFERENCE, TrainConfig, get
from internvl_jax.recipe_files import load_module, load_recipe, recipe_folder, recipe_names
from internvl_jax.tasks import package_for

LAUNCH = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps")
"""Fields that follow from the devices and the batch, which a recipe's argument sets."""

OURS = ("training.deepspeed", "training.overwrite_output_dir")
"""Fields that scripts set and recipes leave, see `internvl_jax.recipes`."""

COMPARED = tuple(
  path for path in FIELDS if path.partition(".")[0] in OF_THE_REFERENCE and path not in (*LAUNCH, *OURS)
)
"""The fields by which scripts and recipes are compared."""

_STAGE1 = "work_dirs/internvl_chat_v1_5/internvl_chat_v1_5_{}_dynamic_res_pretrain"

SLIPS: dict[str, tuple[str, str]] = {
  # Other folders than those where the next stage's script looks.
  "internvl1_5/stage1:2b": ("training.output_dir", _STAGE1.format("internlm2_1_8b")),
  "internvl1_5/stage1:4b": ("training.output_dir", _STAGE1.format("phi3_3_8b")),
  "internvl1_5/stage1:26b": ("training.output_dir", _STAGE1.format("internlm2_20b")),
  "internvl1_5/stage1:40b": ("training.output_dir", _STAGE1.format("hermes2_yi34b")),
  "internvl3_5/sft:20b": (
    "training.output_dir",
    "work_dirs/internvl3_5_gpt_oss_20b_sft/internvl3_5_gpt_oss_20b_stage2_sft",
  ),
  # The folder that the run itself writes.
  "internvl1_5/stage2:4b": (
    "model.model_name_or_path",
    "./work_dirs/internvl_chat_v1_5_phi3_3_8b_dynamic_res_finetune",
  ),
  # The name of the LoRA run's folder.
  "internvl2_5/finetune:26b": (
    "training.output_dir",
    "work_dirs/internvl_chat_v2_5/internvl2_5_26b_dynamic_res_2nd_finetune_lora",
  ),
}
"""Recipe -> a field, and what its published script says there by mistake."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Published:
  """A published recipe.

  Attributes:
    spec: "internvl2_5/finetune:8b,lora".
    config: what it says.
  """

  spec: str
  config: TrainConfig

  @property
  def size(self) -> str:
    """Of its model: "8b"."""
    return self.spec.partition(":")[2].partition(",")[0]


@functools.cache
def published_recipes() -> tuple[Published, ...]:
  """All recipes of the published scripts, with their sizes and variants; recipes of our own are not among them."""
  found = []
  for name in recipe_names():
    module = load_module(str(recipe_folder() / f"{name}.py"))
    for choice in getattr(module, "CHOICES", ()):
      spec = f"{name}:{choice}"
      config = load_recipe(spec)
      if getattr(package_for(config), "HAS_SCRIPTS", False):
        found.append(Published(spec=spec, config=config))
  return tuple(found)


def nearest(values: Mapping[str, Any]) -> Published:
  """The recipe that has the fewest other values, of those of the same task and of a model of the same size.

  Args:
    values: of fields, by their paths; all others have their defaults.
  """
  asked = TrainConfig()
  for path, value in values.items():
    put(asked, path, value)
  sizes = {recipe.size for recipe in published_recipes()}
  size = _size_of(asked.model.model_name_or_path)
  generation = _generation_of(asked.model.model_name_or_path)

  def distance(recipe: Published) -> tuple[bool, bool, int, bool]:
    return (
      package_for(recipe.config) != package_for(asked),
      size in sizes and size != recipe.size,
      len(differing(values, recipe.config)),
      generation != _generation_of(recipe.config.model.model_name_or_path),
    )

  return min(published_recipes(), key=distance)


def put(config: TrainConfig, path: str, value: Any) -> None:
  """Sets the field at a path such as "model.freeze_llm"."""
  leaf, name = path.split(".")
  setattr(getattr(config, leaf), name, value)


def slips_of(spec: str, values: Mapping[str, Any]) -> dict[str, Any]:
  """The mistakes of a recipe's published script that `values` repeat: their paths and values."""
  path, value = SLIPS.get(spec, ("", None))
  return {path: value} if path in values and values[path] == value else {}


def differing(values: Mapping[str, Any], config: TrainConfig) -> list[str]:
  """The paths of `COMPARED` at which a configuration has another value than `values`, or than the default."""
  return [path for path in COMPARED if get(config, path) != values.get(path, FIELDS[path].default)]


def _size_of(model: str | None) -> str:
  """The size that a checkpoint's name tells, as recipes write it: "8b"; empty if it tells none."""
  found = re.search(r"(?<![\dA-Za-z.])(?<!\d_)(\d+)[bB](?![A-Za-z])", (model or "").rstrip("/"))
  return f"{found[1]}b" if found else ""


def _generation_of(model: str | None) -> str:
  """The generation that a checkpoint's name tells: "2_5"; empty if it tells none."""
  found = re.search(r"[iI]ntern[vV][lL](\d(?:[_.]\d)?)(?!\d)", model or "")
  return re.sub(r"\W", "_", found[1]) if found else ""
