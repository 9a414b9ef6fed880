"""The whole configuration: the tree of leaves, and the checks that come before anything heavy.

`TrainConfig` puts the leaves of `internvl_jax.arguments` together. `validate` refuses what cannot work, all of
it at once, from nothing but the configuration and the file system: no JAX, no network, no weights.

The rules are tables, a line a field:

    REFUSED    fields that will never do anything here, and why
    ACCEPTED   fields that are read from recipes and change nothing, and why
    CHOICES    strings with a fixed set of values        RANGES  the numbers' ranges
    PER_HOST   fields that hosts of a run may set each for itself, and why
    INSTEAD_OF other values of such strings, and what does their work

`internvl_jax.unused_settings` has those of settings that have no effect beside others, `internvl_jax.foreign` the arguments of
scripts that no field has.
"""

import dataclasses
import difflib
import functools
import json
import os
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal

from internvl_jax import unused_settings
from internvl_jax.allowed_values import CHOICES, INSTEAD_OF, RANGES, REFUSED
from internvl_jax.arguments import (
  PREFERENCE_LOSSES,
  CheckpointConfig,
  DataTrainingArguments,
  EvalConfig,
  LoaderConfig,
  LoRAConfig,
  MeshConfig,
  ModelArguments,
  PreferenceConfig,
  RuntimeConfig,
  TrainingArguments,
  parse_distributed,
  parse_xla_option,
)
from internvl_jax.errors import UserError, redacted_json
from internvl_jax.outputs import would_write_over
from internvl_jax.parallel import zero
from internvl_jax.storage.paths import is_bucket


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


# --- The rules, as data -------------------------------------------------------------------------------------

PER_HOST: dict[str, str] = {
  "loader.cache_dir": "what a cache holds is made of the data, wherever it lies",
  "runtime.compilation_cache_dir": "programs are the same, wherever they are kept",
  "runtime.distributed": "it may say which of the processes this one is",
  "runtime.hang_seconds": "it tells, and changes nothing",
  "training.disable_tqdm": "it tells, and changes nothing",
  "training.logging_dir": "the first process alone writes there",
  "training.dataloader_num_workers": "batches do not depend on it, and hosts may have other numbers of cores",
  "loader.prefetch": "batches do not depend on it",
}
"""Field -> why hosts of one run may differ in it; in all others they must not."""

Command = Literal["train", "plan", "doctor"]

REQUIRED: dict[Command, tuple[str, ...]] = {
  "train": ("model.model_name_or_path", "data.meta_path", "training.output_dir"),
  "plan": ("model.model_name_or_path",),
  "doctor": ("model.model_name_or_path", "data.meta_path"),
}
"""What each command reads or writes, so what must be set (and, if it is read, be there)."""

PARTS = ("model.vision_path", "model.llm_path")
"""Checkpoints that together take the place of model.model_name_or_path."""

ON_DISK: dict[str, str] = {
  "loader.cache_dir": "what it holds is mapped into memory; leave it out for a folder in the user's cache folder",
}
"""Field -> why it names a folder of this machine, and no bucket's."""

WRITTEN = ("training.logging_dir", "runtime.compilation_cache_dir")
"""Fields that name a folder to write to, of this machine or of a bucket."""

_NAMED = (
  *("model.model_name_or_path", *PARTS, "model.mlp_path", "data.meta_path", "eval.annotation", "eval.root"),
  *("preference.eval_meta_path", "preference.reference_cache_dir", "training.output_dir", *WRITTEN, *ON_DISK),
)
"""Fields that name files or folders."""

PROJECTOR_SUFFIXES = (".safetensors", ".pth", ".bin")
"""Forms of the file that model.mlp_path names."""


# --- Checking -----------------------------------------------------------------------------------------------


def validate(config: TrainConfig, command: Command = "train") -> None:
  """Raises one `UserError` with every problem of the configuration, a line each; reads, changes nothing."""
  found = problems(config, command)
  if len(found) == 1:
    raise UserError(found[0])
  if found:
    raise UserError("\n".join([f"{len(found)} problems in the configuration:", *found]))


