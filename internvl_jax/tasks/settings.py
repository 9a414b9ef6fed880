"""What tasks say of their own settings, read before anything heavy: their values, what they contradict, where they are idle.

A task with settings has a module `settings` with a `SETTINGS`, an instance of `TaskSettings`.
"""

import dataclasses
import functools
import importlib
import importlib.util
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from internvl_jax import allowed_values, unused_settings
from internvl_jax.allowed_values import Range
from internvl_jax.config import TrainConfig
from internvl_jax.tasks import TASKS
from internvl_jax.unused_settings import Rules


def _no_problems(config: TrainConfig) -> Iterator[str]:
  del config
  return iter(())


def _nothing_set(program: str, values: Mapping[str, Any], others: Collection[str]) -> Mapping[str, Any]:
  del program, values, others
  return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
  """Held-out samples that a task scores.

  Attributes:
    setting: the field that names their meta file.
    hint: what a remedy says of it, to follow "name a jsonl there (".
    metrics: what is measured of them, as far as messages name it.
    prefixes: what the names of all their metrics begin with.
  """

  setting: str
  hint: str
  metrics: tuple[str, ...]
  prefixes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSettings:
  """What a task says of its settings.

  Attributes:
    ranges: of its numeric fields.
    rules: when fields have no effect.
    problems: what of a config contradicts itself, a line each.
    folders: fields that name folders to write to.
    checkpoints: fields that name checkpoints that are read, as model.model_name_or_path does.
    held_out: what it scores; None for nothing.
    files: names of the files that it writes at the root of the output directory.
    set_by_program: what the reference's program for it sets by itself, by paths: of the program's name, the values that it
      was given, and the names of arguments that no field has; empty of another program.
  """

  ranges: Mapping[str, Range] = dataclasses.field(default_factory=dict)
  rules: Rules = dataclasses.field(default_factory=Rules)
  problems: Callable[[TrainConfig], Iterator[str]] = _no_problems
  folders: tuple[str, ...] = ()
  checkpoints: tuple[str, ...] = ()
  held_out: HeldOut | None = None
  files: tuple[str, ...] = ()
  set_by_program: Callable[[str, Mapping[str, Any], Collection[str]], Mapping[str, Any]] = _nothing_set


@functools.cache
def of_tasks(packages: tuple[str, ...] = TASKS) -> tuple[TaskSettings, ...]:
  """The settings of all tasks that have some."""
  modules = [f"{package}.settings" for package in packages]
  return tuple(importlib.import_module(name).SETTINGS for name in modules if importlib.util.find_spec(name))


def ranges() -> dict[str, Range]:
  """The range of every numeric field, those of tasks among them."""
  return functools.reduce(operator.or_, (dict(own.ranges) for own in of_tasks()), allowed_values.RANGES)


def rules() -> Rules:
  """When fields have no effect, by what all tasks say."""
  return functools.reduce(operator.or_, (own.rules for own in of_tasks()), unused_settings.RULES)


def set_by_program(program: str, values: Mapping[str, Any], others: Collection[str]) -> dict[str, Any]:
  """What a training program of the reference sets by itself, by paths; see `TaskSettings`."""
  sets = (dict(own.set_by_program(program, values, others)) for own in of_tasks())
  return functools.reduce(operator.or_, sets, {})


def held_out(config: TrainConfig) -> Iterator[tuple[HeldOut, str | None]]:
  """What tasks may score, and the meta file that a config names for each."""
  for own in of_tasks():
    if own.held_out is not None:
      leaf, _, name = own.held_out.setting.partition(".")
      yield own.held_out, getattr(getattr(config, leaf), name)
