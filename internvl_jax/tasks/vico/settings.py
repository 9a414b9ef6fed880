"""The settings of ViCO's stages: their values, what they contradict, and where they have no effect."""

from collections.abc import Iterator

from internvl_jax.allowed_values import Range
from internvl_jax.config import TrainConfig
from internvl_jax.tasks.settings import TaskSettings
from internvl_jax.unused_settings import Idle, Rules

_SHARE = Range(low=0, high=1)
_FREEZING = ("model.freeze_llm", "model.freeze_mlp", "model.freeze_backbone")
_ADAPTING = (
  "model.use_llm_lora",
  "model.use_backbone_lora",
  "model.unfreeze_lm_head",
  "model.unfreeze_vit_layers",
)


def _problems(config: TrainConfig) -> Iterator[str]:
  stage = config.flash.stage
  if stage == "none":
    return
  setting = f"flash.stage={stage!r}"
  others = {
    "preference.loss_type": config.preference.loss_type,
    "grpo.reward_funcs": config.grpo.reward_funcs or None,
    "distillation.teacher": config.distillation.teacher,
  }
  for path, value in others.items():
    if value is not None:
      yield f"{setting} beside {path}={value!r}: a run learns in one way; leave one at its default"
  if stage == "router":
    for path in _ADAPTING:
      if value := getattr(config.model, path.partition(".")[2]):
        yield f"{setting} beside {path}={value!r}: the router trains alone; leave it at its default"


def _not_in(stage: str) -> Idle:
  return Idle(lambda value: value("flash.stage") != stage, f"without flash.stage={stage!r}")


_RULES = Rules(
  idle={
    "flash.compressed_share": (_not_in("consistency"),),
    "flash.relative_threshold": (_not_in("consistency"),),
    "flash.absolute_threshold": (_not_in("consistency"),),
    "flash.percentile": (_not_in("router"),),
    "flash.window": (_not_in("router"),),
    **{
      path: (
        Idle(
          lambda value: value("flash.stage") == "router", "with flash.stage='router': the router trains alone"
        ),
      )
      for path in _FREEZING
    },
  },
)

SETTINGS = TaskSettings(
  ranges={
    "flash.compressed_share": Range(low=0, high=1, low_is_in=False),
    "flash.percentile": Range(low=0, high=100, low_is_in=False, high_is_in=False),
    "flash.window": Range(low=1),
    "flash.relative_threshold": _SHARE,
    "flash.absolute_threshold": _SHARE,
  },
  rules=_RULES,
  problems=_problems,
)
"""What ViCO's stages say of their settings."""