def problems(config: TrainConfig, command: Command = "train") -> list[str]:
  """Every reason why `command` must not start with this configuration, one line each."""
  mistyped = list(_type_problems(config))
  if mistyped:  # The other checks calculate with the values.
    return mistyped
  checks: tuple[Callable[[TrainConfig], Iterator[str]], ...] = (
    _support_problems,
    _range_problems,
    _model_problems,
    _data_problems,
    _preference_problems,
    _schedule_problems,
    _evaluation_problems,
    _mesh_problems,
    _runtime_problems,
  )
  found = [line for check in checks for line in check(config)]
  return [*found, *_path_problems(config, command)]


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


def suggest(name: str, known: typing.Iterable[str]) -> str:
  """A message's tail that names the closest known name, or nothing if none is close."""
  close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
  return f"; did you mean {close[0]}?" if close else ""


def _is_a(value: Any, annotation: Any) -> bool:
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if origin is Literal:
    return value in args
  if origin in (typing.Union, types.UnionType):
    return any(_is_a(value, arg) for arg in args)
  if origin is tuple:
    return isinstance(value, tuple) and all(_is_a(entry, args[0]) for entry in value)
  if annotation is float:
    return isinstance(value, int | float) and not isinstance(value, bool)
  if annotation is int:
    return isinstance(value, int) and not isinstance(value, bool)
  return isinstance(value, annotation)


def _type_problems(config: TrainConfig) -> Iterator[str]:
  for name, leaf in LEAVES.items():
    if not isinstance(getattr(config, name), leaf):
      yield f"{name}={getattr(config, name)!r} must be a {leaf.__name__}"
      return
  for path, field in FIELDS.items():
    value = get(config, path)
    if not _is_a(value, field.type):
      yield f"{path}={value!r} must be {type_name(field.type)}"


def _changed(config: TrainConfig, path: str) -> bool:
  return get(config, path) != FIELDS[path].default


def _setting(config: TrainConfig, path: str) -> str:
  return f"{path}={get(config, path)!r}"


def _support_problems(config: TrainConfig) -> Iterator[str]:
  for path, reason in REFUSED.items():
    if _changed(config, path):
      yield f"{_setting(config, path)} is not supported: {reason}"
  for remark in _remarks(config):
    if remark.is_refused:
      yield remark.line


def idle_settings(config: TrainConfig) -> list[str]:
  """A line for each setting that asks for what will not happen, for the log; see `effects`."""
  return [remark.line for remark in _remarks(config) if not remark.is_refused]


def _remarks(config: TrainConfig) -> Iterator[unused_settings.Remark]:
  defaults = {path: field.default for path, field in FIELDS.items()}
  return unused_settings.remarks(functools.partial(get, config), defaults)


def _range_problems(config: TrainConfig) -> Iterator[str]:
  for path, allowed in RANGES.items():
    value = get(config, path)
    entries = value if isinstance(value, tuple) else (value,)
    if not all(entry is None or allowed.holds(entry) for entry in entries):
      yield f"{path}={value!r} must be {allowed}"
  for path, choices in CHOICES.items():
    if (value := get(config, path)) not in choices:
      instead = [words for form, words in INSTEAD_OF.get(path, {}).items() if re.fullmatch(form, value)]
      why = f"; {instead[0]}" if instead else suggest(value, choices)
      yield f"{path}={value!r} must be one of {', '.join(choices)}{why}"


def _model_problems(config: TrainConfig) -> Iterator[str]:
  parts = ("model.freeze_backbone", "model.freeze_mlp", "model.freeze_llm")
  thaw = (
    "model.unfreeze_vit_layers",
    "model.use_backbone_lora",
    "model.use_llm_lora",
    "model.unfreeze_lm_head",
  )
  if all(get(config, path) for path in parts) and not any(get(config, path) for path in thaw):
    settings = ", ".join(_setting(config, path) for path in parts)
    yield f"{settings} leave nothing to train; set one of them to False"
  if config.runtime.random_init and config.model.mlp_path:
    yield (
      f"{_setting(config, 'model.mlp_path')} would not be read while runtime.random_init=True draws all weights; "
      "set one of them to its default"
    )
  if config.training.bf16 and config.training.fp16:
    yield "training.bf16=True contradicts training.fp16=True; set training.fp16 to False"


