"""Settings without effect: accepted where they ask for nothing, said where they do, refused where they name another way."""

import re

import pytest

from internvl_jax import cli, config_checks
from internvl_jax.arguments import TrainingArguments
from internvl_jax.config import FIELDS, TrainConfig, type_name
from internvl_jax.config_checks import idle_settings
from internvl_jax.data.load.counters import untaught_samples
from internvl_jax.optim.learning_rate import warmup_remark
from internvl_jax.task_arguments import LOSS_WEIGHTS
from internvl_jax.tasks.settings import rules
from internvl_jax.unused_settings import REFUSED_IDLE
from tests.test_recipes import SCRIPTS, load, recipe_of

ONLY_WITH, IDLE, ASKS_NOTHING = rules().only_with, rules().idle, rules().asks_nothing

# Switches of cases that are not simply off; what makes every field of IDLE idle.
MAKES_IDLE = {
  "model.use_fast_tokenizer": {},
  "model.drop_path_rate": {"model.freeze_backbone": True},
  **{path: {"flash.stage": "router"} for path in IDLE if path.startswith("model.freeze_")},
  **{path: {} for path in IDLE if path.startswith("flash.")},
  "data.loss_reduction": {"data.use_packed_ds": True, "preference.loss_type": "sigmoid"},
  "preference.label_smoothing": {"preference.loss_type": "hinge"},
  "training.layer_lr_decay": {"model.freeze_backbone": True},
  "training.group_by_length": {"data.use_packed_ds": True},
  "training.num_train_epochs": {"training.max_steps": 5},
  "training.warmup_ratio": {"training.lr_scheduler_type": "constant"},
  "training.warmup_steps": {"training.lr_scheduler_type": "constant"},
  "training.save_steps": {"training.save_strategy": "no"},
  "training.save_total_limit": {"training.save_strategy": "no"},
  "training.logging_steps": {"training.logging_strategy": "epoch"},
  "training.logging_first_step": {"training.logging_steps": 1},
  "training.eval_steps": {},
  "training.logging_dir": {},
  "training.project": {"training.report_to": "tensorboard"},
  "runtime.tags": {},
  "lora.dropout": {"grpo.reward_funcs": ("exact_match",), "model.use_llm_lora": 16},
  "grpo.epsilon": {"grpo.reward_funcs": ("exact_match",), "grpo.loss_type": "cispo"},
  "loader.max_bad_fraction": {},
  "loader.tile_buckets": {"data.use_packed_ds": True},
  "loader.balance_costs": {"data.use_packed_ds": True, "loader.balance_steps": 0},
  **{path: {"preference.loss_type": "robust"} for path in IDLE if path.endswith("_loss_weight")},
}
MAKES_IDLE["preference.robust_loss_weight"] = {"preference.loss_type": "sigmoid,bco_pair"}


def changed(**values):
  config = TrainConfig()
  for path, value in values.items():
    leaf, name = path.split(".")
    setattr(getattr(config, leaf), name, value)
  return config


# Of fields that take names, and of those whose only other value asks for nothing.
OTHER_VALUES = {
  "runtime.remat_policy": "dots",
  "data.strict_mode": None,
  "preference.share_prompts": None,
  "grpo.loss_type": "bnpo",
  "grpo.importance_sampling_level": "sequence",
  "grpo.scale_rewards": "none",
  "distillation.divergence": "reverse",
}


def other_value(path):
  """A sound value that asks for something, other than the field's default."""
  default, kind = FIELDS[path].default, type_name(FIELDS[path].type)
  if path == "data.loss_reduction":
    return "sample"
  if path in OTHER_VALUES:
    return OTHER_VALUES[path]
  if kind == "bool":
    return not default
  if kind.startswith("tuple"):
    return ("x",) if "str" in kind else (1,)
  if kind.startswith("str"):
    return "x"
  if "int" in kind:
    return (default or 1) * 2
  return 0.25 if default is None else default / 2 or 0.25


# Whose only other value asks for nothing.
NEVER_SAID = {"data.strict_mode", "preference.share_prompts"}


def test_tables_name_fields():
  assert set(ONLY_WITH) | set(IDLE) | set(ASKS_NOTHING) | set(REFUSED_IDLE) <= set(FIELDS)
  assert {switch for switches in ONLY_WITH.values() for switch in switches} <= set(FIELDS)
  assert set(ASKS_NOTHING) | set(REFUSED_IDLE) <= set(ONLY_WITH) | set(IDLE)
  assert set(MAKES_IDLE) == set(IDLE)
  named = re.compile(
    r"\b(?:model|data|training|preference|grpo|distillation|flash|loader|lora|eval|runtime)\.\w+"
  )
  reasons = " ".join(
    idle.why if isinstance(idle.why, str) else idle.why() for cases in IDLE.values() for idle in cases
  )
  assert set(named.findall(reasons)) <= set(FIELDS)


