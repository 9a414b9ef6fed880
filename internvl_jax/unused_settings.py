"""Settings that have no effect beside others: one rule for all of them, and the table of when that is so.

A value that is the field's default, or that asks for what is so anyway (ASKS_NOTHING: a dropout of 0 without LoRA), is
accepted. One that asks for what will not happen is said once in the log, with its reason; the run then does what the
reference does, which ignores such values, too. Refused (REFUSED_IDLE) is what names another way to learn than the one
that would run.

    ONLY_WITH     fields that are ignored unless another one switches them on
    IDLE          fields that are ignored for any other reason
    ASKS_NOTHING  values, beside the default, that ask for nothing where the field has no effect
    REFUSED_IDLE  fields that are refused, not said

What depends on more than the configuration is said where that is known: the model (`setup.step.idle_on`), the number of
steps (`optim.learning_rate.warmup_remark`).
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from internvl_jax.metrics.writers import trackers_named

Values = Callable[[str], Any]
"""The value at a path such as "model.freeze_llm"."""

_PACKED = ("data.use_packed_ds",)
_DYNAMIC = ("data.dynamic_image_size",)
_WITH_LORA = ("model.use_llm_lora", "model.use_backbone_lora")
_REMAT = ("model.grad_checkpoint", "training.gradient_checkpointing")

ONLY_WITH: dict[str, tuple[str, ...]] = {
  "data.num_images_expected": _PACKED,
  "data.max_packed_tokens": _PACKED,
  "data.max_buffer_size": _PACKED,
  "data.log_freq": _PACKED,
  "data.strict_mode": _PACKED,
  "data.allow_overflow": _PACKED,
  "data.loss_reduction": _PACKED,
  "data.replacement": _PACKED,
  "loader.balance_steps": _PACKED,
  "loader.balance_costs": _PACKED,
  "data.use_thumbnail": _DYNAMIC,
  "data.min_dynamic_patch": _DYNAMIC,
  "data.max_dynamic_patch": _DYNAMIC,
  "model.unfreeze_vit_layers": ("model.freeze_backbone", "model.use_backbone_lora"),
  "model.unfreeze_lm_head": ("model.freeze_llm", "model.use_llm_lora"),
  "lora.alpha": _WITH_LORA,
  "lora.dropout": _WITH_LORA,
  "lora.targets": _WITH_LORA,
  "lora.use_dora": _WITH_LORA,
  "lora.use_rslora": _WITH_LORA,
  "lora.quantize_base": _WITH_LORA,
  "eval.metrics": ("eval.annotation",),
  "eval.root": ("eval.annotation",),
  "eval.group_field": ("eval.annotation",),
  "eval.batch_size": ("eval.annotation",),
  "eval.max_new_tokens": ("eval.annotation",),
  "eval.limit": ("eval.annotation",),
  "eval.show": ("eval.annotation",),
  "eval.compress": ("eval.annotation",),
  "runtime.remat_policy": _REMAT,
  "training.metric_for_best_model": ("training.load_best_model_at_end",),
  "training.greater_is_better": ("training.load_best_model_at_end",),
}
"""Field -> the switches of which one must be on."""


@dataclasses.dataclass(frozen=True, slots=True)
class Idle:
  """When a field has no effect, and why; the reason follows "has no effect"."""

  when: Callable[[Values], bool]
  why: str | Callable[[], str]


def _frozen_vit(value: Values) -> bool:
  thawed = value("model.use_backbone_lora") or value("model.unfreeze_vit_layers")
  return value("model.freeze_backbone") and not thawed


def _scores_by_steps(value: Values) -> bool:
  return "steps" in (value("training.eval_strategy"), value("training.evaluation_strategy"))


def _logs_and_scores_otherwise(value: Values) -> bool:
  # Where no interval is set for scores, it is that of the log.
  stands_in = _scores_by_steps(value) and value("training.eval_steps") is None
  return value("training.logging_strategy") != "steps" and not stands_in


_CONSTANT = Idle(
  lambda value: value("training.lr_scheduler_type") == "constant",
  "with training.lr_scheduler_type='constant'; constant_with_warmup is the one that warms up",
)
_UNTRACKED = Idle(
  lambda value: set(trackers_named(value("training.report_to"))) <= {"tensorboard"},
  "without a tracker that has it: training.report_to='wandb', for example",
)
_NOT_SAVED = Idle(lambda value: value("training.save_strategy") == "no", "with training.save_strategy='no'")

IDLE: dict[str, tuple[Idle, ...]] = {
  "model.use_fast_tokenizer": (Idle(lambda value: True, ": the tokenizers library is always used"),),
  "model.drop_path_rate": (
    Idle(_frozen_vit, "with model.freeze_backbone=True: a frozen ViT runs as in evaluation"),
  ),
  "training.layer_lr_decay": (Idle(_frozen_vit, "with model.freeze_backbone=True: the ViT does not train"),),
  "training.group_by_length": (
    Idle(
      lambda value: value("data.use_packed_ds"),
      "with data.use_packed_ds=True: packed rows are of one length already",
    ),
  ),
  "training.num_train_epochs": (
    Idle(lambda value: value("training.max_steps") > 0, "with training.max_steps above 0"),
  ),
  "training.warmup_ratio": (
    _CONSTANT,
    Idle(lambda value: value("training.warmup_steps") > 0, "with training.warmup_steps above 0"),
  ),
  "training.warmup_steps": (_CONSTANT,),
  "training.logging_steps": (Idle(_logs_and_scores_otherwise, "without training.logging_strategy='steps'"),),
  "training.logging_first_step": (
    Idle(
      lambda value: value("training.logging_strategy") == "steps" and value("training.logging_steps") == 1,
      "with training.logging_steps=1: every step is logged",
    ),
  ),
  "training.save_steps": (
    _NOT_SAVED,
    Idle(lambda value: value("training.save_strategy") == "epoch", "with training.save_strategy='epoch'"),
  ),
  "training.save_total_limit": (_NOT_SAVED,),
  "training.eval_steps": (
    Idle(lambda value: not _scores_by_steps(value), "without training.eval_strategy='steps'"),
  ),
  "training.logging_dir": (
    Idle(
      lambda value: "tensorboard" not in trackers_named(value("training.report_to")),
      "without training.report_to='tensorboard'",
    ),
  ),
  "training.project": (_UNTRACKED,),
  "runtime.tags": (_UNTRACKED,),
  "loader.max_bad_fraction": (
    Idle(
      lambda value: value("loader.on_bad_sample") == "error",
      "with loader.on_bad_sample='error': the first lost sample ends the run",
    ),
  ),
  "loader.balance_costs": (
    Idle(lambda value: value("loader.balance_steps") == 0, "with loader.balance_steps=0"),
  ),
  "loader.tile_buckets": (
    Idle(
      lambda value: value("data.use_packed_ds") and value("data.strict_mode"),
      "with data.strict_mode=True: pools of packed rows are padded to data.num_images_expected",
    ),
  ),
}
"""Field -> the further cases in which it has no effect."""

ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
  "data.strict_mode": (False,),
  "loader.balance_steps": (0,),
  # One tile is what there is without a grid.
  "data.max_dynamic_patch": (1,),
  "lora.dropout": (0.0,),
  "training.save_total_limit": (None,),
  "training.greater_is_better": (False,),
  "loader.max_bad_fraction": (0.0,),
}
"""Field -> values that switch off what is off already."""

REFUSED_IDLE: dict[str, str] = {
  "lora.targets": "all of the model's parts that are not frozen would train, without adapters",
  "lora.use_dora": "all of the model's parts that are not frozen would train, without adapters",
  "lora.use_rslora": "all of the model's parts that are not frozen would train, without adapters",
  "lora.quantize_base": "weights without adapters are not quantized",
}
"""Field -> what would be learned in place of what it asks for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """When fields have no effect; `|` adds what another says, such as a task of its own settings.

  Attributes:
    only_with: as ONLY_WITH.
    idle: as IDLE.
    asks_nothing: as ASKS_NOTHING.
  """

  only_with: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  idle: Mapping[str, tuple[Idle, ...]] = dataclasses.field(default_factory=dict)
  asks_nothing: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

  def __or__(self, other: "Rules") -> "Rules":
    """The rules of both."""
    idle = {path: (*self.idle.get(path, ()), *cases) for path, cases in other.idle.items()}
    return Rules(
      only_with={**self.only_with, **other.only_with},
      idle={**self.idle, **idle},
      asks_nothing={**self.asks_nothing, **other.asks_nothing},
    )

  def why_idle(self, value: Values, path: str) -> str | None:
    """Why a field has no effect; None if it has one."""
    for idle in self.idle.get(path, ()):
      if idle.when(value):
        return idle.why if isinstance(idle.why, str) else idle.why()
    switches = self.only_with.get(path, ())
    return f"without {' or '.join(switches)}" if switches and not any(map(value, switches)) else None


