"""The whole configuration: the tree of the leaves that `internvl_jax.arguments` and `internvl_jax.task_arguments` define.

`internvl_jax.config_checks` says what it must not hold; `internvl_jax.cli` reads it from a recipe and from flags.
"""

import dataclasses
import json
import types
import typing
from typing import Any, Literal

from internvl_jax.arguments import (
  CheckpointConfig,
  DataTrainingArguments,
  EvalConfig,
  LoaderConfig,
  LoRAConfig,
  MeshConfig,
  ModelArguments,
  RuntimeConfig,
  TrainingArguments,
)
from internvl_jax.errors import redacted_json
from internvl_jax.task_arguments import DistillationConfig, FlashTrainingConfig, GrpoConfig, PreferenceConfig


@dataclasses.dataclass(kw_only=True, slots=True)
class TrainConfig:
  """Everything that a run depends on; a recipe returns one, flags override its fields.

  Slots make a misspelt field in a recipe an error. It is mutable because flags write to it, and read only by
  convention once `validate` has passed.
  """

  model: ModelArguments = dataclasses.field(default_factory=ModelArguments)
  data: DataTrainingArguments = dataclasses.field(default_factory=DataTrainingArguments)
  training: TrainingArguments = dataclasses.field(default_factory=TrainingArguments)
  preference: PreferenceConfig = dataclasses.field(default_factory=PreferenceConfig)
  grpo: GrpoConfig = dataclasses.field(default_factory=GrpoConfig)
  distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)
  flash: FlashTrainingConfig = dataclasses.field(default_factory=FlashTrainingConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
  loader: LoaderConfig = dataclasses.field(default_factory=LoaderConfig)
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
  runtime: RuntimeConfig = dataclasses.field(default_factory=RuntimeConfig)


LEAVES: dict[str, type] = {
  leaf.name: typing.cast(type, leaf.type) for leaf in dataclasses.fields(TrainConfig)
}
"""The leaf classes by their name in the tree."""

OF_THE_REFERENCE = ("model", "data", "training", "preference")
"""The leaves whose fields are arguments of the reference's programs, under the same names."""

FIELDS: dict[str, dataclasses.Field] = {
  f"{name}.{field.name}": field for name, leaf in LEAVES.items() for field in dataclasses.fields(leaf)
}
"""Every field by its path, e.g. "model.freeze_llm"; a field's type and default are its `.type`, `.default`."""


def get(config: TrainConfig, path: str) -> Any:
  """The value at a path such as "model.freeze_llm"."""
  leaf, name = path.split(".")
  return getattr(getattr(config, leaf), name)


def to_json(config: TrainConfig) -> dict[str, dict[str, Any]]:
  """The tree as plain dicts, with nothing but what JSON has (tuples become lists), and without secrets of URLs."""
  return redacted_json(json.loads(json.dumps(dataclasses.asdict(config))))


def shared_settings(config: TrainConfig) -> dict[str, Any]:
  """The values that all hosts of a run must have, by path, as in `to_json`: all but those of `PER_HOST`."""
  leaves = to_json(config)
  shared = (path.split(".") for path in FIELDS if path not in PER_HOST)
  return {f"{leaf}.{name}": leaves[leaf][name] for leaf, name in shared}


PER_HOST: dict[str, str] = {
  "loader.cache_dir": "what a cache holds is made of the data, wherever that is stored",
  "runtime.compilation_cache_dir": "programs are the same, wherever they are kept",
  "runtime.distributed": "it may say which of the processes this one is",
  "runtime.hang_seconds": "it tells, and changes nothing",
  "training.disable_tqdm": "it tells, and changes nothing",
  "training.logging_dir": "the first process alone writes there",
  "training.dataloader_num_workers": "batches do not depend on it, and hosts may have other numbers of cores",
  "loader.prefetch": "batches do not depend on it",
}
"""Field -> why hosts of one run may differ in it; in all others they must not."""


def type_name(annotation: Any) -> str:
  """A field's type in words: "int", "float or None", "'v1' or 'v2'", "tuple of int"."""
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if origin is Literal:
    return " or ".join(repr(value) for value in args)
  if origin in (typing.Union, types.UnionType):
    return " or ".join(type_name(arg) for arg in args)
  if origin is tuple:
    return f"tuple of {type_name(args[0])}"
  return "None" if annotation is type(None) else annotation.__name__


def is_changed(config: TrainConfig, path: str) -> bool:
  """Whether the value at a path differs from the default."""
  return get(config, path) != FIELDS[path].default


def setting_text(config: TrainConfig, path: str) -> str:
  """A field and its value, as messages name them: "model.freeze_llm=True"."""
  return f"{path}={get(config, path)!r}"