def _data_problems(config: TrainConfig) -> Iterator[str]:
  data, loader = config.data, config.loader
  if data.dynamic_image_size and data.min_dynamic_patch > data.max_dynamic_patch:
    yield (
      f"data.min_dynamic_patch={data.min_dynamic_patch} is above "
      f"data.max_dynamic_patch={data.max_dynamic_patch}; lower the one or raise the other"
    )
  if data.min_num_frame > data.max_num_frame:
    yield (
      f"data.min_num_frame={data.min_num_frame} is above "
      f"data.max_num_frame={data.max_num_frame}; lower the one or raise the other"
    )
  for path in ("loader.sequence_buckets", "loader.tile_buckets"):
    buckets = get(config, path)
    if list(buckets) != sorted(set(buckets)):
      yield f"{path}={buckets} must rise from entry to entry; use {tuple(sorted(set(buckets)))}"
  # A pair's answers stand in one row.
  answers = 1 if config.preference.loss_type is None or data.use_packed_ds else 2
  if loader.sequence_buckets and max(loader.sequence_buckets) < answers * data.max_seq_length:
    twice = "twice " if answers == 2 else ""
    yield (
      f"loader.sequence_buckets={loader.sequence_buckets} cannot hold {twice}data.max_seq_length="
      f"{data.max_seq_length}; add a bucket of {answers * data.max_seq_length}"
    )
  yield from _template_problems(data.conv_style)


def _preference_problems(config: TrainConfig) -> Iterator[str]:
  preference = config.preference
  if preference.loss_type is None:
    return
  kinds = preference.kinds
  setting = f"preference.loss_type={preference.loss_type!r}"
  unknown = [kind for kind in kinds if kind not in PREFERENCE_LOSSES]
  for kind in unknown:
    known = ", ".join(PREFERENCE_LOSSES)
    yield f"{setting}: there is no loss {kind!r}; use {known}, or a list{suggest(kind, PREFERENCE_LOSSES)}"
  if unknown:
    return
  if not any(get(config, f"preference.{kind}_loss_weight") for kind in kinds) and not preference.rpo_alpha:
    weights = ", ".join(f"preference.{kind}_loss_weight=0" for kind in dict.fromkeys(kinds))
    yield f"{setting} with {weights} optimises nothing; raise a weight, or set preference.rpo_alpha"
  for kind in dict.fromkeys(kinds):
    if kinds.count(kind) > 1:
      yield f"{setting} names {kind!r} {kinds.count(kind)} times; name it once, with preference.{kind}_loss_weight"


def _template_problems(name: str) -> Iterator[str]:
  # Imported late: only this check needs the data room, and `--help` should not wait for it.
  from internvl_jax.data.sample.templates import get_template

  try:
    get_template(name)
  except ValueError as error:
    yield str(error)


def _schedule_problems(config: TrainConfig) -> Iterator[str]:
  training = config.training
  if 0 < training.max_steps < training.warmup_steps:
    yield (
      f"training.warmup_steps={training.warmup_steps} is above training.max_steps={training.max_steps}: "
      "the learning rate would never peak; lower the one or raise the other"
    )
  if training.lr_scheduler_kwargs is not None and not _is_json_object(training.lr_scheduler_kwargs):
    yield (
      f"training.lr_scheduler_kwargs={training.lr_scheduler_kwargs!r} must be a JSON object, "
      "such as '{\"min_lr_rate\": 0.1}'"
    )


def _is_json_object(text: str) -> bool:
  try:
    return isinstance(json.loads(text), dict)
  except json.JSONDecodeError:
    return False


def _evaluation_problems(config: TrainConfig) -> Iterator[str]:
  training = config.training
  strategies = {training.eval_strategy, training.evaluation_strategy} - {"no"}
  if len(strategies) > 1:
    yield (
      f"training.eval_strategy={training.eval_strategy!r} contradicts "
      f"training.evaluation_strategy={training.evaluation_strategy!r}; set one of the two spellings"
    )
  has_nothing = config.eval.annotation is None and config.preference.eval_meta_path is None
  if strategies and has_nothing:
    yield (
      f"training.eval_strategy={min(strategies)!r} has nothing to score while eval.annotation=None; "
      "name a jsonl there (of preference pairs, a meta file in preference.eval_meta_path) or set the strategy to 'no'"
    )
  if training.load_best_model_at_end and len(strategies) < 2 and not (strategies and has_nothing):
    yield from _best_model_problems(config, min(strategies, default="no"))