RULES = Rules(only_with=ONLY_WITH, idle=IDLE, asks_nothing=ASKS_NOTHING)
"""What this module's tables say; `tasks.settings.rules` adds what tasks say."""


@dataclasses.dataclass(frozen=True, slots=True)
class Remark:
  """A setting without effect: its path, and the line that says so."""

  path: str
  line: str

  @property
  def is_refused(self) -> bool:
    """Whether the run must not start with it."""
    return self.path in REFUSED_IDLE


def remarks(value: Values, defaults: Mapping[str, Any], rules: Rules) -> Iterator[Remark]:
  """The settings that ask for what will not happen, each with one reason.

  Args:
    value: the configuration.
    defaults: of every field, by path.
    rules: when fields have no effect.
  """
  for path in dict.fromkeys([*rules.only_with, *rules.idle]):
    found = value(path)
    if found == defaults[path] or found in rules.asks_nothing.get(path, ()):
      continue
    if (why := rules.why_idle(value, path)) is None:
      continue
    line = f"{path}={found!r} has no effect{'' if why.startswith(':') else ' '}{why}"
    if path in REFUSED_IDLE:
      switches = " or ".join(f"{switch}=16" for switch in rules.only_with[path])
      line += f": {REFUSED_IDLE[path]}; set {switches}, or leave it at {defaults[path]!r}"
    yield Remark(path, line)
