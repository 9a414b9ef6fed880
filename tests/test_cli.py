"""Command lines: recipes and overrides, and how a mistake in them is told."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from internvl_jax import cli, config_checks
from internvl_jax.config import FIELDS, get
from internvl_jax.errors import UserError
from internvl_jax.help_text import config_text
from tests.support.configurations import RECIPE, parse
from tests.test_house import FRONT_DOORS

ROOT = Path(__file__).parent.parent

# --- Overrides ----------------------------------------------------------------------------------------------


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
  found = get(config, override.split("=")[0])
  assert (found, type(found)) == (value, type(value))
  assert not list(config_checks._type_problems(config))


def test_every_field_can_be_overridden(tmp_path):
  for path, field in FIELDS.items():
    value = {"None": None, "()": ()}.get(str(field.default), field.default)
    config = parse(tmp_path, f"--config.{path}={value}")
    found = get(config, path)
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
    ("--config.training.vit_lr=1", "there is no such field; training.vision_lr is its name here"),
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
from internvl_jax.help_text import config_text
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


def run_script(folder, *arguments):
  (folder / "script.py").write_text(SCRIPT)
  (folder / "recipe.py").write_text(RECIPE)
  return subprocess.run(
    [sys.executable, "script.py", "--config", "recipe.py", *arguments],
    cwd=folder,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )


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
  done = run_script(tmp_path, override)
  assert (done.returncode, done.stdout) == (code, out)
  assert done.stderr.startswith(err)
  assert ("Traceback" in done.stderr) == (err == "Traceback")


def test_print_config_has_a_line_for_each_field_and_marks_what_differs(tmp_path):
  config = parse(
    tmp_path,
    "--config.model.freeze_llm=True",
    "--config.data.meta_path=https://me:secret@host/meta.json",
    "--config.loader.sequence_buckets=(64,128)",
  )
  lines = config_text(config).split("\n")
  assert [line[2:].split(" = ")[0] for line in lines] == list(FIELDS)
  assert [line for line in lines if line.startswith("* ")] == [
    "* model.freeze_llm = True  (default: False)",
    "* data.meta_path = 'https://***@host/meta.json'  (default: None)",
    "* training.save_total_limit = 3  (default: None)",
    "* loader.sequence_buckets = (64, 128)  (default: ())",
    "* eval.annotation = 'questions.jsonl'  (default: None)",
  ]
  assert all(line.startswith(("* ", "  ")) for line in lines)
  assert config_text(config) == "\n".join(lines)


def test_print_config_takes_the_place_of_what_the_command_does(tmp_path):
  done = run_script(tmp_path, "--config.training.seed=3", "--print_config")
  assert (done.returncode, done.stderr) == (0, "")
  assert "* training.seed = 3  (default: 42)\n" in done.stdout


HELP = """
import runpy, sys
sys.argv = ["command", "--help"]
try:
  runpy.run_module("internvl_jax." + sys.orig_argv[-1], run_name="__main__", alter_sys=True)
finally:
  heavy = {"jax", "flax", "optax", "orbax", "grain", "transformers", "numpy", "torch"}
  print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("command", FRONT_DOORS)
def test_help_is_answered_before_anything_heavy_is_imported(command):
  done = subprocess.run(
    [sys.executable, "-c", HELP, command], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert (done.returncode, done.stderr) == (0, "[]\n")
  assert f"python -m internvl_jax.{command} --" in done.stdout and "\nflags:\n  --" in done.stdout


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (("--nope=1",), "--nope: there is no such flag"),
    (("--confg=x",), "--confg: there is no such flag; did you mean --config?"),
    (("--config.training.ddp_timeout=1",), "there is no such field; runtime.hang_seconds"),
    (("--config.training.lerning_rate=1",), "did you mean training.learning_rate?"),
  ],
)
def test_flags_that_there_are_not_are_answered(tmp_path, args, message):
  with pytest.raises(UserError) as error:
    parse(tmp_path, *args)
  assert message in str(error.value) and "\n" not in str(error.value)


