"""Ways to learn: a package each, and a line each in `TASKS`.

A package has `is_asked_for(config)` and `CONVERSATIONS`, how many conversations a line becomes, both without anything
heavy, maybe `VARIANTS` of the planned recipe, `longest_sample(config)` where its rows are longer than its lines, and `other_kind()`, which explains its lines to another task, and a module `task` with `open_task(config, source)`, which returns a `tasks.task.Task`.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from internvl_jax.config import TrainConfig

if TYPE_CHECKING:
  from internvl_jax.data.sample.line_keys import OtherKind

TASKS: tuple[str, ...] = (
  "internvl_jax.tasks.distillation",
  "internvl_jax.tasks.grpo",
  "internvl_jax.tasks.vico",
  "internvl_jax.tasks.preference",
  "internvl_jax.tasks.sft",
)
"""The packages; a config asks for the first that says so."""


def package_for(config: TrainConfig) -> ModuleType:
  """The package of the way to learn that a config asks for."""
  return next(package for package in map(importlib.import_module, TASKS) if package.is_asked_for(config))


def variants() -> dict[str, Callable[[TrainConfig], None]]:
  """Variants of the recipe that is planned for, by name: what makes a config of fine-tuning one of another task."""
  packages = map(importlib.import_module, TASKS)
  return {name: vary for package in packages for name, vary in getattr(package, "VARIANTS", {}).items()}


def other_kinds() -> "tuple[OtherKind, ...]":
  """Kinds of line of the tasks that are asked for by a setting, as the default task explains them where it meets them."""
  packages = map(importlib.import_module, TASKS)
  return tuple(package.other_kind() for package in packages if hasattr(package, "other_kind"))


def conversations_a_line(config: TrainConfig) -> int:
  """How many conversations a line of the data becomes, which share one row."""
  return package_for(config).CONVERSATIONS


def longest_sample(config: TrainConfig) -> int:
  """The most tokens of a row that is learned from, where rows are not packed: all that a line becomes."""
  package = package_for(config)
  if hasattr(package, "longest_sample"):
    return package.longest_sample(config)
  return config.data.max_seq_length * package.CONVERSATIONS


def open_task(config: TrainConfig, source: Any) -> Any:
  """The way to learn that a config asks for.

  Args:
    config: the run's.
    source: the model (`hf.model.Source`), whose weights need not be there.

  Returns:
    A `tasks.task.Task`.
  """
  return importlib.import_module(f"{package_for(config).__name__}.task").open_task(config, source)