def _best_model_problems(config: TrainConfig, strategy: str) -> Iterator[str]:
  """What keeps the best step from being known, and from being there; `strategy` is when the model is scored."""
  training, setting = config.training, "training.load_best_model_at_end=True"
  if strategy == "no":
    yield f"{setting} needs scores to go by; set training.eval_strategy to 'steps' or 'epoch'"
    return
  if training.save_strategy != strategy:
    yield (
      f"{setting}: training.save_strategy={training.save_strategy!r} must be training.eval_strategy={strategy!r}, so "
      "that what is scored is saved"
    )
  every = training.eval_steps or training.logging_steps
  turns = training.save_steps / every
  if strategy == "steps" and abs(turns - round(turns)) > 1e-6:
    yield (
      f"{setting}: training.save_steps={training.save_steps:g} must be a multiple of training.eval_steps={every:g}, so "
      "that what is saved is scored"
    )
  metric = (training.metric_for_best_model or "").removeprefix("eval_")
  known = []
  if config.eval.annotation:
    known += ["accuracy", *(["accuracy_GROUP"] if config.eval.group_field else [])]
  if config.preference.eval_meta_path:
    known += ["rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/chosen"]
  is_group = metric.startswith("accuracy_") and "accuracy_GROUP" in known
  is_of_pairs = metric.startswith(("rewards/", "logps/")) and "rewards/margins" in known
  if metric and metric not in known and not is_group and not is_of_pairs:
    yield (
      f"training.metric_for_best_model={training.metric_for_best_model!r} is no score of this run; it has "
      f"{', '.join(known)}"
    )


def _mesh_problems(config: TrainConfig) -> Iterator[str]:
  rest = [path for path in FIELDS if path.startswith("mesh.") and get(config, path) == -1]
  if len(rest) > 1:
    settings = " and ".join(_setting(config, path) for path in rest)
    yield f"{settings} both ask for the remaining devices; give all but one a size"
  if config.training.deepspeed:
    yield from zero.problems(config.training.deepspeed, config.training)


def _runtime_problems(config: TrainConfig) -> Iterator[str]:
  setting, steps = config.runtime.distributed, config.runtime.profile_steps
  if setting not in ("auto", "off") and parse_distributed(setting) is None:
    yield (
      f"runtime.distributed={setting!r} must be auto, off, or host:port,processes,process (10.0.0.2:8476,4,0 is the "
      "first of four)"
    )
  if steps and (len(steps) != 2 or steps[0] > steps[1]):
    yield f"runtime.profile_steps={steps} must be the first and the last step of the trace, such as (10, 12)"
  for option in config.runtime.xla_options:
    try:
      parse_xla_option(option)
    except ValueError:
      yield f"runtime.xla_options: {option!r} must be xla_…=value, such as 'xla_gpu_enable_triton_gemm=false'"


def _is_remote(path: str) -> bool:
  # Looking would need a network and credentials; whoever opens the path reports it.
  return "://" in path


def _path_problems(config: TrainConfig, command: Command) -> Iterator[str]:
  required = REQUIRED[command]
  for path in required:
    if not get(config, path) and not (path == "model.model_name_or_path" and _has_parts(config)):
      yield f"{path}={get(config, path)!r} must be set: --config.{path}=..."
  yield from _parts_problems(config)
  yield from _url_problems(config)
  for path in ("model.model_name_or_path", *PARTS):
    if get(config, path):
      yield from _model_path_problems(path, get(config, path))
  if config.model.mlp_path and command != "plan":  # which reads no weights
    yield from _projector_path_problems(config.model.mlp_path)
  files = {"data.meta_path": config.data.meta_path if "data.meta_path" in required else None}
  if command in ("train", "doctor"):
    files["eval.annotation"] = config.eval.annotation
    files["preference.eval_meta_path"] = config.preference.eval_meta_path
  for path, name in files.items():
    if name and not _is_remote(name) and not os.path.isfile(name):
      yield f"{path}={name!r}: no such file"
  if command in ("train", "doctor") and config.eval.annotation and (root := config.eval.root):
    if not _is_remote(root) and not os.path.isdir(root):
      yield f"eval.root={root!r}: no such folder"
  if (cache := config.preference.reference_cache_dir) and _is_remote(cache) and not is_bucket(cache):
    yield f"preference.reference_cache_dir={cache!r}: runs write to folders, gs:// and s3:// only; name one of these"
  if "training.output_dir" in required and config.training.output_dir:
    yield from _output_path_problems(config)


