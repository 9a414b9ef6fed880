"""The configuration: its fields, its overrides from the command line, and all that it refuses."""

import ast
import copy
import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from absl import flags

from internvl_jax import cli
from internvl_jax import config as config_lib
from internvl_jax.allowed_values import ACCEPTED, CHOICES, RANGES, REFUSED
from internvl_jax.arguments import DataTrainingArguments, ModelArguments
from internvl_jax.config import FIELDS, LEAVES, TrainConfig, problems, to_json, validate
from internvl_jax.errors import UserError
from internvl_jax.foreign import FOREIGN
from internvl_jax.help_text import field_comments

ROOT = Path(__file__).parent.parent
ASSETS = Path(__file__).parent / "assets"
RECIPES = json.loads((ASSETS / "recipe_arguments.json").read_text())

# Fields that are read where this test does not see it: in config.py itself, and by the axis's name.
READ_ELSEWHERE = {"training.overwrite_output_dir", *(path for path in FIELDS if path.startswith("mesh."))}

# Fields that nothing reads yet although they are not in a table of config.py. To be emptied, never filled.
PENDING: set[str] = set()


@pytest.fixture
def config(tmp_path):
  """A configuration that passes."""
  model = tmp_path / "model"
  model.mkdir()
  (model / "config.json").write_text("{}")
  for name in ("meta.json", "eval.jsonl"):
    (tmp_path / name).write_text("{}")
  config = TrainConfig()
  config.model.model_name_or_path = str(model)
  config.data.meta_path = str(tmp_path / "meta.json")
  config.data.conv_style = "internvl2_5"
  config.training.output_dir = str(tmp_path / "out")
  return config


def set_field(config, path, value):
  leaf, name = path.split(".")
  setattr(getattr(config, leaf), name, value)


# --- Fields -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", [ModelArguments, DataTrainingArguments], ids=lambda leaf: leaf.__name__)
def test_fields_equal_the_reference(leaf):
  expected = json.loads((ASSETS / "arguments.json").read_text())[leaf.__name__]
  fields = {field.name: field for field in dataclasses.fields(leaf)}
  assert list(fields) == list(expected)
  for name, field in fields.items():
    type_ = config_lib.type_name(field.type)
    wanted = expected[name]["type"].replace("Optional[str]", "str or None")
    if wanted.startswith("Literal["):
      wanted = wanted.removeprefix("Literal[").removesuffix("]").replace(", ", " or ")
    if name == "meta_path":  # The reference types it `str` and gives it None.
      wanted = "str or None"
    assert (type_, field.default) == (wanted, expected[name]["default"]), name


def test_every_default_has_its_own_type():
  assert not list(config_lib._type_problems(TrainConfig()))


def test_every_number_has_a_range_that_holds_its_default():
  numeric = {
    p for p, field in FIELDS.items() if {"int", "float"} & set(config_lib.type_name(field.type).split())
  }
  assert numeric == set(RANGES)
  assert not list(config_lib._range_problems(TrainConfig()))


def test_tables_name_fields():
  for table in (REFUSED, ACCEPTED, CHOICES, RANGES):
    assert set(table) <= set(FIELDS)


def names_read(package: Path) -> set[str]:
  """Attribute names that the package reads, outside the files that declare and check the configuration."""
  read = set()
  for path in package.rglob("*.py"):
    if path.name in ("arguments.py", "config.py") and path.parent == package:
      continue
    tree = ast.parse(path.read_text(encoding="utf-8"))
    read |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
  return read


def test_no_field_is_ignored_in_silence():
  """A field is read by the package, or a table says why it is not."""
  excused = set(REFUSED) | set(ACCEPTED) | READ_ELSEWHERE
  assert not PENDING & excused
  read = names_read(ROOT / "internvl_jax")
  ignored = {path for path in set(FIELDS) - excused if path.split(".")[1] not in read}
  assert sorted(ignored) == sorted(PENDING), (
    "a field that is read leaves PENDING; one that is not goes in a table"
  )


def test_every_argument_of_the_recipes_is_known():
  assert RECIPES["recipes"] == 117
  names = {path.split(".")[1] for path in FIELDS}
  assert set(RECIPES["arguments"]) - names == {"split_annotations", "use_custom_flash_attn"}
  assert set(RECIPES["arguments"]) - names <= set(FOREIGN)


