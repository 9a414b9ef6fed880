"""The checks of a configuration that come before anything heavy.

`validate` refuses what cannot work, all of it at once, from nothing but the configuration and the file system: no JAX, no
network, no weights.

The rules are tables, a line a field:

    REFUSED    fields that will never do anything here, and why
    ACCEPTED   fields that are read from recipes and change nothing, and why
    CHOICES    strings with a fixed set of values        RANGES  the numbers' ranges
    INSTEAD_OF other values of such strings, and what does their work

`internvl_jax.config_paths` checks the files and folders that fields name, `internvl_jax.unused_settings` has the settings that
have no effect beside others, `internvl_jax.foreign` the arguments of scripts that no field has.
"""

import functools
import json
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal

from internvl_jax import unused_settings
from internvl_jax.allowed_values import CHOICES, INSTEAD_OF, REFUSED
from internvl_jax.arguments import EvalConfig
from internvl_jax.config import FIELDS, LEAVES, TrainConfig, get, is_changed, setting_text, type_name
from internvl_jax.config_paths import Command, path_problems
from internvl_jax.errors import UserError, suggest
from internvl_jax.metrics.writers import report_problems
from internvl_jax.parallel import zero
from internvl_jax.runtime_options import parse_distributed, parse_xla_option
from internvl_jax.tasks import conversations_a_line
from internvl_jax.tasks import settings as task_settings


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
  return [*value_problems(config), *path_problems(config, command)]


def value_problems(config: TrainConfig) -> list[str]:
  """Those of the values, which have their types: nothing is said of files and folders."""
  checks: tuple[Callable[[TrainConfig], Iterator[str]], ...] = (
    _support_problems,
    _range_problems,
    _model_problems,
    _data_problems,
    _task_problems,
    _optimizer_problems,
    _schedule_problems,
    _evaluation_problems,
    _mesh_problems,
    _runtime_problems,
  )
  return [line for check in checks for line in check(config)]


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


def _support_problems(config: TrainConfig) -> Iterator[str]:
  for path, reason in REFUSED.items():
    if is_changed(config, path):
      yield f"{setting_text(config, path)} is not supported: {reason}"
  for remark in _remarks(config):
    if remark.is_refused:
      yield remark.line


def idle_settings(config: TrainConfig) -> list[str]:
  """A line for each setting that asks for what will not happen, for the log; see `unused_settings`."""
  return [remark.line for remark in _remarks(config) if not remark.is_refused]


def _remarks(config: TrainConfig) -> Iterator[unused_settings.Remark]:
  defaults = {path: field.default for path, field in FIELDS.items()}
  return unused_settings.remarks(functools.partial(get, config), defaults, task_settings.rules())


def _range_problems(config: TrainConfig) -> Iterator[str]:
  for path, allowed in task_settings.ranges().items():
    value = get(config, path)
    entries = value if isinstance(value, tuple) else (value,)
    if not all(entry is None or allowed.holds(entry) for entry in entries):
      yield f"{path}={value!r} must be {allowed}"
  for path, choices in CHOICES.items():
    yield from _choice_problems(config, path, choices)


def _choice_problems(config: TrainConfig, path: str, choices: Collection[str]) -> Iterator[str]:
  if (value := get(config, path)) not in choices:
    instead = [words for form, words in INSTEAD_OF.get(path, {}).items() if re.fullmatch(form, value)]
    why = f"; {instead[0]}" if instead else suggest(value, choices)
    yield f"{path}={value!r} must be one of {', '.join(choices)}{why}"


def _optimizer_problems(config: TrainConfig) -> Iterator[str]:
  # Imported late: it brings JAX along, for which `--help` should not wait.
  from internvl_jax.optim import optimizer, rates

  yield from rates.problems(config.training)
  unknown = list(_choice_problems(config, "training.optim", optimizer.OPTIMIZERS))
  yield from unknown or optimizer.problems(config.training)


