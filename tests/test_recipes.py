"""Every published launch script is a recipe and its argument, and says the same."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from internvl_jax import config as config_lib
from internvl_jax.config import FIELDS
from internvl_jax.config_checks import problems
from internvl_jax.errors import UserError
from internvl_jax.foreign import FOREIGN
from internvl_jax.recipe_files import load_module, load_recipe
from tests.support.launch_scripts import SCRIPTS

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"

# Script -> recipe. The first rule that matches the whole path; then sizes are renamed.
RULES = (
  (r"internvl1.2/2nd_finetune/.*_(yi34b)_.*_full", r"internvl1_2/finetune.py:\1"),
  (r"internvl1.2/2nd_finetune/.*_(yi34b)_.*_lora", r"internvl1_2/finetune.py:\1,lora"),
  (r"internvl1.2/.*_(yi34b)_.*_finetune", r"internvl1_2/stage2.py:\1"),
  (r"internvl1.5/2nd_finetune/.*_(1_8b|3_8b|20b)_.*_full", r"internvl1_5/finetune.py:\1"),
  (r"internvl1.5/2nd_finetune/.*_(1_8b|3_8b|20b)_.*_lora", r"internvl1_5/finetune.py:\1,lora"),
  (r"internvl1.5/.*_(1_8b|3_8b|20b|yi34b)_.*_pretrain", r"internvl1_5/stage1.py:\1"),
  (r"internvl1.5/.*_(1_8b|3_8b|20b|yi34b)_.*_finetune", r"internvl1_5/stage2.py:\1"),
  (r"internvl2.0/2nd_finetune/internvl2_(\d+b)_.*_full", r"internvl2/finetune.py:\1"),
  (r"internvl2.0/2nd_finetune/internvl2_(\d+b)_.*_(lora\w*)", r"internvl2/finetune.py:\1,\2"),
  (r"internvl2.0_mpo/.*/internvl2_(\d+b)_.*", r"internvl2/mpo.py:\1"),
  (r"internvl2.5/2nd_finetune/internvl2_5_(\d+b)_.*_full", r"internvl2_5/finetune.py:\1"),
  (r"internvl2.5/2nd_finetune/internvl2_5_(\d+b)_.*_(lora\w*)", r"internvl2_5/finetune.py:\1,\2"),
  (r"internvl2.5/.*/internvl2_5_(\d+b)_.*_(stage\w+)", r"internvl2_5/\2.py:\1"),
  (r"internvl2.5_mpo/.*/internvl2_5_(\d+b)_.*", r"internvl2_5/mpo.py:\1"),
  (r"internvl3.0/2nd_finetune/internvl3_(\d+b)_.*", r"internvl3/finetune.py:\1"),
  (r"internvl3.0/mpo/internvl3_(\d+b)_mpo", r"internvl3/mpo.py:\1"),
  (r"internvl3_5_gpt_oss/internvl3_5_gpt_oss_(20b)_stage\d_(mlp_)?(\w+)", r"internvl3_5/\3.py:\1"),
  (r"internvl3_5_qwen3/internvl3_5_(\d+b)_(\w+)", r"internvl3_5/\2.py:\1"),
  (r"mini_internvl/domain_adaptation/internvl2_(\d+b)_.*_(\w+)", r"mini_internvl/finetune.py:\1,\2"),
)
# The first generations' scripts name the language model's size, their recipes the whole model's.
SIZES = {"1_8b": "2b", "3_8b": "4b", "20b": "26b", "yi34b": "40b"}

# Arguments that recipes do not pass on, and why.
LEFT_OUT = {
  "deepspeed": "ZeRO files are not ours to ship; mesh.fsdp does what stage 3 does",
  "overwrite_output_dir": "True would make the restart of an interrupted run delete its checkpoints",
  **FOREIGN,
}

# (script, argument) -> the value in place of the script's, where it is a slip.
INSTEAD = {
  # The name of the LoRA run's folder.
  (
    "internvl2.5/2nd_finetune/internvl2_5_26b_dynamic_res_2nd_finetune_full",
    "output_dir",
  ): "work_dirs/internvl_chat_v2_5/internvl2_5_26b_dynamic_res_2nd_finetune_full",
  # The folder that the run itself writes.
  (
    "internvl1.5/phi3_3_8b/internvl_chat_v1_5_phi3_3_8b_dynamic_res_finetune",
    "model_name_or_path",
  ): "./work_dirs/internvl_chat_v1_5_phi3_3_8b_dynamic_res_pretrain",
  # Other folders than those where the next stage's script looks.
  (
    "internvl3_5_gpt_oss/internvl3_5_gpt_oss_20b_stage2_sft",
    "output_dir",
  ): "work_dirs/internvl3_5_gpt_oss_20b_pretrain/internvl3_5_gpt_oss_20b_stage2_sft",
  **{
    (script, "output_dir"): f"work_dirs/{script.split('/')[-1]}"
    for script in SCRIPTS
    if re.fullmatch(r"internvl1.5/.*_pretrain", script)
  },
}

# What the programs of InternVL3.5 set for all that their MPO scripts say: loss_type ['sigmoid', 'bco_pair', 'sft'] with
# loss_weights [0.8, 0.2, 1.0], in TRL's newer words.
SET_BY_PROGRAM = {
  "loss_type": "sigmoid,bco_pair",
  "sigmoid_loss_weight": "0.8",
  "bco_pair_loss_weight": "0.2",
  "rpo_alpha": "1",
}

# Scripts whose rows do not fit on a card of 80 GB -> the cards that share them; as many times the micro-batches.
SHARED = {
  **{
    f"internvl3.0/2nd_finetune/internvl3_{size}_dynamic_res_2nd_finetune_full": 2 for size in ("14b", "78b")
  },
  "internvl3_5_qwen3/internvl3_5_241b_sft": 2,
}

PATHS = {
  path.split(".")[1]: path
  for path in FIELDS
  if path.split(".")[0] in ("model", "data", "training", "preference")
}


def recipe_of(script):
  for pattern, recipe in RULES:
    if match := re.fullmatch(pattern, script):
      size = match[1]
      name = match.expand(recipe)
      return name.replace(f":{size}", f":{SIZES[size]}") if "internvl1" in recipe else name
  raise AssertionError(f"no recipe for {script}")


def load(recipe):
  return load_recipe(str(CONFIGS / recipe))


def recipe_files():
  return sorted(path for path in CONFIGS.rglob("*.py") if not path.name.startswith("_"))


OF_OTHERS = {"internvl3_5/grpo.py"}
"""Recipes of scripts that are not in the reference's repository."""


