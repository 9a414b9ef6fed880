"""Turns a launch into a recipe: the nearest published one, and what the script says differently."""

import dataclasses
import json
import os
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from internvl_jax.config import FIELDS, TrainConfig, get
from internvl_jax.config_checks import value_problems
from internvl_jax.errors import UserError, redacted
from internvl_jax.from_script.launches import Launch
from internvl_jax.nearest_recipe import LAUNCH, differing, nearest, put, slips_of
from internvl_jax.recipe_files import load_recipe
from internvl_jax.reference_arguments import Arguments, left_out_of
from internvl_jax.tasks import settings as task_settings

_WIDTH = 106


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
  """A recipe that says what a script says.

  Attributes:
    base: the published recipe, "internvl2_5/finetune:8b,lora".
    numbers: of its argument: "devices=4,batch=64"; empty if the script's are those of the recipe, None if they are
      among the settings.
    settings: path -> value that differs from the base.
    config: what the recipe says, of which `base_config` is what the base says.
    left_out: "--name value" -> why no field has it; what changes nothing that is learned.
    lost: the same of what would change what is learned, or left.
    remarks: what else is to be known.
  """

  base: str
  numbers: str | None
  settings: dict[str, Any]
  config: TrainConfig
  base_config: TrainConfig
  left_out: dict[str, str]
  lost: dict[str, str]
  remarks: list[str]


def make_recipe(launch: Launch, arguments: Arguments) -> Recipe:
  """The recipe of a launch.

  Args:
    launch: of the script.
    arguments: its program's, without problems.

  Raises:
    UserError: the settings contradict each other, or the batch is none.
  """
  values, remarks = {**arguments.values}, []
  remarks += _set_by_program(launch, values, arguments)
  base = nearest(values)
  for path, slip in slips_of(base.spec, values).items():
    values[path] = get(base.config, path)
    remarks.append(
      f"{path}={slip!r} is a slip of the published script; the recipe's {values[path]!r} is taken"
    )
  config, numbers = _with_batch(base.spec, launch, values)
  settings = {path: values.get(path, FIELDS[path].default) for path in differing(values, base.config)}
  if numbers is None:
    settings |= {path: values.get(path, FIELDS[path].default) for path in LAUNCH}
    settings |= {"mesh.sequence": 1, "mesh.fsdp": launch.devices or -1}
  for path, value in settings.items():
    put(config, path, value)
  lost = _drop_refused(config, base.config, settings, remarks)
  left_out, lost_too = left_out_of(arguments)
  return Recipe(
    base=base.spec,
    numbers=numbers,
    settings=settings,
    config=config,
    base_config=base.config,
    left_out=left_out,
    lost=lost | lost_too,
    remarks=remarks,
  )


def _set_by_program(launch: Launch, values: dict[str, Any], arguments: Arguments) -> list[str]:
  """Adds what the program sets by itself; returns what is to be said of it."""
  others = {argument.name for argument in arguments.foreign}
  added = task_settings.set_by_program(launch.program, values, others)
  values |= added
  words = ", ".join(f"{path}={value!r}" for path, value in added.items())
  return [f"{launch.program} sets by itself: {words}"] if added else []


# --- The batch ----------------------------------------------------------------------------------------------


def rows_of(config: TrainConfig, devices: int) -> int:
  """The rows of an optimizer step on so many devices."""
  training = config.training
  rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * devices
  return rows // config.mesh.sequence


def _with_batch(base: str, launch: Launch, values: dict[str, Any]) -> tuple[TrainConfig, str | None]:
  """The base with the launch's batch on its devices, and the numbers that do that; None if numbers cannot."""
  per_device, steps = (values.get(path, FIELDS[path].default) for path in LAUNCH)
  if per_device < 1 or steps < 1:
    raise UserError(
      f"--per_device_train_batch_size {per_device} and --gradient_accumulation_steps {steps} make no batch; where the "
      "script computes them, BATCH_SIZE must be at least PER_DEVICE_BATCH_SIZE times GPUS"
    )
  config, devices = load_recipe(base), launch.devices
  if devices is None:
    same = _batch_of(config) == (per_device, steps * config.mesh.sequence)
    return config, "" if same else None
  pinned, rows = f"devices={devices}", per_device * steps * devices
  for numbers in (
    pinned,
    f"{pinned},per_device={per_device}",
    f"{pinned},batch={rows}",
    f"{pinned},per_device={per_device},batch={rows}",
  ):
    try:
      tried = load_recipe(f"{base},{numbers}")
    except UserError:  # It does not divide.
      continue
    if tried.training.per_device_train_batch_size == per_device and rows_of(tried, devices) == rows:
      is_the_scripts = numbers == pinned and _batch_of(tried) == _batch_of(config)
      return (config, "") if is_the_scripts else (tried, numbers)
  return config, None


def _batch_of(config: TrainConfig) -> tuple[int, int]:
  return config.training.per_device_train_batch_size, config.training.gradient_accumulation_steps