# A slash was lost, as shells and os.path.normpath do: the name of a folder called "gs:".
_HALF_A_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)(.*)")


def _url_problems(config: TrainConfig) -> Iterator[str]:
  """URLs that are none, or stand where a folder is wanted, of which libraries would make one called "gs:"."""
  for path in _NAMED:
    if (name := get(config, path)) and (found := _HALF_A_URL.match(name)):
      yield f"{path}={name!r} is no URL: did you mean {found[1]}://{found[2]}?"
  for path, why in ON_DISK.items():
    if (name := get(config, path)) and _is_remote(name):
      yield f"{path}={name!r}: must be a folder of this machine: {why}"
  for path in WRITTEN:
    if (name := get(config, path)) and _is_remote(name) and not is_bucket(name):
      yield f"{path}={name!r}: nothing is written there; name a folder, or one of a bucket (gs://, s3://)"


def _has_parts(config: TrainConfig) -> bool:
  return any(get(config, path) for path in PARTS)


def _parts_problems(config: TrainConfig) -> Iterator[str]:
  whole = "model.model_name_or_path"
  if get(config, whole):
    for path in PARTS:
      if get(config, path):
        yield (
          f"{_setting(config, whole)} contradicts {_setting(config, path)}: the one names a whole model, the other "
          "a part to build one from; set one of them to None"
        )
  elif _has_parts(config):
    for path, other in (PARTS, PARTS[::-1]):
      if not get(config, path):
        yield (
          f"{_setting(config, path)} must be set beside {_setting(config, other)}: a model is built from both "
          f"(or set {whole})"
        )


def _model_path_problems(path: str, name: str) -> Iterator[str]:
  if _is_remote(name):
    yield from (f"{path}={line}" for line in _unread(name))
    return
  if not os.path.isdir(name):
    if not _is_hub_id(name):
      yield f"{path}={name!r}: no such folder; give a checkpoint's folder or its hub id, org/name"
  elif not any(os.path.isfile(os.path.join(name, file)) for file in ("config.json", "adapter_config.json")):
    yield f"{path}={name!r} holds no config.json; give the folder of a whole checkpoint or of a PEFT adapter"


def _projector_path_problems(name: str) -> Iterator[str]:
  if _is_remote(name):
    yield from (f"model.mlp_path={line}" for line in _unread(name))
    return
  if os.path.isdir(name):
    return
  if not os.path.isfile(name):
    yield f"model.mlp_path={name!r}: no such file or folder"
  elif not name.endswith(PROJECTOR_SUFFIXES):
    yield f"model.mlp_path={name!r} must end in {', '.join(PROJECTOR_SUFFIXES)}, or be a folder"


def _unread(name: str) -> Iterator[str]:
  from internvl_jax.hf.hub import unread_url

  if line := unread_url(name):
    yield line


def _is_hub_id(name: str) -> bool:
  # Only the form is looked at: whoever fetches the model reports that there is none.
  from internvl_jax.hf.hub import is_hub_id

  return is_hub_id(name)


def _output_path_problems(config: TrainConfig) -> Iterator[str]:
  output = config.training.output_dir
  assert output is not None
  if _is_remote(output) and not is_bucket(output):
    yield f"training.output_dir={output!r}: runs write to folders, gs:// and s3:// only; name one of these"
    return
  if is_bucket(output):
    yield from (f"training.output_dir={line}" for line in _unread(output))
  elif os.path.exists(output) and not os.path.isdir(output):
    yield f"training.output_dir={output!r} is a file; name a folder"
  for path in ("model.model_name_or_path", *PARTS, "model.mlp_path"):
    name = get(config, path)
    folder = os.path.dirname(name) if name and name.endswith(PROJECTOR_SUFFIXES) else name
    if folder and _is_remote(folder) == _is_remote(output) and would_write_over(folder, output):
      yield (
        f"{path}={name!r} is where training.output_dir={output!r} would be written; "
        "write to a folder of its own"
      )