def test_defaults_ask_for_nothing():
  assert idle_settings(TrainConfig()) == []


@pytest.mark.parametrize("path", [path for path in ONLY_WITH if path not in NEVER_SAID])
def test_a_setting_without_its_switch_is_said_once(path):
  others = {"model.grad_checkpoint": False} if path == "runtime.remat_policy" else {}
  config = changed(**others, **{path: other_value(path)})
  refused, said = list(config_checks._support_problems(config)), idle_settings(config)
  assert len(refused) == (path in REFUSED_IDLE) and len(said) == (path not in REFUSED_IDLE)
  (line,) = refused + said
  assert line.startswith(f"{path}={other_value(path)!r} has no effect without {ONLY_WITH[path][0]}")
  switch = ONLY_WITH[path][0]
  on = {"preference.loss_type": ",".join(LOSS_WEIGHTS)}.get(switch, True)
  config = changed(**{path: other_value(path), switch: on})
  if path != "data.loss_reduction":
    assert not [line for line in idle_settings(config) if line.startswith(f"{path}=")]
  assert not list(config_checks._support_problems(config))


@pytest.mark.parametrize("path", IDLE)
def test_a_setting_that_another_one_silences_is_said_once(path):
  config = changed(**MAKES_IDLE[path], **{path: other_value(path)})
  (line,) = [line for line in idle_settings(config) if line.startswith(f"{path}=")]
  assert re.match(rf"{path}=\S+ has no effect( with|:| without| while)", line)
  assert not list(config_checks._support_problems(config))


@pytest.mark.parametrize(("path", "value"), [(path, v) for path, all_ in ASKS_NOTHING.items() for v in all_])
def test_what_switches_off_what_is_off_is_accepted(path, value):
  config = changed(**MAKES_IDLE.get(path, {}), **{path: value})
  assert not [line for line in idle_settings(config) if path in line]
  assert not list(config_checks._support_problems(config))


def test_the_words_of_a_remark():
  config = changed(
    **{"data.min_dynamic_patch": 2, "data.use_thumbnail": True, "model.use_fast_tokenizer": True}
  )
  assert idle_settings(config) == [
    "data.use_thumbnail=True has no effect without data.dynamic_image_size",
    "data.min_dynamic_patch=2 has no effect without data.dynamic_image_size",
    "model.use_fast_tokenizer=True has no effect: the tokenizers library is always used",
  ]


def test_another_way_to_learn_is_refused_with_the_way_out():
  (line,) = config_checks._support_problems(changed(**{"lora.use_dora": True}))
  assert (
    "without adapters; set model.use_llm_lora=16 or model.use_backbone_lora=16, or leave it at False" in line
  )


def test_remarks_reach_the_log(absl_log):
  cli.warn_idle(changed(**{"data.max_buffer_size": 3}))
  assert absl_log.messages == ["data.max_buffer_size=3 has no effect without data.use_packed_ds"]


def test_what_the_published_recipes_ask_for_in_vain():
  said = [idle_settings(load(recipe_of(script))) for script in SCRIPTS]
  assert sum("model.drop_path_rate" in line for lines in said for line in lines) == 21
  fields = {line.split("=")[0] for lines in said for line in lines}
  assert fields == {
    "model.drop_path_rate",
    "training.save_steps",
    "training.save_total_limit",
    "training.num_train_epochs",
  }


# --- What is known later ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("settings", "steps", "words"),
  [
    (
      {"warmup_steps": 100},
      5,
      "warmup_steps=100 makes a warm-up of 100 steps, and the run has 5: the learning rate ends at 4%",
    ),
    (
      {"warmup_ratio": 1.0},
      8,
      "warmup_ratio=1 makes a warm-up of 8 steps, and the run has 8: the learning rate ends at 88%",
    ),
    ({"warmup_steps": 5}, 5, "warm-up of 5 steps"),
    ({"warmup_steps": 4}, 5, None),
    ({"warmup_ratio": 0.1}, 5, None),
    ({"warmup_steps": 100, "lr_scheduler_type": "constant"}, 5, None),
  ],
)
def test_a_warm_up_longer_than_the_run_is_said(settings, steps, words):
  line = warmup_remark(TrainingArguments(**settings), steps)
  assert line is None if words is None else words in (line or "")


def test_samples_with_nothing_to_learn_are_said():
  counters = {"a": {"samples": 24, "fully_masked": 22}, "b": {"samples": 6, "fully_masked": 0}}
  assert untaught_samples(counters) == (
    "22 of 30 samples had nothing to learn, since no token of theirs is supervised (a 22); "
    "python -m internvl_jax.doctor names the lines"
  )
  assert untaught_samples({"b": counters["b"]}) is None
