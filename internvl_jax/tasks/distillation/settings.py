"""The settings of distillation: their values, what they contradict, and where they have no effect."""

from collections.abc import Iterator

from internvl_jax.allowed_values import ABOVE_0, Range
from internvl_jax.config import TrainConfig
from internvl_jax.tasks.settings import TaskSettings
from internvl_jax.unused_settings import Rules

_ASKED_FOR = ("distillation.teacher",)


def _problems(config: TrainConfig) -> Iterator[str]:
  teacher = config.distillation.teacher
  others = {
    "preference.loss_type": config.preference.loss_type,
    "grpo.reward_funcs": config.grpo.reward_funcs or None,
  }
  for path, value in others.items():
    if teacher is not None and value is not None:
      yield (
        f"distillation.teacher={teacher!r} beside {path}={value!r}: a run learns in one way; leave one of them out"
      )


SETTINGS = TaskSettings(
  ranges={
    "distillation.top_k": Range(low=1),
    "distillation.temperature": ABOVE_0,
    "distillation.weight": Range(low=0, high=1),
  },
  rules=Rules(
    only_with={
      "distillation.top_k": _ASKED_FOR,
      "distillation.temperature": _ASKED_FOR,
      "distillation.weight": _ASKED_FOR,
      "distillation.divergence": _ASKED_FOR,
      "distillation.cache_dir": _ASKED_FOR,
    }
  ),
  problems=_problems,
  folders=("distillation.cache_dir",),
  checkpoints=("distillation.teacher",),
)
"""What distillation says of its settings."""
