"""What a configuration must not hold, and how that is told."""

import copy

import pytest

from internvl_jax.allowed_values import CHOICES
from internvl_jax.config import FIELDS, TrainConfig, type_name
from internvl_jax.config_checks import problems, validate
from internvl_jax.errors import UserError
from internvl_jax.tasks.settings import ranges
from tests.support.configurations import set_field, sound_config


@pytest.fixture
def config(tmp_path):
  return sound_config(tmp_path)


def test_a_sound_configuration_passes_and_is_left_alone(config):
  before = copy.deepcopy(config)
  validate(config)
  assert config == before


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({"loss_type": "sigmiod"}, "or a list; did you mean sigmoid?"),
    ({"loss_type": "sigmoid,,ipo"}, "there is no loss ''"),
    ({"loss_type": ""}, "preference.loss_type='': there is no loss ''"),
    ({"loss_type": "sigmoid", "sigmoid_loss_weight": 0.0}, "sigmoid_loss_weight=0 optimizes nothing"),
    (
      {"loss_type": "sigmoid", "precompute_reference": True, "reference_cache_dir": "hdfs://a/b"},
      "'hdfs://a/b': runs write to folders, gs:// and s3:// only",
    ),
    ({"loss_type": "sigmoid,ipo", "loss_weights": (1.0,)}, "has 1 weights for the 2 losses of"),
    ({"loss_type": "sigmoid", "loss_weights": (0.0,)}, "loss_weights=(0.0,) optimizes nothing"),
    (
      {"loss_type": "ipo", "loss_weights": (1.0,), "ipo_loss_weight": 0.5},
      "preference.ipo_loss_weight=0.5 beside preference.loss_weights=(1.0,); set one of the two",
    ),
    ({"loss_type": "ipo,sigmoid,ipo"}, "names 'ipo' 2 times; name it once, with preference.ipo_loss_weight"),
  ],
)
def test_preferences_that_contradict_themselves(config, settings, words):
  for name, value in settings.items():
    set_field(config, f"preference.{name}", value)
  (line,) = problems(config)
  assert words in line


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({"preference.loss_type": "sigmoid"}, "a run learns in one way; leave one at its default"),
    (
      {"grpo.reward_weights": (1.0, 2.0)},
      "has 2 weights for the 1 rewards of grpo.reward_funcs=('exact_match',)",
    ),
    ({"grpo.reward_weights": (0.0,)}, "optimize nothing; raise a weight"),
    ({"grpo.loss_type": "cispo"}, "needs grpo.epsilon_high, the largest weight of a token"),
    ({"data.use_packed_ds": True}, "a row holds one prompt and its answers; set it to False"),
    ({"grpo.num_generations": 1}, "grpo.num_generations=1 must be at least 2"),
  ],
)
def test_rewards_that_contradict_themselves(config, settings, words):
  for path, value in {"grpo.reward_funcs": ("exact_match",), **settings}.items():
    set_field(config, path, value)
  (line,) = problems(config)
  assert words in line


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({"preference.loss_type": "sigmoid"}, "beside preference.loss_type='sigmoid': a run learns in one way"),
    ({"model.use_llm_lora": 4}, "beside model.use_llm_lora=4: the router trains alone"),
    ({"flash.window": 0}, "flash.window=0 must be"),
  ],
)
def test_a_stage_of_a_flash_that_is_contradicted(config, settings, words):
  for path, value in {"flash.stage": "router", **settings}.items():
    set_field(config, path, value)
  (line,) = problems(config)
  assert words in line


def test_a_router_trains_where_all_else_is_frozen(config):
  for part in ("llm", "mlp", "backbone"):
    set_field(config, f"model.freeze_{part}", True)
  assert len(problems(config)) == 1
  set_field(config, "flash.stage", "router")
  assert problems(config) == []


