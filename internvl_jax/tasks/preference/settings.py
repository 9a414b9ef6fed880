"""The settings of preference optimization: their values, what they contradict, and where they have no effect."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from internvl_jax.allowed_values import ABOVE_0, NOT_NEGATIVE, Range
from internvl_jax.config import FIELDS, TrainConfig
from internvl_jax.errors import suggest
from internvl_jax.task_arguments import LOSS_WEIGHTS, PreferenceConfig
from internvl_jax.tasks.settings import HeldOut, TaskSettings
from internvl_jax.unused_settings import Idle, Rules, Values

_WEIGHTS = tuple(f"preference.{name}" for name in LOSS_WEIGHTS.values())
_ASKED_FOR = ("preference.loss_type",)


def _problems(config: TrainConfig) -> Iterator[str]:
  preference = config.preference
  if preference.loss_type is None:
    return
  # Imported late: the table of losses brings JAX along, which `--help` should not wait for.
  from internvl_jax.losses.preference import LOSSES

  kinds = preference.kinds
  setting = f"preference.loss_type={preference.loss_type!r}"
  unknown = [kind for kind in kinds if kind not in LOSSES]
  for kind in unknown:
    yield f"{setting}: there is no loss {kind!r}; use {', '.join(LOSSES)}, or a list{suggest(kind, LOSSES)}"
  if not unknown:
    yield from _weight_problems(preference, setting)


def _weight_problems(preference: PreferenceConfig, setting: str) -> Iterator[str]:
  kinds, weights = preference.kinds, preference.loss_weights
  if weights and len(weights) != len(kinds):
    yield f"preference.loss_weights={weights} has {len(weights)} weights for the {len(kinds)} losses of {setting}; give one each"
    return
  own = {kind: f"preference.{LOSS_WEIGHTS[kind]}" for kind in dict.fromkeys(kinds) if kind in LOSS_WEIGHTS}
  for kind in dict.fromkeys(kinds):
    if kinds.count(kind) > 1:
      where = own.get(kind, "preference.loss_weights")
      yield f"{setting} names {kind!r} {kinds.count(kind)} times; name it once, with {where}"
  if weights:
    for kind, path in own.items():
      value = getattr(preference, LOSS_WEIGHTS[kind])
      if value != FIELDS[path].default:
        yield f"{path}={value:g} beside preference.loss_weights={weights}; set one of the two"
  if not any(weight for _, weight in preference.terms) and not preference.rpo_alpha:
    zeros = (
      f"preference.loss_weights={weights}" if weights else ", ".join(f"{path}=0" for path in own.values())
    )
    yield f"{setting} with {zeros} optimizes nothing; raise a weight, or set preference.rpo_alpha"


def _losses(value: Values) -> list[str]:
  return [kind.strip() for kind in (value("preference.loss_type") or "").split(",")]


def _smoothed_losses() -> list[str]:
  # Imported late: the table of losses brings JAX along, which `--help` should not wait for.
  from internvl_jax.losses.preference import smoothed

  return smoothed()


def _not_among(kind: str) -> Idle:
  return Idle(
    lambda value: bool(value("preference.loss_type")) and kind not in _losses(value),
    f"while preference.loss_type does not name {kind}",
  )


_RULES = Rules(
  only_with={
    "preference.beta": _ASKED_FOR,
    "preference.label_smoothing": _ASKED_FOR,
    "preference.rpo_alpha": _ASKED_FOR,
    "preference.loss_weights": _ASKED_FOR,
    **dict.fromkeys(_WEIGHTS, _ASKED_FOR),
    "preference.precompute_reference": _ASKED_FOR,
    "preference.reference_cache_dir": ("preference.precompute_reference",),
    "preference.share_prompts": _ASKED_FOR,
    "preference.eval_meta_path": _ASKED_FOR,
  },
  idle={
    "data.loss_reduction": (
      Idle(
        lambda value: bool(value("preference.loss_type")),
        "with preference.loss_type: answers' log-probabilities are sums",
      ),
    ),
    "preference.label_smoothing": (
      Idle(
        lambda value: bool(value("preference.loss_type")) and not {*_smoothed_losses()} & {*_losses(value)},
        lambda: f"while preference.loss_type names none of {', '.join(_smoothed_losses())}",
      ),
    ),
    **{path: (_not_among(kind),) for path, kind in zip(_WEIGHTS, LOSS_WEIGHTS, strict=True)},
  },
  asks_nothing={
    "preference.label_smoothing": (0.0,),
    "preference.rpo_alpha": (0.0,),
    "preference.share_prompts": (False,),
    **dict.fromkeys(_WEIGHTS, (0.0,)),
  },
)

_OF_3_5 = {"split_annotations", "use_custom_flash_attn"}
"""Arguments that the programs of InternVL3.5 alone have."""


def _set_by_program(program: str, values: Mapping[str, Any], others: Collection[str]) -> Mapping[str, Any]:
  """The losses: internvl_chat_mpo.py of InternVL3.5 sets them whatever it is given; the earlier one's default is DPO's."""
  if not re.search("mpo|dpo", re.split(r"[/.]", program.removesuffix(".py"))[-1]):
    return {}
  of_3_5 = bool(_OF_3_5 & set(others))
  if values.get("preference.loss_type") and not of_3_5:
    return {}
  if of_3_5 or "InternVL3_5" in (values.get("model.model_name_or_path") or ""):
    return {
      "preference.loss_type": "sigmoid,bco_pair",
      "preference.sigmoid_loss_weight": 0.8,
      "preference.bco_pair_loss_weight": 0.2,
      "preference.rpo_alpha": 1.0,
    }
  return {"preference.loss_type": "sigmoid"}


SETTINGS = TaskSettings(
  ranges={
    "preference.beta": ABOVE_0,
    "preference.label_smoothing": Range(low=0, high=0.5, high_is_in=False),
    "preference.rpo_alpha": NOT_NEGATIVE,
    "preference.loss_weights": NOT_NEGATIVE,
    **dict.fromkeys(_WEIGHTS, NOT_NEGATIVE),
  },
  rules=_RULES,
  problems=_problems,
  folders=("preference.reference_cache_dir",),
  held_out=HeldOut(
    setting="preference.eval_meta_path",
    hint="of preference pairs, a meta file in preference.eval_meta_path",
    metrics=("rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/chosen"),
    prefixes=("rewards/", "logps/"),
  ),
  files=("preference_results.json", "reference.json"),
  set_by_program=_set_by_program,
)
"""What preference optimization says of its settings."""