PASTED = """
--model_name_or_path "OpenGVLab/InternVL2_5-8B" --freeze_llm True --use_llm_lora 16 --conv_style internvl2_5
--output_dir 'my runs/one' --lr_scheduler_kwargs '{"min_lr_rate": 0.1}' --loss_weights 0.8 0.2 --bf16 --do_train
--overwrite_output_dir True --deepspeed zero_stage1_config.json --log_level info --neftune_noise_alpha 5 --tf32 False
--nproc_per_node 8 --seed x
"""


@pytest.mark.parametrize("named", [True, False], ids=["with a recipe", "without"])
def test_arguments_of_the_reference_are_answered_all_at_once(tmp_path, named):
  recipe = tmp_path / "recipe.py"
  recipe.write_text(RECIPE)
  words = [*([f"--config={recipe}"] if named else []), "--config.training.seed", "7", *shlex.split(PASTED)]
  argv = ["command", *words]
  values = flags.FlagValues()
  cli.define_config_flag(values, argv)
  with pytest.raises(UserError) as error:
    cli.parse_flags(argv, values)
  first, command, *others = str(error.value).splitlines()
  assert first.startswith("--model_name_or_path, --freeze_llm, --use_llm_lora, --conv_style, --output_dir, ")
  assert [line.partition(":")[0].partition("; ")[0] for line in others] == [
    "--neftune_noise_alpha 5",
    "--log_level info",
    "--overwrite_output_dir True",
    "--deepspeed zero_stage1_config.json",
    "--nproc_per_node is no argument of the reference's programs",
    "--seed x must be int",
  ]
  # The command can be given as it is.
  argv = ["command", *shlex.split(command.partition(" --")[2].join(["--", ""]))]
  assert (f"--config={recipe}" in argv) == named
  values = flags.FlagValues()
  holder = cli.define_config_flag(values, argv)
  cli.parse_flags(argv, values)
  config = holder.value
  assert config.model.use_llm_lora == 16 and config.model.freeze_llm and config.training.bf16
  assert config.training.output_dir == "my runs/one" and config.training.seed == 7
  assert config.training.lr_scheduler_kwargs == '{"min_lr_rate": 0.1}'
  assert config.preference.loss_weights == (0.8, 0.2)
  assert config.model.freeze_backbone is not named  # The nearest recipe's.


def test_one_argument_of_the_reference(tmp_path):
  with pytest.raises(UserError) as error:
    parse(tmp_path, "--learning-rate=1")
  first, command = str(error.value).splitlines()
  assert first.startswith(
    "--learning_rate is an argument of the reference's programs; here, recipes have fields"
  )
  assert command.endswith("recipe.py --config.training.learning_rate=1.0")


def test_overrides_may_have_a_space(tmp_path):
  config = parse(
    tmp_path,
    *(
      "--config.model.freeze_llm",
      "True",
      "--config.model.grad_checkpoint",
      "false",
      "--config.training.bf16",
    ),
    *("--config.training.greater_is_better", "None", "--config.training.max_steps", "-1"),
    *("--config.training.save_total_limit", "None", "--config.training.ddp_find_unused_parameters", "False"),
    *("--config.model.freeze_mlp", "--config.data.meta_path", "true"),
  )
  assert (config.model.freeze_llm, config.model.grad_checkpoint, config.model.freeze_mlp) == (
    True,
    False,
    True,
  )
  assert config.training.bf16 and config.training.max_steps == -1 and config.data.meta_path == "true"
  assert config.training.greater_is_better is None and config.training.save_total_limit is None
  with pytest.raises(
    UserError, match=r"--noconfig.model.freeze_llm takes no value, but 'True' follows; write --config"
  ):
    parse(tmp_path, "--noconfig.model.freeze_llm", "True")
  with pytest.raises(UserError, match="unexpected argument 'maybe'"):
    parse(tmp_path, "--config.model.freeze_llm", "maybe")


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