def test_every_value_of_the_recipes_parses_and_is_in_range(tmp_path):
  paths = {path.split(".")[1]: path for path in FIELDS if path.split(".")[0] in ("model", "data", "training")}
  paths |= {path.split(".")[1]: path for path in FIELDS if path.startswith("preference.")}
  for name, values in RECIPES["arguments"].items():
    for value in values:
      if name not in FOREIGN and value != "BATCH_SIZE / PER_DEVICE_BATCH_SIZE / GPUS":
        config = parse(tmp_path, f"--config.{paths[name]}={value}")
        assert not list(config_lib._type_problems(config)) + list(config_lib._range_problems(config))


def test_to_json_round_trips_through_json(config):
  config.loader.sequence_buckets = (64, 8192)
  tree = to_json(config)
  assert json.loads(json.dumps(tree)) == tree
  assert tree["loader"]["sequence_buckets"] == [64, 8192]
  assert set(tree) == set(LEAVES)


# --- Overrides ----------------------------------------------------------------------------------------------

RECIPE = """
from internvl_jax.config import TrainConfig

def get_config(arg: str = "") -> TrainConfig:
  config = TrainConfig()
  config.training.save_total_limit = 3
  config.eval.annotation = "questions.jsonl"
  if arg:
    config.training.run(arg)
  return config
"""


def parse(folder, *overrides, recipe=RECIPE, arg=""):
  path = folder / "recipe.py"
  path.write_text(textwrap.dedent(recipe))
  argv = ["command", f"--config={path}{arg}", *overrides]
  values = flags.FlagValues()
  holder = cli.define_config_flag(values, argv)
  assert cli.parse_flags(argv, values) == ["command"]
  return holder.value


@pytest.mark.parametrize(
  ("override", "value"),
  [
    ("model.freeze_llm=True", True),
    ("model.freeze_llm=false", False),
    ("model.mlp_path=a/b.bin", "a/b.bin"),
    ("model.drop_path_rate=0.1", 0.1),
    ("model.vision_select_layer=-2", -2),
    ("model.ps_version=v1", "v1"),
    ("data.normalize_type=siglip", "siglip"),
    ("training.learning_rate=4e-5", 4e-5),
    ("training.num_train_epochs=1", 1.0),
    ("training.data_seed=7", 7),
    ("training.data_seed=None", None),
    ("training.save_total_limit=None", None),
    ("training.eval_steps=10", 10.0),
    ("training.save_steps=0.1", 0.1),
    ('training.lr_scheduler_kwargs={"min_lr_rate": 0.1}', '{"min_lr_rate": 0.1}'),
    ("preference.rpo_alpha=1", 1.0),
    ("preference.rpo_alpha=None", None),
    ("eval.annotation=None", None),
    ("eval.annotation=it's a=b.jsonl", "it's a=b.jsonl"),
    ("loader.sequence_buckets=(64,128)", (64, 128)),
    ("loader.sequence_buckets=64", (64,)),
    ("loader.sequence_buckets=()", ()),
    ("lora.targets=('a','b')", ("a", "b")),
    ("runtime.remat_policy=dots", "dots"),
  ],
)
def test_overrides(tmp_path, override, value):
  config = parse(tmp_path, f"--config.{override}")
  found = config_lib.get(config, override.split("=")[0])
  assert (found, type(found)) == (value, type(value))
  assert not list(config_lib._type_problems(config))


def test_every_field_can_be_overridden(tmp_path):
  for path, field in FIELDS.items():
    value = {"None": None, "()": ()}.get(str(field.default), field.default)
    config = parse(tmp_path, f"--config.{path}={value}")
    found = config_lib.get(config, path)
    assert (found, type(found)) == (field.default, type(field.default)), path


def test_override_forms_of_absl(tmp_path):
  config = parse(
    tmp_path,
    "--config.model.freeze_llm",
    "--noconfig.model.grad_checkpoint",
    "--config.training.seed",
    "5",
    "--config.lora.targets=a",
    "--config.lora.targets=b",
    "--config.training.save_total_limit=None",
    "--config.training.save_total_limit=2",
  )
  assert config.model.freeze_llm and not config.model.grad_checkpoint
  assert config.training.seed == 5 and config.training.save_total_limit == 2
  assert config.lora.targets == ("a", "b")