def _model_problems(config: TrainConfig) -> Iterator[str]:
  parts = ("model.freeze_backbone", "model.freeze_mlp", "model.freeze_llm")
  thaw = (
    "model.unfreeze_vit_layers",
    "model.use_backbone_lora",
    "model.use_llm_lora",
    "model.unfreeze_lm_head",
  )
  # A Flash has more parts, which its stages train.
  if (
    config.flash.stage == "none"
    and all(get(config, path) for path in parts)
    and not any(get(config, path) for path in thaw)
  ):
    settings = ", ".join(setting_text(config, path) for path in parts)
    yield f"{settings} leave nothing to train; set one of them to False"
  if config.runtime.random_init and config.model.mlp_path:
    yield (
      f"{setting_text(config, 'model.mlp_path')} would not be read while runtime.random_init=True draws all weights; "
      "set one of them to its default"
    )
  if config.lora.quantize_base != "none" and config.runtime.quantize != "none":
    yield (
      f"{setting_text(config, 'lora.quantize_base')} stores weights that {setting_text(config, 'runtime.quantize')} would "
      "round once more; set one of them to 'none'"
    )
  if (
    config.lora.quantize_base != "none"
    and config.model.unfreeze_vit_layers
    and config.model.use_backbone_lora
  ):
    yield (
      f"{setting_text(config, 'model.unfreeze_vit_layers')} trains layers whose weights "
      f"{setting_text(config, 'lora.quantize_base')} stores in fewer bits; set one of them to its default"
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
  if (costs := loader.balance_costs) and (len(costs) != 3 or costs[1] == 0):
    yield (
      f"loader.balance_costs={costs} must be the costs of a tile, a token and a pair of attention, the token's above 0, "
      "such as (0.4, 0.0005, 6e-8)"
    )
  # All that a line becomes is in one row.
  answers = 1 if data.use_packed_ds else conversations_a_line(config)
  if loader.sequence_buckets and max(loader.sequence_buckets) < answers * data.max_seq_length:
    twice = "twice " if answers == 2 else ""
    yield (
      f"loader.sequence_buckets={loader.sequence_buckets} cannot hold {twice}data.max_seq_length="
      f"{data.max_seq_length}; add a bucket of {answers * data.max_seq_length}"
    )
  yield from _template_problems(data.conv_style)


def _task_problems(config: TrainConfig) -> Iterator[str]:
  for own in task_settings.of_tasks():
    yield from own.problems(config)


def _template_problems(name: str) -> Iterator[str]:
  # Imported late: only this check needs `data/`, and `--help` should not wait for it.
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
  held_out = list(task_settings.held_out(config))
  has_nothing = config.eval.annotation is None and not any(meta for _, meta in held_out)
  yield from _set_problems(config.eval)
  if strategies and has_nothing:
    yield (
      f"training.eval_strategy={min(strategies)!r} has nothing to score while eval.annotation=None; "
      f"name a jsonl there ({'; '.join(scored.hint for scored, _ in held_out)}) or set the strategy to 'no'"
    )
  if training.eval_on_start and has_nothing:
    yield (
      "training.eval_on_start=True has nothing to score while eval.annotation=None; name a jsonl there, or set it to False"
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
  known, prefixes = _answer_scores(config.eval)
  for scored, meta in task_settings.held_out(config):
    if meta:
      known += scored.metrics
      prefixes += scored.prefixes
  if metric and metric not in known and not metric.startswith(tuple(prefixes)):
    yield (
      f"training.metric_for_best_model={training.metric_for_best_model!r} is no score of this run; it has "
      f"{', '.join(known)}"
    )


def _set_problems(config: EvalConfig) -> Iterator[str]:
  """What is wrong with the held-out sets and how they are asked, as far as that is known without the network."""
  # Imported late: it brings `data/` along, for which `--help` should not wait.
  from internvl_jax.eval.compression import read_rule
  from internvl_jax.eval.sets import is_remote_json, read_sets

  try:
    read_rule(config.compress, "eval.compress")
    if not is_remote_json(config.annotation or ""):
      read_sets(config)
  except UserError as error:
    yield str(error)


def _answer_scores(config: EvalConfig) -> tuple[list[str], list[str]]:
  """The names of a run's scores of held-out sets, and what those of groups begin with."""
  from internvl_jax.eval.sets import is_remote_json, read_sets

  if is_remote_json(config.annotation or ""):
    return ["the scores of eval.annotation"], [""]
  try:
    sets = read_sets(config)
  except UserError:  # Told already.
    return [], [""]
  names = [(f"{asked.label}{metric}", asked.group_field) for asked in sets for metric in asked.metrics]
  known = [name for metric, group in names for name in (metric, *([f"{metric}_GROUP"] if group else []))]
  return known, [f"{metric}_" for metric, group in names if group]


def _mesh_problems(config: TrainConfig) -> Iterator[str]:
  rest = [path for path in FIELDS if path.startswith("mesh.") and get(config, path) == -1]
  if len(rest) > 1:
    settings = " and ".join(setting_text(config, path) for path in rest)
    yield f"{settings} both ask for the remaining devices; give all but one a size"
  if config.training.deepspeed:
    yield from zero.problems(config.training.deepspeed, config.training)


def _runtime_problems(config: TrainConfig) -> Iterator[str]:
  yield from report_problems(config.training.report_to)
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