def is_published(path):
  """Whether it is the recipe of published scripts."""
  return not path.name.startswith("quickstart") and path.parent.name != "examples"


def choices_of(path):
  return getattr(load_module(str(path)), "CHOICES", ("",))


def parsed(name, text):
  """A script's value as its field holds it."""
  field = FIELDS[PATHS[name]]
  words = config_lib.type_name(field.type).split(" or ")
  if text in ("True", "False") and "bool" in words:
    return text == "True"
  kind = next((kind for kind in (int, float) if kind.__name__ in words), str)
  return kind(text)


def test_no_name_is_in_two_leaves():
  assert len(PATHS) == sum(
    path.split(".")[0] in ("model", "data", "training", "preference") for path in FIELDS
  )


def test_scripts_and_recipes_are_one_to_one():
  recipes = [recipe_of(script) for script in SCRIPTS]
  assert len(recipes) == len(set(recipes)) == 117
  ours = [
    f"{path.relative_to(CONFIGS)}:{choice}"
    for path in recipe_files()
    if is_published(path)
    for choice in choices_of(path)
    if str(path.relative_to(CONFIGS)) not in OF_OTHERS
  ]
  assert sorted(recipes) == sorted(ours)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_recipe_says_what_its_script_says(script):
  config = load(recipe_of(script))
  arguments = dict(SCRIPTS[script]["arguments"])
  launch = SCRIPTS[script]["launch"]
  if arguments["gradient_accumulation_steps"] == "BATCH_SIZE / PER_DEVICE_BATCH_SIZE / GPUS":
    devices = launch.get("GPUS") or launch["NPROC_PER_NODE"]  # times the nodes, which are left open: one
    shards = devices // SHARED.get(script, 1)
    steps, rest = divmod(launch["BATCH_SIZE"], launch["PER_DEVICE_BATCH_SIZE"] * shards)
    assert not rest
    arguments["gradient_accumulation_steps"] = str(steps)
  if re.fullmatch(r"internvl3_5.*_mpo", script):
    assert not arguments.keys() & SET_BY_PROGRAM.keys()
    arguments |= SET_BY_PROGRAM
  arguments |= {name: value for (where, name), value in INSTEAD.items() if where == script}
  expected = {
    path: parsed(name, arguments[name])
    if name in arguments and name not in LEFT_OUT
    else FIELDS[path].default
    for name, path in PATHS.items()
  }
  assert arguments.keys() - LEFT_OUT.keys() <= PATHS.keys()
  assert {path: config_lib.get(config, path) for path in expected} == expected
  # What the scripts have no words for stays as it is, but for the mesh.
  others = {path: config_lib.get(config, path) for path in FIELDS if path not in expected}
  assert {path: value for path, value in others.items() if value != FIELDS[path].default} == {
    "mesh.data": 1,
    "mesh.fsdp": -1,
    **({"mesh.sequence": SHARED[script]} if script in SHARED else {}),
  }


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_recipe_passes_the_checks_once_its_files_are_there(script, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = load(recipe_of(script))
  for name in ("model_name_or_path", "vision_path", "llm_path"):
    if (path := getattr(config.model, name)) and not path.startswith(("OpenGVLab/", "openai/")):
      os.makedirs(path)
      (Path(path) / "config.json").write_text("{}")
  for path in (config.model.mlp_path, config.data.meta_path):
    if path:
      Path(path).parent.mkdir(parents=True, exist_ok=True)
      Path(path).write_text("{}")
  assert problems(config, "train") == []


def test_stages_find_what_the_stages_before_wrote():
  configs = [load(recipe_of(script)) for script in SCRIPTS]
  written = {os.path.normpath(config.training.output_dir) for config in configs}
  assert len(written) == 117
  read = [os.path.normpath(config.model.model_name_or_path or "") for config in configs]
  later = [path for path in read if path.startswith("work_dirs")]
  assert len(later) == 16
  assert set(later) <= written


def test_the_readme_names_every_recipe_with_its_sizes():
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  for path in recipe_files():
    (cell,) = re.findall(rf"\({path.relative_to(ROOT)}\)([^|\[]*)", text)
    if is_published(path):
      named = re.findall(r"`:?(\d+b)`", cell)
      assert list(dict.fromkeys(choice.split(",")[0] for choice in choices_of(path))) == named
      assert ("ᴸ" in cell) == any(choice.endswith(",lora") for choice in choices_of(path))


def test_a_recipe_may_start_from_another(tmp_path):
  mine = tmp_path / "mine.py"
  mine.write_text(
    "from internvl_jax.recipe_files import load_recipe\n"
    "def get_config(arg=''):\n"
    f"  config = load_recipe({str(CONFIGS)!r} + '/internvl2_5/finetune.py:' + arg)\n"
    "  config.training.learning_rate = 1e-6\n"
    "  return config\n"
  )
  config = load_recipe(f"{mine}:1b,lora")
  assert config.model.use_llm_lora == 16
  assert config.training.learning_rate == 1e-6


# --- The argument -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", recipe_files(), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_recipe_says_what_it_is_and_how_it_is_started(path):
  text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
  assert text
  (command,) = re.findall(r"^ *python -m internvl_jax\.train (.+)$", text, re.MULTILINE)
  flag, recipe, *overrides = command.split()
  file, _, arg = recipe.partition(":")
  assert flag == "--config"
  assert ROOT / file == path
  assert arg in choices_of(path) or path.parent.name == "examples"
  for override in overrides:
    name, value = override.removeprefix("--config.").split("=")
    assert parsed(name.split(".")[1], value) == value
    assert name in FIELDS
  for choice in choices_of(path):
    assert choice.partition(",")[0] in text
  load(str(path))  # The argument may be left out.


@pytest.mark.parametrize(
  ("arg", "message"),
  [
    (
      "9b",
      "the recipe has no '9b'; it has 1b  2b  4b  8b  26b  38b  78b  1b,lora  2b,lora",
    ),
    ("8b,lorra", "the recipe has no '8b,lorra'; did you mean 8b,lora?; it has 1b  2b"),
    ("8b,lora_coco", "the recipe has no '8b,lora_coco'"),
    (
      "8b,device=4",
      "the recipe's argument has no 'device'; did you mean devices?; it has devices, batch, per_device",
    ),
    ("8b,devices=four", "devices=four: devices must be a number, at least 1"),
    ("8b,devices=0", "devices=0: devices must be a number, at least 1"),
    (
      "8b,devices=24",
      "batch=128 does not divide by per_device=4 times devices=24, 96; add batch=192 to the recipe's argument, or",
    ),
  ],
)
def test_wrong_arguments_are_refused(arg, message):
  with pytest.raises(UserError) as error:
    load(f"internvl2_5/finetune.py:{arg}")
  assert str(error.value).startswith(message)


def test_the_batch_is_kept_on_other_devices():
  for arg, per_device, steps, fsdp in (
    ("8b", 4, 4, -1),
    ("8b,devices=4", 4, 8, 4),
    ("8b,devices=32", 4, 1, 32),
    ("8b,devices=16,per_device=1", 1, 8, 16),
    ("8b,lora,devices=8,batch=32", 4, 1, 8),
  ):
    config = load(f"internvl2_5/finetune.py:{arg}")
    assert config.training.per_device_train_batch_size == per_device
    assert config.training.gradient_accumulation_steps == steps
    assert (config.mesh.data, config.mesh.fsdp) == (1, fsdp)


def test_the_batch_is_kept_where_devices_share_rows():
  for arg, steps, fsdp in (("78b", 4, -1), ("78b,devices=64", 2, 32), ("78b,devices=32,per_device=1", 8, 16)):
    config = load(f"internvl3/finetune.py:{arg}")
    assert config.training.gradient_accumulation_steps == steps
    assert (config.mesh.fsdp, config.mesh.sequence) == (fsdp, 2)
  with pytest.raises(UserError, match="devices=33 does not divide by the 2 that share rows"):
    load("internvl3/finetune.py:78b,devices=33")
  with pytest.raises(UserError, match="per_device=2 times devices=24 by 2, 24; add batch=144"):
    load("internvl3/finetune.py:78b,devices=24")


def test_the_command_line_takes_a_recipe_from_any_folder(tmp_path):
  command = [
    sys.executable,
    "-m",
    "internvl_jax.train",
    f"--config={CONFIGS}/internvl2_5/finetune.py:8b,lora",
  ]
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  result = subprocess.run(
    [*command, "--config.data.meta_path=mine.json"],
    check=False,
    cwd=tmp_path,
    env=environment,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert result.returncode == 1
  assert result.stderr.endswith("error: data.meta_path='mine.json': no such file\n")