@pytest.mark.parametrize(
  ("override", "message"),
  [
    (
      "--config.model.freeze_lm=True",
      "--config.model.freeze_lm: there is no such field; did you mean model.freeze_llm?",
    ),
    ("--config.learning_rate=1", "did you mean training.learning_rate?"),
    ("--config.trainig.seed=1", "did you mean training.seed?"),
    ("--config.training.save_only_model=True", "there is no such field; a checkpoint is there to go on from"),
    ("--config.model=x", "is a group of fields"),
    ("--config.training.seed=ten", "--config.training.seed=ten must be int"),
    ("--config.training.seed=None", "--config.training.seed=None must be int"),
    ("--config.model.drop_path_rate=much", "must be float"),
    ("--config.model.freeze_llm=maybe", "must be bool"),
    ("--config.model.ps_version=v3", "must be 'v1' or 'v2'"),
    ("--config.training.data_seed=x", "must be int or None"),
    ("--config.loader.sequence_buckets=(64,", "must be tuple of int"),
    ("stray", "unexpected argument 'stray'"),
  ],
)
def test_refused_overrides(tmp_path, override, message):
  with pytest.raises(UserError) as error:
    parse(tmp_path, override)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_all_unknown_overrides_are_named_at_once(tmp_path):
  with pytest.raises(UserError, match=r"(?s)freeze_lm:.*sead:"):
    parse(tmp_path, "--config.model.freeze_lm=True", "--config.training.sead=1")


@pytest.mark.parametrize(
  ("recipe", "arg", "message"),
  [
    ("x = 1", "", "has no function get_config"),
    ("def get_config(): return None", "", "get_config returned NoneType"),
    ("def get_config(): return 1", ":8b", "does not take the argument '8b'"),
    ("def get_config(arg): return 1", "", "does not take no argument"),
    ("def get_config(arg=''): raise ValueError(f'no size {arg}')", ":9b", "no size 9b"),
    (
      "from internvl_jax.config import TrainConfig\ndef get_config():\n  TrainConfig().model.freeze_lm = True",
      "",
      "recipe.py:3: model.freeze_lm: there is no such field; did you mean model.freeze_llm?",
    ),
    (
      "from internvl_jax.arguments import MeshConfig\ndef get_config():\n  return MeshConfig(fsdb=1)",
      "",
      "recipe.py:3: mesh.fsdb: there is no such field; did you mean mesh.fsdp?",
    ),
    (
      "from internvl_jax.config import TrainConfig\ndef get_config():\n  TrainConfig().modle = 1",
      "",
      "TrainConfig has no group 'modle'; did you mean model?",
    ),
    (
      "from internvl_jax.config import TrainConfig\nc = TrainConfig(modl=1)",
      "",
      "TrainConfig has no group 'modl'; did you mean model?",
    ),
  ],
)
def test_refused_recipes(tmp_path, recipe, arg, message):
  with pytest.raises(UserError) as error:
    parse(tmp_path, recipe=recipe, arg=arg)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_a_bug_in_a_recipe_keeps_its_traceback(tmp_path):
  with pytest.raises(RuntimeError, match="recipe failed at") as error:
    parse(tmp_path, recipe="def get_config():\n  return len(3)")
  assert isinstance(error.value.__cause__, TypeError)


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["command"], "--config is missing; name"),
    (["command", "recipe.py"], r"--config is missing \(there is 'recipe.py'\)"),
    (["command", "--config.training.seed=1"], "--config is missing"),
    (["command", "--config=nowhere.py"], "--config=nowhere.py: no such recipe file"),
  ],
)
def test_a_recipe_must_be_there(argv, message):
  values = flags.FlagValues()
  cli.define_config_flag(values, argv)
  with pytest.raises(UserError, match=message):
    cli.parse_flags(argv, values)


SCRIPT = """
from internvl_jax import cli, config
from internvl_jax.errors import UserError
CONFIG = cli.define_config_flag()
def main(_):
  c = CONFIG.value
  if c.training.seed == 1: raise UserError("first\\nsecond")
  if c.training.seed == 2: open("nowhere.txt")
  if c.training.seed == 3: raise ValueError("bug")
  print(c.model.freeze_llm, c.model.mlp_path, c.loader.sequence_buckets)
if __name__ == "__main__":
  cli.run_app(main)
"""


