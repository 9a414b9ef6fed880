"""DeepSpeed's ZeRO settings, as the reference's JSON files have them (zero_stage1_config.json and so on).

Of such a file, the stage says what is sharded over the data axis (arXiv:1910.02054); the settings that say the
same as `TrainingArguments` must agree with them, as in Hugging Face's Trainer; those that tune buffers and
overlap have nothing to act on, because XLA plans both; what would be computed differently is refused.
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from internvl_jax.arguments import TrainingArguments
from internvl_jax.errors import UserError
from internvl_jax.storage.paths import path_of

STAGES = {
  0: "nothing",
  1: "the optimizer state",
  2: "the optimizer state and the gradients",
  3: "the optimizer state, the gradients and the parameters",
}
"""What each stage shards over the data axis."""

_OFFLOAD = (
  "is not done here: remove it and shard further (mesh.fsdp), recompute more (model.grad_checkpoint=True), and look "
  "whether it fits before a run (python -m internvl_jax.plan)"
)

_REFUSED: dict[str, str] = {
  "zero_optimization.offload_optimizer": _OFFLOAD,
  "zero_optimization.offload_param": _OFFLOAD,
  "zero_optimization.cpu_offload": _OFFLOAD,
  "zero_optimization.cpu_offload_params": _OFFLOAD,
  "zero_optimization.zero_quantized_weights": "would change the numbers; remove it",
  "zero_optimization.zero_quantized_gradients": "would change the numbers; remove it",
  "fp16.enabled": "would need loss scaling; set it to false and use training.bf16=True",
  "amp.enabled": "is for other GPUs; set it to false and use training.bf16=True",
  "scheduler": "is named by training.lr_scheduler_type; remove it",
  "activation_checkpointing": "is switched by model.grad_checkpoint; remove it",
  "sparse_gradients": "would change the optimizer; remove it",
  "compression_training": "would change the model; remove it",
  "sparse_attention": "would change the model; remove it",
  "curriculum_learning": "would change the data; remove it",
  "data_efficiency": "would change the data; remove it",
}
"""Setting -> why it cannot be followed and what to do; values that switch it off are let pass."""

_AGREE: dict[str, str] = {
  "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
  "gradient_accumulation_steps": "gradient_accumulation_steps",
  "gradient_clipping": "max_grad_norm",
  "bf16.enabled": "bf16",
  "optimizer.params.lr": "learning_rate",
  "optimizer.params.betas": "adam_beta1, adam_beta2",
  "optimizer.params.eps": "adam_epsilon",
  "optimizer.params.weight_decay": "weight_decay",
}
"""Setting -> the training argument that says the same."""

_WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
  "": (
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "prescale_gradients",
    "gradient_predivide_factor",
    "communication_data_type",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "flops_profiler",
    "comms_logger",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "autotuning",
    "aio",
    "checkpoint",
    "data_types",
  ),
  "zero_optimization": (
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "reduce_scatter",
    "reduce_bucket_size",
    "contiguous_gradients",
    "round_robin_gradients",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
    "zero_hpz_partition_size",
    "ignore_unused_parameters",
    "load_from_fp32_weights",
    "elastic_checkpoint",
    "legacy_stage1",
    "memory_efficient_linear",
  ),
  "fp16": (
    "auto_cast",
    "loss_scale",
    "initial_scale_power",
    "loss_scale_window",
    "hysteresis",
    "consecutive_hysteresis",
    "min_loss_scale",
  ),
  "bf16": (),
  "amp": ("opt_level",),
  "optimizer": (),
  "optimizer.params": ("torch_adam", "adam_w_mode"),
}
"""Section -> settings that say how DeepSpeed works, not what is computed."""

_READ = ("zero_optimization.stage", "optimizer.type", "train_batch_size")


def read_stage(path: str | None) -> int:
  """The stage that a ZeRO file asks for; 0 without a file. `problems` says whether the file can be followed."""
  return 0 if path is None else _read(path).get("zero_optimization", {}).get("stage", 0)


def problems(path: str, training: TrainingArguments) -> Iterator[str]:
  """Every reason, one line each, why a run must not follow the file."""
  try:
    settings = _read(path)
  except UserError as error:
    yield str(error)
    return
  at = f"training.deepspeed={path!r}: "
  for key, value in _flatten(settings):
    yield from (at + line for line in _problems_of(key, value, training))
  stage = settings.get("zero_optimization", {}).get("stage", 0)
  if stage not in STAGES:
    yield f"{at}zero_optimization.stage={stage!r} must be one of {', '.join(map(str, STAGES))}"


def _read(path: str) -> dict[str, Any]:
  try:
    settings = json.loads(path_of(path).read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise UserError(f"training.deepspeed={path!r}: no such file") from None
  except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
    raise UserError(f"training.deepspeed={path!r}: cannot be read as JSON: {error}") from None
  if not isinstance(settings, dict):
    raise UserError(f"training.deepspeed={path!r}: must hold a JSON object, not a {type(settings).__name__}")
  for section in _WITHOUT_EFFECT:
    if section and not isinstance(_at(settings, section), dict):
      raise UserError(f"training.deepspeed={path!r}: {section} must be a JSON object")
  return settings


def _at(settings: Mapping[str, Any], section: str) -> Any:
  value: Any = settings
  for key in section.split("."):
    value = value.get(key, {}) if isinstance(value, Mapping) else value
  return value


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Settings by their dotted path; sections that are known are entered, other values taken as they are."""
  for key, value in settings.items():
    path = prefix + key
    if path in _WITHOUT_EFFECT and isinstance(value, Mapping):
      yield from _flatten(value, f"{path}.")
    else:
      yield path, value


def _problems_of(key: str, value: Any, training: TrainingArguments) -> Iterator[str]:
  section, _, name = key.rpartition(".")
  if key in _REFUSED:
    if not _is_off(value):
      yield f"{key} {_REFUSED[key]}"
  elif key in _AGREE:
    yield from _disagreement(key, value, training)
  elif key == "optimizer.type":
    ours = training.optim.partition("_")[0]
    if str(value).lower() not in (ours, ours.removesuffix("w")):
      yield f"{key}={value!r}, but training.optim={training.optim!r}; make them equal, or remove optimizer"
  elif key == "train_batch_size":
    if value != "auto":
      yield f"{key}={value!r} follows from the devices and the other two sizes; set it to 'auto'"
  elif key not in _READ and name not in _WITHOUT_EFFECT.get(section, ()):
    yield _unknown(key)


def _is_off(value: Any) -> bool:
  if isinstance(value, Mapping):
    return not value.get("enabled", True) or value.get("device", "") in (None, "none")
  return value in (None, False, "auto")


def _disagreement(key: str, value: Any, training: TrainingArguments) -> Iterator[str]:
  names = _AGREE[key].split(", ")
  ours = [getattr(training, name) for name in names]
  theirs = value if isinstance(value, list) else [value]
  if value != "auto" and theirs != ours:
    fields = ", ".join(f"training.{name}={one!r}" for name, one in zip(names, ours, strict=True))
    yield f"{key}={value!r}, but {fields}; make them equal, or set it to 'auto'"


def _unknown(key: str) -> str:
  known = [*_REFUSED, *_AGREE, *_READ]
  known += [
    f"{section}.{name}".lstrip(".") for section, names in _WITHOUT_EFFECT.items() for name in (*names, "")
  ]
  close = difflib.get_close_matches(key, [name.rstrip(".") for name in known], n=1)
  return f"{key} is no setting of DeepSpeed's" + (f"; did you mean {close[0]}?" if close else "; remove it")
