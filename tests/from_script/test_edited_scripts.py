"""Launch scripts as people edit them: the recipe says the same, or the script is refused with the line."""

import re
from pathlib import Path

import pytest

from internvl_jax.config import FIELDS, get
from internvl_jax.config_checks import value_problems
from internvl_jax.errors import UserError
from internvl_jax.from_script import sandbox
from internvl_jax.from_script.run import convert
from internvl_jax.metrics import writers
from internvl_jax.recipe_files import load_recipe
from tests.support.launch_scripts import FULL, LORA, SFT_3_5, script_of

BASE = "internvl2_5/finetune:8b,lora"
TORCHRUN = script_of(LORA)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return tmp_path


def read(text, *arguments, file="mine.sh", number=None, **variables):
  """The configuration of the recipe that a script becomes, its text, and what is said."""
  Path(file).parent.mkdir(exist_ok=True)
  Path(file).write_text(text)
  recipe, said = convert(file, variables, arguments, number=number, file="mine.py")
  Path("mine.py").write_text(recipe)
  config = load_recipe("mine.py")
  assert value_problems(config) == []
  return config, recipe, said


def changes(config, base=BASE):
  published = load_recipe(base)
  return {path: get(config, path) for path in FIELDS if get(config, path) != get(published, path)}


def put(argument, value, text=TORCHRUN):
  """The script with another value of an argument."""
  changed = re.sub(rf"--{argument} \S+ ", f"--{argument} {value} ", text)
  assert changed != text
  return changed


def line_of(text, words):
  return next(number for number, line in enumerate(text.splitlines(), 1) if words in line)


ARRAY = TORCHRUN.replace(
  "torchrun", "ARGS=(--learning_rate 1e-5\n  # a comment\n  --warmup_ratio 0.1)\ntorchrun"
).replace("  2>&1", '  "${ARGS[@]}" 2>&1')
CASE = put("learning_rate", "$LR", put("model_name_or_path", "$MODEL")).replace(
  "set -x",
  'SIZE=${SIZE:-8B}\ncase $SIZE in\n  2B) LR=2e-5 ;;\n  *) LR=4e-5 ;;\nesac\nMODEL="OpenGVLab/InternVL2_5-$SIZE"',
)
EXPORTED = put("learning_rate", '"${LR}"').replace("set -x", "export LR=3e-5 EPOCHS=2\nset -x")
FUNCTION = TORCHRUN.replace("torchrun", "train() {\ntorchrun") + "}\ntrain\n"
SBATCH = "#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=8\n" + script_of(
  FULL, "srun python -u internvl/train/PROGRAM.py \\"
)
SET_UP = "source ~/.bashrc\nconda activate internvl\nmodule load cuda/12.1\npip install -r requirements.txt\nulimit -n 65535\n"