@pytest.mark.parametrize(
  ("override", "code", "out", "err"),
  [
    ("--config.loader.sequence_buckets=(64,128)", 0, "False None (64, 128)\n", ""),
    ("--config.model.freeze_lm=1", 1, "", "error: --config.model.freeze_lm: there is no such field"),
    ("--config.training.seed=1", 1, "", "error: first\n  second\n"),
    ("--config.training.seed=2", 1, "", "error: cannot open 'nowhere.txt': No such file or directory\n"),
    ("--config.training.seed=3", 1, "", "Traceback"),
  ],
)
def test_a_command_ends_with_a_line_for_a_users_mistake_only(tmp_path, override, code, out, err):
  (tmp_path / "script.py").write_text(SCRIPT)
  (tmp_path / "recipe.py").write_text(RECIPE)
  done = subprocess.run(
    [sys.executable, "script.py", "--config", "recipe.py", override],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert (done.returncode, done.stdout) == (code, out)
  assert done.stderr.startswith(err)
  assert ("Traceback" in done.stderr) == (err == "Traceback")


def test_reading_a_configuration_does_not_need_jax():
  code = "import sys, internvl_jax.cli; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- Refusals -----------------------------------------------------------------------------------------------


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
    ({"loss_type": "sigmoid", "sigmoid_loss_weight": 0.0}, "sigmoid_loss_weight=0 optimises nothing"),
    (
      {"loss_type": "sigmoid", "precompute_reference": True, "reference_cache_dir": "hdfs://a/b"},
      "'hdfs://a/b': runs write to folders, gs:// and s3:// only",
    ),
    ({"loss_type": "ipo,sigmoid,ipo"}, "names 'ipo' 2 times; name it once, with preference.ipo_loss_weight"),
  ],
)
def test_preferences_that_contradict_themselves(config, settings, words):
  for name, value in settings.items():
    set_field(config, f"preference.{name}", value)
  (line,) = problems(config)
  assert words in line


def test_held_out_pairs_that_are_not_there(config):
  set_field(config, "preference.loss_type", "sigmoid")
  set_field(config, "preference.eval_meta_path", "nowhere.json")
  assert problems(config) == ["preference.eval_meta_path='nowhere.json': no such file"]


def test_a_recipe_of_preferences_is_sound(config):
  for name, value in {"loss_type": "sigmoid,bco_pair", "rpo_alpha": 1.0, "sigmoid_loss_weight": 0.8}.items():
    set_field(config, f"preference.{name}", value)
  assert problems(config) == []


@pytest.mark.parametrize("path", RANGES)
def test_every_range_refuses(config, path):
  allowed = RANGES[path]
  bad = allowed.low - 1 if allowed.low > -float("inf") else float("nan")
  if "float" not in config_lib.type_name(FIELDS[path].type):
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


def test_paths_that_are_there_but_wrong(config, tmp_path):
  (tmp_path / "empty").mkdir()
  config.model.model_name_or_path = str(tmp_path / "empty")
  config.training.output_dir = config.data.meta_path
  config.eval.annotation = str(tmp_path / "eval.jsonl")
  config.eval.root = str(tmp_path / "none")
  found = "\n".join(problems(config))
  assert "holds no config.json" in found
  assert "is a file; name a folder" in found
  assert "eval.root=" in found and "no such folder" in found


def test_hub_ids_pass_and_parts_may_take_the_models_place(config, tmp_path):
  config.model.model_name_or_path = "OpenGVLab/InternVL2_5-1B@main"
  config.model.mlp_path = str(tmp_path / "model")
  assert not problems(config)
  config.model.model_name_or_path = None
  config.model.vision_path = "OpenGVLab/InternViT-300M-448px-V2_5"
  config.model.llm_path = str(tmp_path / "model")
  config.model.mlp_path = str(tmp_path / "mlp.pth")
  # Planning reads no weights.
  assert not problems(config, "plan") and "no such file" in problems(config)[0]
  (tmp_path / "mlp.pth").write_text("")
  assert not problems(config)
  code = (
    "import sys, internvl_jax.config as c; c._is_hub_id('a/b'); sys.exit('huggingface_hub' in sys.modules)"
  )
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("path", ["model.vision_path", "model.llm_path", "model.mlp_path"])
def test_the_output_never_covers_a_part(config, tmp_path, path):
  model = tmp_path / "out"
  model.mkdir()
  (model / "config.json").write_text("{}")
  (model / "mlp.safetensors").write_text("")
  config.model.model_name_or_path = None
  config.model.vision_path = config.model.llm_path = "org/name"
  set_field(config, path, str(model / "mlp.safetensors" if path == "model.mlp_path" else model))
  (line,) = problems(config)
  assert line.startswith(f"{path}=") and "write to a folder of its own" in line


