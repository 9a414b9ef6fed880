"""The settings of reinforcement by rewards: their values, what they contradict, and where they have no effect."""

from collections.abc import Iterator

from internvl_jax.allowed_values import ABOVE_0, NOT_NEGATIVE, Range
from internvl_jax.config import TrainConfig
from internvl_jax.task_arguments import GrpoConfig
from internvl_jax.tasks.settings import TaskSettings
from internvl_jax.unused_settings import Idle, Rules

_LEAF = "grpo"
_ASKED_FOR = (f"{_LEAF}.reward_funcs",)
_POSITIVE = Range(low=1)


def _problems(config: TrainConfig) -> Iterator[str]:
  grpo = config.grpo
  if not grpo.reward_funcs:
    return
  if config.preference.loss_type is not None:
    yield (
      f"grpo.reward_funcs={grpo.reward_funcs} beside preference.loss_type={config.preference.loss_type!r}: a run learns in "
      "one way; leave one at its default"
    )
  if grpo.reward_weights and len(grpo.reward_weights) != len(grpo.reward_funcs):
    yield (
      f"grpo.reward_weights={grpo.reward_weights} has {len(grpo.reward_weights)} weights for the {len(grpo.reward_funcs)} "
      f"rewards of grpo.reward_funcs={grpo.reward_funcs}; give one each"
    )
  if grpo.reward_weights and not any(grpo.reward_weights):
    yield f"grpo.reward_weights={grpo.reward_weights} optimize nothing; raise a weight"


_RULES = Rules(
  only_with={
    f"{_LEAF}.{name}": _ASKED_FOR for name in GrpoConfig.__dataclass_fields__ if name != "reward_funcs"
  },
  idle={
    "data.use_packed_ds": (
      Idle(
        lambda value: bool(value("grpo.reward_funcs")),
        "with grpo.reward_funcs: rows hold the answers to one prompt",
      ),
    ),
  },
  asks_nothing={"grpo.mask_truncated_completions": (False,), "grpo.num_completions_to_print": (0,)},
)

SETTINGS = TaskSettings(
  ranges={
    "grpo.reward_weights": Range(),
    "grpo.num_generations": Range(low=2),
    "grpo.max_completion_length": _POSITIVE,
    "grpo.temperature": ABOVE_0,
    "grpo.top_p": Range(low=0, high=1, low_is_in=False),
    "grpo.top_k": NOT_NEGATIVE,
    "grpo.rollout_batch_size": _POSITIVE,
    "grpo.epsilon": NOT_NEGATIVE,
    "grpo.epsilon_high": NOT_NEGATIVE,
    "grpo.num_iterations": _POSITIVE,
    "grpo.beta": NOT_NEGATIVE,
    "grpo.num_completions_to_print": NOT_NEGATIVE,
  },
  rules=_RULES,
  problems=_problems,
)
"""What reinforcement by rewards says of its settings."""