# --- What has no field --------------------------------------------------------------------------------------

_REFUSED = re.compile(r"(\w+\.\w+)=.* (?:is not supported|must be one of|is no tracker)\b")
_INSTALLED_LATER = "which is not installed"


def _drop_refused(
  config: TrainConfig, base: TrainConfig, settings: dict[str, Any], remarks: list[str]
) -> dict[str, str]:
  """Takes values that no run here can have back to the base's; returns them with the reasons.

  What has to be installed before the run is added to `remarks`.

  Raises:
    UserError: settings contradict each other.
  """
  lost = {}
  for line in value_problems(config):
    path = found[1] if (found := _REFUSED.match(line)) else ""
    if path in settings:
      lost[f"--{path.partition('.')[2]} {settings.pop(path)}"] = f"{line}; left at {get(base, path)!r}"
      put(config, path, get(base, path))
  remaining = value_problems(config)
  remarks += [line for line in remaining if _INSTALLED_LATER in line]
  if remaining := [line for line in remaining if _INSTALLED_LATER not in line]:
    raise UserError("\n".join(remaining))
  return lost


# --- Texts --------------------------------------------------------------------------------------------------


def recipe_text(recipe: Recipe, launch: Launch, *, script: str, file: str) -> str:
  """The recipe as a file of Python.

  Args:
    recipe: what it says.
    launch: what it was made of.
    script: its path.
    file: where it is to be.
  """
  base = f"{recipe.base},{recipe.numbers}" if recipe.numbers else recipe.base
  signature, about, load = (
    'arg: str = ""',
    "; `arg` may be devices=N, batch=N and per_device=N",
    'f"{BASE},{arg}"',
  )
  if recipe.numbers is None:
    signature, about, load = "", "", "BASE"
  return "\n".join(
    [
      *_docstring(recipe, launch, script=script, file=file),
      "",
      "from internvl_jax.config import TrainConfig",
      "from internvl_jax.recipe_files import load_recipe",
      "",
      f'BASE = "{base}"',
      "",
      "",
      f"def get_config({signature}) -> TrainConfig:",
      f'  """The recipe{about}."""',
      f"  config = load_recipe({load})",
      *(f"  config.{path} = {_literal(value)}" for path, value in recipe.settings.items()),
      "  return config",
      "",
    ]
  )


def _literal(value: Any) -> str:
  return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _docstring(recipe: Recipe, launch: Launch, *, script: str, file: str) -> list[str]:
  lines = [
    f"Trains what {os.path.basename(script)} trains: the recipe {recipe.base}, and what the script says differently.",
    "",
    *_wrapped(f"The script starts {launch.program} by {launch.launcher}, {batch_text(recipe, launch)}."),
    "",
    f"  python -m internvl_jax.train --config {file}",
  ]
  if recipe.numbers is not None:
    lines += ["", f"{file}:devices=N keeps the batch on N devices."]
  if recipe.lost:
    lines += ["", "What the script asks and this recipe does not:", *_listed(recipe.lost)]
  text = "\n".join(lines).replace("\\", "\\\\").replace('"', "'")
  return [f'"""{text}', '"""']


def batch_text(recipe: Recipe, launch: Launch) -> str:
  """The batch in words: "on 2 devices, 16 rows a step (4 a device, 2 micro-batches)"."""
  training, sharing = recipe.config.training, recipe.config.mesh.sequence
  each = "a device" if sharing == 1 else f"every {sharing} devices, which share rows"
  parts = (
    f"{training.per_device_train_batch_size} {each}, {training.gradient_accumulation_steps} micro-batches"
  )
  if launch.devices is None:
    return f"on as many devices as there are ({parts})"
  return f"on {launch.devices} devices, {rows_of(recipe.config, launch.devices)} rows a step ({parts})"


def report(recipe: Recipe) -> str:
  """What differs from the published recipe, and what has no field, for the terminal."""
  lines = [
    f"nearest published recipe: {recipe.base}, which differs in{'' if recipe.settings else ' nothing'}"
  ]
  for path, value in recipe.settings.items():
    lines.append(f"  {path} = {value!r}, there {get(recipe.base_config, path)!r}")
  if recipe.numbers:
    lines.append(f"numbers of the launch: {recipe.numbers}")
  if recipe.lost:
    lines += ["NOT carried over:", *_listed(recipe.lost)]
  if recipe.left_out:
    lines += ["left out, with no change of what is learned:", *_listed(recipe.left_out)]
  return redacted("\n".join([*lines, *recipe.remarks]))


def _listed(entries: Mapping[str, str]) -> list[str]:
  return [line for item in entries.items() for line in _wrapped(": ".join(item), "  ")]


def _wrapped(text: str, indent: str = "") -> list[str]:
  return textwrap.wrap(
    text, _WIDTH, initial_indent=indent, subsequent_indent=indent * 2, break_on_hyphens=False
  )