@pytest.mark.parametrize("inside", ["", "checkpoints/5", "adapter"])
def test_the_output_never_covers_the_model(config, tmp_path, inside):
  model = tmp_path / "out" / inside
  model.mkdir(parents=True)
  (model / "config.json").write_text("{}")
  config.model.model_name_or_path = str(model)
  (line,) = problems(config)
  assert "write to a folder of its own" in line
  config.training.output_dir = str(tmp_path / "elsewhere")
  assert not problems(config)


def test_remote_paths_are_left_to_who_opens_them(config):
  config.model.model_name_or_path = "gs://bucket/model"
  config.data.meta_path = "gs://bucket/meta.json"
  assert not problems(config)


def test_an_output_directory_on_a_web_server_is_refused(config):
  config.training.output_dir = "s3://bucket/out"
  assert not problems(config)
  config.training.output_dir = "https://host/out"
  (line,) = problems(config)
  assert line.startswith(
    "training.output_dir='https://host/out': runs write to folders, gs:// and s3:// only"
  )


@pytest.mark.parametrize(
  ("name", "told"),
  [
    ("s3://", "names no bucket; write s3://bucket/folder"),
    ("gs:///run", "names no bucket; write gs://bucket/folder"),
    ("gs:/bucket/run", "did you mean gs://bucket/run?"),
  ],
)
def test_half_a_url_makes_no_folder_of_that_name(config, name, told):
  config.training.output_dir = name
  (line,) = problems(config)
  assert line.startswith(f"training.output_dir={name!r}") and line.endswith(told)


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


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (
      ("--learning_rate=1",),
      "--learning_rate: a field of the recipe; write --config.training.learning_rate=...",
    ),
    (("--model_name_or_path=x",), "write --config.model.model_name_or_path=..."),
    (("--use_custom_flash_attn=1",), "there is no such flag; runtime.attention names"),
    (("--nope=1",), "--nope: there is no such flag"),
    (("--confg=x",), "--confg: there is no such flag; did you mean --config?"),
    (("--config.training.ddp_timeout=1",), "there is no such field; runtime.hang_seconds"),
    (("--config.training.lerning_rate=1",), "did you mean training.learning_rate?"),
  ],
)
def test_flags_of_the_reference_are_answered(tmp_path, args, message):
  with pytest.raises(UserError) as error:
    parse(tmp_path, *args)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_a_far_name_is_not_suggested(tmp_path):
  with pytest.raises(UserError, match=r"there is no such field$"):
    parse(tmp_path, "--config.training.nope=1")


@pytest.mark.parametrize(
  ("recipe", "message"),
  [
    ("def get_config(:\n", r"recipe.py:1: "),
    ("import nowhere_to_be_found\n", r"recipe.py:1: No module named 'nowhere_to_be_found'; install it, or"),
  ],
)
def test_a_recipe_that_cannot_be_read_is_a_line(tmp_path, recipe, message):
  with pytest.raises(UserError, match=message) as error:
    parse(tmp_path, recipe=recipe)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help_lists_a_commands_own_flags_and_all_fields(command):
  done = subprocess.run(
    [sys.executable, "-m", f"internvl_jax.{command}", "--helpfull"],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0 and "grain_num" not in done.stdout
  if command == "evaluate":
    assert "--annotation\n" in done.stdout and "--config" not in done.stdout
    return
  assert "--config\n" in done.stdout
  for path in FIELDS:
    assert f"\n  {path.rpartition('.')[2]}: " in done.stdout, path
  assert "learning_rate: float = 5e-05" in done.stdout


def test_every_field_is_commented():
  for leaf in LEAVES.values():
    comments = field_comments(leaf)
    assert len(set(comments.values())) == len(comments), "fields share a comment"
    assert [field.name for field in dataclasses.fields(leaf) if not comments.get(field.name)] == []
