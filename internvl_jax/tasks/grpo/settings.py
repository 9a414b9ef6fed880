"""The settings of reinforcement by rewards: their values, what they contradict, and where they have no effect."""

from collections.abc import Iterator

from internvl_jax.allowed_values import ABOVE_0, NOT_NEGATIVE, Range
from internvl_jax.config import TrainConfig, get, setting_text
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
  for path in ("preference.loss_type", "distillation.teacher"):
    if get(config, path) is not None:
      yield (
        f"grpo.reward_funcs={grpo.reward_funcs} beside {setting_text(config, path)}: a run learns in one way; leave one at its "
        "default"
      )
  if grpo.reward_weights and len(grpo.reward_weights) != len(grpo.reward_funcs):
    yield (
      f"grpo.reward_weights={grpo.reward_weights} has {len(grpo.reward_weights)} weights for the {len(grpo.reward_funcs)} "
      f"rewards of grpo.reward_funcs={grpo.reward_funcs}; give one each"
    )
  if config.data.use_packed_ds:
    yield (
      "data.use_packed_ds=True beside grpo.reward_funcs: a row holds one prompt and its answers; set it to False, and "
      "training.per_device_train_batch_size to the prompts of a micro-batch"
    )
  if grpo.loss_type == "cispo" and grpo.epsilon_high is None:
    yield "grpo.loss_type='cispo' needs grpo.epsilon_high, the largest weight of a token; set it, e.g. to 5.0"
  if grpo.reward_weights and not any(grpo.reward_weights):
    yield f"grpo.reward_weights={grpo.reward_weights} optimize nothing; raise a weight"


_NOTHING_DROPPED = Idle(
  lambda value: bool(value("grpo.reward_funcs")),
  "with grpo.reward_funcs: answers are sampled and learned from by one model, of which nothing is dropped",
)

_RULES = Rules(
  only_with={
    f"{_LEAF}.{name}": _ASKED_FOR for name in GrpoConfig.__dataclass_fields__ if name != "reward_funcs"
  },
  idle={
    "lora.dropout": (_NOTHING_DROPPED,),
    "model.drop_path_rate": (_NOTHING_DROPPED,),
    "grpo.epsilon": (
      Idle(
        lambda value: value("grpo.loss_type") == "cispo",
        "with grpo.loss_type='cispo': weights have no lower bound",
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
  files=("reference.json",),
)
"""What reinforcement by rewards says of its settings."""