def test_held_out_pairs_that_are_not_there(config):
  set_field(config, "preference.loss_type", "sigmoid")
  set_field(config, "preference.eval_meta_path", "nowhere.json")
  assert problems(config) == ["preference.eval_meta_path='nowhere.json': no such file"]


def test_a_recipe_of_preferences_is_sound(config):
  for name, value in {"loss_type": "sigmoid,bco_pair", "rpo_alpha": 1.0, "sigmoid_loss_weight": 0.8}.items():
    set_field(config, f"preference.{name}", value)
  assert problems(config) == []


@pytest.mark.parametrize("path", ranges())
def test_every_range_refuses(config, path):
  allowed = ranges()[path]
  bad = allowed.low - 1 if allowed.low > -float("inf") else float("nan")
  if "float" not in type_name(FIELDS[path].type):
    if bad != bad:
      return  # An integer without bounds.
    bad = min(int(bad), -2 if allowed.also else int(bad))
  value = (bad,) if isinstance(FIELDS[path].default, tuple) else bad
  set_field(config, path, value)
  assert f"{path}={value!r} must be {allowed}" in problems(config)


@pytest.mark.parametrize(
  ("path", "value", "words"),
  [
    ("training.adam_beta1", 1.0, "at least 0 and below 1"),
    ("training.learning_rate", float("nan"), "at least 0"),
    ("training.max_steps", 0, "-1 or at least 1"),
    ("mesh.fsdp", 0, "-1 or at least 1"),
    ("training.num_train_epochs", 0.0, "above 0"),
  ],
)
def test_ranges_in_words(config, path, value, words):
  set_field(config, path, value)
  assert problems(config) == [f"{path}={value!r} must be {words}"]


@pytest.mark.parametrize("path", CHOICES)
def test_every_choice_refuses(config, path):
  set_field(config, path, "nothing")
  assert any(line.startswith(f"{path}='nothing' must be one of ") for line in problems(config))


@pytest.mark.parametrize(
  ("path", "value", "words"),
  [
    ("model.ps_version", "v3", "'v1' or 'v2'"),
    ("training.learning_rate", "1e-5", "float"),
    ("training.max_steps", 100.0, "int"),
    ("training.seed", True, "int"),
    ("loader.sequence_buckets", [64], "tuple of int"),
    ("loader.sequence_buckets", (64.0,), "tuple of int"),
    ("eval.annotation", 3, "str or None"),
    ("loader.on_bad_sample", "skip", "'error' or 'drop'"),
  ],
)
def test_wrong_types_in_a_recipe(config, path, value, words):
  set_field(config, path, value)
  assert problems(config) == [f"{path}={value!r} must be {words}"]


