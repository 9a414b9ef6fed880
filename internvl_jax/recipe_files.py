"""Finds recipes by name or path and runs them.

A recipe is a Python file with `get_config(arg: str = "") -> TrainConfig`. Those of the repository's `configs/` come with the
package, and are found by their names from any folder: "internvl2_5/finetune" is configs/internvl2_5/finetune.py.

    config = load_recipe("internvl2_5/finetune:8b,lora")
    config = load_recipe("my_recipe.py")
"""

import difflib
import importlib.util
import inspect
import os
import re
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path

from internvl_jax.config import FIELDS, LEAVES, TrainConfig
from internvl_jax.errors import UserError, suggest
from internvl_jax.foreign import FOREIGN, SAME_AS

FLAG = "config"
"""Name of the flag that takes a recipe."""

SCRIPT_SUFFIXES = (".sh", ".bash", ".sbatch", ".slurm")
"""Ends of the names of launch scripts."""

_PACKAGE = Path(__file__).parent


def recipe_folder() -> Path:
  """The folder of the recipes that come with the package: in it, or of a checkout beside it."""
  packed = _PACKAGE / "configs"
  return packed if packed.is_dir() else _PACKAGE.parent / "configs"


def recipe_names() -> list[str]:
  """The recipes that come with the package, as "internvl2_5/finetune"."""
  folder = recipe_folder()
  return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.py"))


def find_recipe(name: str) -> str:
  """The path of a recipe.

  Args:
    name: of a recipe that comes with the package, or the path of a file, which ends in ".py".

  Raises:
    UserError: there is none.
  """
  if name.endswith(SCRIPT_SUFFIXES):
    raise UserError(
      f"--{FLAG}={name}: is a launch script; `python -m internvl_jax.from_script {name}` makes a recipe of it"
    )
  if name.endswith(".py") or os.path.isfile(name):
    if os.path.isfile(name):
      return name
    stem = name.removesuffix(".py").removeprefix("configs/")
    hint = f"; the package's own is named without folder and suffix: {stem}" if stem in recipe_names() else ""
    raise UserError(f"--{FLAG}={name}: no such recipe file{hint}")
  if name in recipe_names():
    return str(recipe_folder() / f"{name}.py")
  near = difflib.get_close_matches(name, recipe_names(), n=3)
  known = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(recipe_names())}"
  raise UserError(f"--{FLAG}={name}: no such recipe; {known} (a file's name ends in .py)")


def explain_unknown(path: str) -> str:
  """Says, in a line, that no field has this path, and which one is probably meant."""
  flag, name = f"--{FLAG}.{path}", path.rpartition(".")[2]
  if path in LEAVES:
    example = next(field for field in FIELDS if field.startswith(f"{path}."))
    return f"{flag} is a group of fields; set one of them, e.g. --{FLAG}.{example}=..."
  if name in FOREIGN:
    return f"{flag}: there is no such field; {FOREIGN[name]}"
  if name in SAME_AS:
    return f"{flag}: there is no such field; {SAME_AS[name]} is its name here"
  elsewhere = [field for field in FIELDS if field.rpartition(".")[2] == name]
  close = difflib.get_close_matches(name, [field.rpartition(".")[2] for field in FIELDS], n=1, cutoff=0.75)
  elsewhere += [field for field in FIELDS if close and field.rpartition(".")[2] == close[0]]
  hint = f"; did you mean {elsewhere[0]}?" if elsewhere else ""
  return f"{flag}: there is no such field{hint}"


def load_recipe(spec: str) -> TrainConfig:
  """Runs a recipe and returns its configuration.

  Args:
    spec: "NAME" or "FILE.py", and its argument after a colon: "internvl2_5/finetune:8b,lora".

  Raises:
    UserError: There is no such recipe, it has no usable `get_config`, it sets a field that there is not, or it
      refuses its argument.
  """
  name, *arg = spec.split(":", 1)
  path = find_recipe(name)
  get_config = getattr(load_module(path), "get_config", None)
  if not callable(get_config):
    raise UserError(f"--{FLAG}={spec}: {path} has no function get_config(arg: str = '') -> TrainConfig")
  _check_arity(get_config, spec, arg)
  try:
    config = get_config(*arg)
  except (AttributeError, TypeError) as error:
    raise _explain_recipe_error(error) from error
  if not isinstance(config, TrainConfig):
    raise UserError(
      f"--{FLAG}={spec}: get_config returned {type(config).__name__}; it must return a TrainConfig"
    )
  return config


def load_module(path: str) -> types.ModuleType:
  """Executes a recipe file and returns its module.

  Raises:
    UserError: it is no Python file, does not parse, lacks an import, or sets a field that there is not.
  """
  spec = importlib.util.spec_from_file_location("_recipe", path)
  if spec is None or spec.loader is None:
    raise UserError(f"--{FLAG}={path}: a recipe is a Python file, so its name must end in .py")
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # Dataclasses look their own module up.
  try:
    spec.loader.exec_module(module)
  except (AttributeError, TypeError) as error:
    raise _explain_recipe_error(error) from error
  except SyntaxError as error:
    where = f"{os.path.relpath(error.filename or path)}:{error.lineno}"
    raise UserError(f"--{FLAG}={path}: {where}: {error.msg}") from error
  except ImportError as error:
    frame = next(
      f for f in reversed(traceback.extract_tb(error.__traceback__)) if "importlib" not in f.filename
    )
    raise UserError(
      f"--{FLAG}={path}: {os.path.relpath(frame.filename)}:{frame.lineno}: {error}; install it, or name its folder in "
      "PYTHONPATH (a recipe that starts from a published one loads that: docs/training.md)"
    ) from error
  return module


def _check_arity(get_config: Callable, spec: str, arg: list[str]) -> None:
  try:
    inspect.signature(get_config).bind(*arg)
  except TypeError:
    remedy = "leave out what follows the colon" if arg else "write FILE.py:ARG"
    given = f"the argument {arg[0]!r}" if arg else "no argument"
    raise UserError(f"--{FLAG}={spec}: its get_config does not take {given}; {remedy}") from None


def _explain_recipe_error(error: AttributeError | TypeError) -> Exception:
  """A `UserError` if the recipe named a field that a leaf has not; else a bug in the recipe, traceback kept."""
  text = str(error)
  match = re.match(r"'(\w+)' object has no attribute '(\w+)'", text) or re.match(
    r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text
  )
  classes = {leaf.__name__: name for name, leaf in LEAVES.items()}
  owner, field = match.groups() if match else ("", "")
  frame = traceback.extract_tb(error.__traceback__)[-1]
  where = f"{os.path.relpath(frame.filename)}:{frame.lineno}"
  if owner in classes:
    return UserError(f"{where}: {explain_unknown(f'{classes[owner]}.{field}').removeprefix(f'--{FLAG}.')}")
  if owner == TrainConfig.__name__:
    return UserError(f"{where}: TrainConfig has no group {field!r}{suggest(field, LEAVES)}")
  # absl would take a TypeError for a wrong flag value and drop its traceback.
  return RuntimeError(f"the recipe failed at {where}")