# name: script, arguments, variables, what differs from the recipe.
RIGHT = {
  "as it is": (TORCHRUN, (), {}, {}),
  "its own file of data": (put("meta_path", '"my data/meta.json"'), (), {}, {"data.meta_path": "my data/meta.json"}),
  "a value after =": (put("learning_rate", "1e-6").replace("rate 1e-6", "rate=1e-6"), (), {}, {"training.learning_rate": 1e-6}),
  "an exported variable": (EXPORTED, (), {}, {"training.learning_rate": 3e-5}),
  "$@": (
    TORCHRUN.replace("  2>&1", '  "$@" 2>&1'),
    ("--learning_rate", "2e-5", "--bf16", "False"),
    {},
    {"training.learning_rate": 2e-5, "training.bf16": False},
  ),
  "an array with a comment": (ARRAY, (), {}, {"training.learning_rate": 1e-5, "training.warmup_ratio": 0.1}),
  "all in a line": (TORCHRUN.replace("\\\n", " "), (), {}, {}),
  "a function": (FUNCTION, (), {}, {}),
  "setting up a shell": (SET_UP + TORCHRUN, (), {}, {}),
  "other devices": (TORCHRUN, (), {"GPUS": "4"}, {"mesh.fsdp": 4, "training.gradient_accumulation_steps": 1}),
  "another batch": (
    TORCHRUN,
    (),
    {"GPUS": "4", "BATCH_SIZE": "64", "PER_DEVICE_BATCH_SIZE": "2"},
    {
      "mesh.fsdp": 4,
      "training.per_device_train_batch_size": 2,
      "training.gradient_accumulation_steps": 8,
    },
  ),
  "exec and env": (TORCHRUN.replace("torchrun", "exec env NCCL_DEBUG=INFO torchrun").replace("2>&1 | tee", "# "), (), {}, {}),
  "bash -c": ("bash -c '" + TORCHRUN.replace("'", "") + "'\n", (), {}, {}),
  "python -m": (TORCHRUN.replace("torchrun", "python -m torch.distributed.run"), (), {}, {}),
  "deepspeed": (
    script_of(LORA, "deepspeed --include localhost:0,1 internvl/train/PROGRAM.py \\"),
    (),
    {},
    {},
  ),
  "accelerate": (
    script_of(LORA, "accelerate launch --num_processes 2 -m internvl.train.PROGRAM \\"),
    (),
    {},
    {},
  ),
  "booleans": (put("do_train", "").replace('--dynamic_image_size "True"', "--dynamic_image_size"), (), {}, {}),
  "no port is free": (
    TORCHRUN.replace("=34229", "=$(python -c 'import socket')"), (), {}, {}
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_an_edited_script_becomes_a_recipe_that_says_the_same(name):
  text, arguments, variables, expected = RIGHT[name]
  config, recipe, _ = read(text, *arguments, **variables)
  assert changes(config) == expected
  assert f'BASE = "{BASE}' in recipe


NESTED = "A=$((2 * \n" + TORCHRUN
REFUSED = {
  "a variable without a value": (
    put("meta_path", "$DATA/meta.json"),
    "mine.sh: variables that have no value: DATA (line {--meta_path}); add DATA=... to the command",
  ),
  "several": (
    put("meta_path", "$DATA/meta.json").replace("set -x", 'if [ -n "$DEBUG" ]; then set -x; fi'),
    "variables that have no value: DEBUG (line 1), DATA (line {--meta_path}); add DEBUG=... DATA=... to the command",
  ),
  "an argument of the script": ("LR=$1\n" + put("learning_rate", "$LR"), "mine.sh, line 1: $1 has no value; give the"),
  "if without fi": (TORCHRUN.replace("\nfi\n", "\n"), "syntax error: unexpected end of file"),
  "a quote too many": (TORCHRUN.replace('"internvl2_5"', '"internvl2_5'), "mine.sh, line "),
  "an expression": (TORCHRUN.replace("/ GPUS))", "/ 0))"), "mine.sh, line 6: BATCH_SIZE / PER_DEVICE_BATCH_SIZE / 0: division by 0"),
  "a comment among the arguments": (
    TORCHRUN.replace('  --bf16 "True"', '  # --seed 1 \\\n  --bf16 "True"'),
    "mine.sh, line {--bf16}: --bf16 is an argument of no command: the line before is a comment",
  ),
  "a misspelt argument": (
    TORCHRUN.replace("--learning_rate", "--lerning_rate"),
    "mine.sh, line {--lerning_rate}: --lerning_rate is no argument of the reference's programs; did you mean learning_rate?",
  ),
  "a wrong value": (put("learning_rate", "4e-5x"), "mine.sh, line {--learning_rate}: --learning_rate 4e-5x must be float"),
  "two values": (put("learning_rate", "4e-5 4e-6"), "line {--learning_rate}: --learning_rate has one value, but there are 4e-5 4e-6"),
  "no batch": (TORCHRUN.replace(":-16", ":-4"), "mine.sh, line {torchrun}: --per_device_train_batch_size 4 and --gradient_accumulation_steps 0"),
  "a contradiction": (put("max_dynamic_patch", "6 --min_dynamic_patch 9"), "mine.sh, line {torchrun}: data.min_dynamic_patch=9 is above"),
  "cards are counted": (
    TORCHRUN.replace("${GPUS:-2}", "$(nvidia-smi -L | wc -l)"),
    "mine.sh: what nvidia-smi (line {nvidia-smi}) would print decides about the launch",
  ),
  "cards are counted for the launcher": (
    TORCHRUN.replace("=${GPUS}", "=$(nvidia-smi -L | wc -l)"),
    "mine.sh: what nvidia-smi (line {nvidia-smi}) would print decides about the launch",
  ),
  "Python calculates": (
    TORCHRUN.replace("$((BATCH_SIZE / PER_DEVICE_BATCH_SIZE / GPUS))", "$(python -c 'print(16//4//2)')"),
    "mine.sh: what python (line {python -c}) would print decides about the launch",
  ),
  "a loop": (
    "for LR in 1e-5 2e-5; do\nOUT=out/$LR\n" + put("learning_rate", "$LR", put("output_dir", "$OUT")) + "done\n",
    "mine.sh: starts 2 trainings; choose with --launch N: 1 is internvl/train/internvl_chat_finetune.py (line {torchrun}) "
    "to out/1e-5; 2 is ",
  ),
  "another program": ("python -u eval/evaluate.py --output_dir x\n", "mine.sh: starts no training of the reference"),
  "an error before": ("echo no data; exit 3\n" + TORCHRUN, "its last words: 'no data'"),
  "not a launcher": (TORCHRUN.replace("torchrun", "torchrunn"), "not run: torchrunn (line {torchrunn})"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_edited_script_is_refused_with_the_line(name):
  text, message = REFUSED[name]
  for words in re.findall(r"\{(.*?)\}", message):
    message = message.replace(f"{{{words}}}", str(line_of(text, words)))
  with pytest.raises(UserError) as error:
    read(text)
  assert message in str(error.value)


def test_lines_are_those_of_the_script():
  assert read(TORCHRUN)[2].startswith(
    f"mine.sh, line {line_of(TORCHRUN, 'torchrun')}: torchrun internvl/train"
  )
  nested = "\n\n" + RIGHT["bash -c"][0]
  assert read(nested)[2].startswith("mine.sh, line 3: torchrun internvl/train")


def test_variables_and_arguments_mend_what_was_refused():
  config, *_ = read(put("meta_path", "$DATA/meta.json"), DATA="d")
  assert config.data.meta_path == "d/meta.json"
  config, *_ = read("LR=$1\n" + put("learning_rate", "$LR"), "1e-4")
  assert config.training.learning_rate == 1e-4
  text, _ = REFUSED["a loop"]
  config, *_ = read(text, number=2)
  assert changes(config) == {"training.learning_rate": 2e-5, "training.output_dir": "out/2e-5"}


def test_the_recipe_of_another_size_is_nearer():
  config, recipe, _ = read(CASE, SIZE="2B")
  assert 'BASE = "internvl2_5/finetune:2b,lora"' in recipe
  assert changes(config, "internvl2_5/finetune:2b,lora") == {
    "training.learning_rate": 2e-5,
    "training.output_dir": load_recipe(BASE).training.output_dir,
    "training.weight_decay": 0.05,
  }


def test_variables_of_this_shell_are_the_scripts_too(monkeypatch):
  monkeypatch.setenv("GPUS", "4")
  config, _, said = read(TORCHRUN)
  assert config.mesh.fsdp == 4 and "variables of this shell that the script reads: GPUS" in said


def test_what_several_hosts_train():
  config, _, said = read(script_of(SFT_3_5))
  assert changes(config, "internvl3_5/sft:8b") == {}
  assert "assumed, as one host has them: WORLD_SIZE=1" in said
  config, recipe, _ = read(script_of(SFT_3_5), WORLD_SIZE="4")
  assert changes(config, "internvl3_5/sft:8b") == {
    "mesh.fsdp": 32,
    "training.gradient_accumulation_steps": 16,
  }
  assert 'BASE = "internvl3_5/sft:8b,devices=32"' in recipe
  config = load_recipe("mine.py:devices=8")
  assert changes(config, "internvl3_5/sft:8b") == {"mesh.fsdp": 8}


def test_a_batch_jobs_tasks_are_its_devices():
  config, recipe, _ = read(SBATCH)
  assert 'BASE = "internvl2_5/finetune:8b,devices=16,batch=256"' in recipe  # Its own GPUS is 8 still.
  assert config.training.gradient_accumulation_steps == 4


def test_devices_that_do_not_divide_leave_rows_unshared():
  text = script_of("internvl3.0/2nd_finetune/internvl3_14b_dynamic_res_2nd_finetune_full")
  config, recipe, _ = read(text, GPUS="1")
  assert (config.mesh.sequence, config.mesh.fsdp) == (1, 1)
  assert config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps == 128
  assert "def get_config() -> TrainConfig:" in recipe
  with pytest.raises(UserError, match="does not take the argument"):
    load_recipe("mine.py:devices=2")


def test_devices_that_are_left_open_stay_open():
  config, _, said = read(TORCHRUN.replace("=${GPUS}", "=gpu"))
  assert config.mesh.fsdp == -1 and changes(config) == {} and "on as many devices as there are" in said


def test_arguments_in_a_json_file():
  Path("arguments.json").write_text(
    '{"model_name_or_path": "OpenGVLab/InternVL2_5-8B", "freeze_llm": true, "learning_rate": 1e-6, "report_to": ["none"]}'
  )
  config, *_ = read("torchrun --nproc_per_node=1 internvl/train/internvl_chat_finetune.py arguments.json\n")
  assert (
    config.model.freeze_llm and config.training.learning_rate == 1e-6 and config.training.report_to == "none"
  )


def test_what_has_no_field_is_said_with_its_reason():
  more = "--log_level info --neftune_noise_alpha 5 --hub_token hf_secret --optim lion_8bit --fp16 True --tf32 False"
  config, recipe, said = read(put("bf16", f"False {more}"))
  assert changes(config) == {"training.bf16": False}
  lost, left = said.split("NOT carried over:")[1].split("left out, with no change")
  for words in (
    "--neftune_noise_alpha 5: no noise",
    "--optim lion_8bit:",
    "--fp16 True:",
    "--hub_token ***:",
  ):
    assert words in lost and words in recipe
  for words in (
    "--log_level info: ",
    "--deepspeed zero_stage1_config.json: mesh.fsdp",
    "--overwrite_output_dir True: ",
  ):
    assert words in left
  assert "tf32" not in said and "hf_secret" not in said + recipe


def test_trackers_are_kept_where_there_are_such(monkeypatch):
  monkeypatch.setattr(writers, "is_installed", lambda name: name == "tensorboard")
  text = put("report_to", "wandb tensorboard --run_name first")
  Path("mine.sh").write_text(text)
  recipe, said = convert("mine.sh", {}, (), number=None, file="mine.py")
  assert (
    'config.training.report_to = "wandb,tensorboard"' in recipe
    and "pip install 'internvl_jax[wandb]'" in said
  )
  config, _, said = read(put("report_to", "comet_ml"))
  assert (
    config.training.report_to == "tensorboard"
    and "--report_to comet_ml: " in said.split("NOT carried over")[1]
  )


def test_offloading_is_said_of_a_file_that_is_there():
  Path("zero_stage1_config.json").write_text(
    '{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}'
  )
  assert "offload: is not done here" in " ".join(read(TORCHRUN)[2].split())


def test_mpo_programs_set_losses_of_their_own():
  text = script_of("internvl3.0/mpo/internvl3_8b_mpo")
  own = re.sub(r"--(loss_type|sigmoid_loss_weight|bco_pair_loss_weight|rpo_alpha) \S+ ", "", text)
  config, _, said = read(own)
  assert config.preference.terms == (("sigmoid", 1.0),) and config.preference.rpo_alpha is None
  assert "sets by itself: preference.loss_type='sigmoid'" in said
  config, *_ = read(own.replace("InternVL3-8B-Instruct", "InternVL3_5-8B-Instruct"))
  assert config.preference.terms == (("sigmoid", 0.8), ("bco_pair", 0.2)) and config.preference.rpo_alpha == 1


def test_what_was_not_run_is_said():
  said = read(SET_UP + TORCHRUN)[2]
  if sandbox.has_namespaces():
    assert "not run: conda (line 2), module (line 3), pip (line 4), " in said and "/.bashrc" in said


def test_hosts_that_differ_in_their_rank_alone_train_once():
  text = "for RANK in 0 1; do\n" + TORCHRUN.replace("--nnodes=1", "--nnodes=2 --node_rank=$RANK") + "done\n"
  config, *_ = read(text)
  assert config.mesh.fsdp == 4 and config.training.gradient_accumulation_steps == 2


# --- What needs a file system of its own --------------------------------------------------------------------

namespaces = pytest.mark.skipif(not sandbox.has_namespaces(), reason="no namespaces here")


@namespaces
def test_another_folder_is_said():
  config, _, said = read("cd /data/InternVL/internvl_chat\n" + TORCHRUN)
  assert (
    changes(config) == {} and "start the training there" in said and "/data/InternVL/internvl_chat" in said
  )


@namespaces
def test_a_script_of_a_folder_of_scripts():
  config, _, said = read('cd "$(dirname "$0")/.."\n' + TORCHRUN, file="shell/mine.sh")
  assert changes(config) == {} and "start the training there" not in said


@namespaces
def test_a_job_in_the_background_that_writes_a_log_elsewhere():
  text = TORCHRUN.replace("torchrun", "nohup /opt/conda/bin/torchrun").replace(
    "2>&1 | tee -a", "&> /logs/x.log & #"
  )
  config, *_ = read(text)
  assert changes(config) == {}
  assert not Path("/logs/x.log").exists()


@namespaces
def test_files_that_are_sourced_are_read():
  Path("config.sh").write_text("LR=7e-5\nDATA=$ROOT/d\n")
  text = "source config.sh\n" + put("learning_rate", "$LR", put("meta_path", "$DATA/meta.json"))
  with pytest.raises(UserError, match=r"ROOT \(line 2\); add ROOT=\.\.\."):
    read(text)
  config, *_ = read(text, ROOT="r")
  assert changes(config) == {"training.learning_rate": 7e-5, "data.meta_path": "r/d/meta.json"}
  with pytest.raises(UserError, match=r"mine.sh, line 1: other.sh: No such file or directory"):
    read(text.replace("config.sh", "other.sh"))