def test_a_replaced_leaf(config):
  config.mesh = None
  assert problems(config) == ["mesh=None must be a MeshConfig"]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"data.dynamic_image_size": True, "data.min_dynamic_patch": 7, "data.max_dynamic_patch": 6},
      "data.min_dynamic_patch=7 is above data.max_dynamic_patch=6",
    ),
    ({"training.max_steps": 5, "training.warmup_steps": 6}, "warmup_steps=6 is above training.max_steps=5"),
    (
      {"model.freeze_backbone": True, "model.freeze_mlp": True, "model.freeze_llm": True},
      "leave nothing to train",
    ),
    ({"training.bf16": True, "training.fp16": True}, "training.bf16=True contradicts training.fp16=True"),
    ({"training.fp16": True}, "training.fp16=True is not supported: float16 would need loss scaling"),
    ({"training.eval_strategy": "steps"}, "has nothing to score while eval.annotation=None"),
    ({"training.evaluation_strategy": "steps"}, "has nothing to score while eval.annotation=None"),
    (
      {"training.eval_strategy": "steps", "training.evaluation_strategy": "epoch"},
      "training.eval_strategy='steps' contradicts training.evaluation_strategy='epoch'",
    ),
    ({"loader.sequence_buckets": (8192, 64)}, "must rise from entry to entry; use (64, 8192)"),
    ({"loader.tile_buckets": (4, 4)}, "must rise from entry to entry; use (4,)"),
    ({"loader.balance_costs": (0.4, 0.1)}, "must be the costs of a tile, a token and a pair of attention"),
    ({"loader.balance_costs": (0.4, 0.0, 0.1)}, "the token's above 0, such as (0.4, 0.0005, 6e-8)"),
    ({"loader.balance_costs": (0.4, 0.1, -1.0)}, "loader.balance_costs"),
    ({"loader.sequence_buckets": (64, 128)}, "(64, 128) cannot hold data.max_seq_length=8192"),
    ({"training.lr_scheduler_kwargs": "[1]"}, "must be a JSON object"),
    ({"training.lr_scheduler_kwargs": "min_lr=1"}, "must be a JSON object"),
    ({"mesh.fsdp": -1}, "mesh.data=-1 and mesh.fsdp=-1 both ask for the remaining devices"),
    ({"data.conv_style": "internvl25"}, "unknown template 'internvl25'; did you mean 'internvl2_5'?"),
    ({"training.lr_scheduler_type": "cosin"}, "did you mean cosine?"),
    ({"model.model_name_or_path": None}, "model.model_name_or_path=None must be set"),
    (
      {"model.vision_path": "OpenGVLab/InternViT-300M-448px"},
      "contradicts model.vision_path='OpenGVLab/InternViT-300M-448px': the one names a whole model",
    ),
    ({"model.llm_path": "Qwen/Qwen2.5-0.5B"}, "contradicts model.llm_path='Qwen/Qwen2.5-0.5B'"),
    (
      {"model.model_name_or_path": None, "model.vision_path": "org/vit"},
      "model.llm_path=None must be set beside model.vision_path='org/vit'",
    ),
    ({"model.model_name_or_path": "./pretrained/none"}, "'./pretrained/none': no such folder"),
    ({"model.model_name_or_path": "none"}, "give a checkpoint's folder or its hub id, org/name"),
    (
      {"model.model_name_or_path": None, "model.vision_path": "org/vit", "model.llm_path": "/none/llm"},
      "model.llm_path='/none/llm': no such folder",
    ),
    ({"model.mlp_path": "org/mlp.safetensors"}, "'org/mlp.safetensors': no such file or folder"),
    ({"model.mlp_path": "org/projector"}, "model.mlp_path='org/projector': no such file or folder"),
    ({"model.mlp_path": __file__}, "must end in .safetensors, .pth, .bin, or be a folder"),
    ({"data.meta_path": None}, "data.meta_path=None must be set"),
    ({"data.meta_path": "none.json"}, "data.meta_path='none.json': no such file"),
    ({"eval.annotation": "none.jsonl"}, "eval.annotation='none.jsonl': no such file"),
    ({"training.output_dir": None}, "training.output_dir=None must be set"),
  ],
)
def test_contradictions_and_paths(config, changes, message):
  for path, value in changes.items():
    set_field(config, path, value)
  found = problems(config)
  assert sum(message in line for line in found) == 1
  assert not [line for line in found if "\n" in line]


def test_the_default_template_is_the_references():
  assert TrainConfig().data.conv_style == "internlm2-chat"
  assert not any("conv_style" in line for line in problems(TrainConfig()))


def test_each_command_needs_what_it_reads(config):
  config.training.output_dir = None
  assert problems(config, "doctor") == []
  config.data.meta_path = None
  assert problems(config, "plan") == []
  assert len(problems(config, "train")) == 2


def test_all_problems_are_reported_together(config):
  config.training.fp16 = True
  config.training.max_steps = 0
  config.data.meta_path = "none.json"
  with pytest.raises(UserError) as error:
    validate(config)
  lines = str(error.value).split("\n")
  assert lines[0] == "3 problems in the configuration:" and len(lines) == 4
