"""`python -m internvl_jax.from_script`."""

import os
import sys
from pathlib import Path

import pytest

from internvl_jax.errors import UserError
from internvl_jax.from_script import __main__ as command
from tests.support import forked
from tests.support.launch_scripts import LORA, script_of


def run(folder, *words):
  return forked.run(["-m", *words], environment=os.environ | {"JAX_NUM_CPU_DEVICES": "1"}, folder=folder)


def test_a_script_becomes_a_recipe_that_train_takes(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "my.finetune.sh").write_text(script_of(LORA).replace("  2>&1", '  "$@" 2>&1'))
  words = ["my.finetune.sh", "GPUS=4", "--output", "recipes/mine.py", "BATCH_SIZE=32", "--", "--seed", "7"]
  done = run(tmp_path, "internvl_jax.from_script", *words)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("my.finetune.sh, line ") and "on 4 devices, 32 rows a step" in done.stdout
  assert done.stdout.endswith(
    "written: recipes/mine.py; to train:\n  python -m internvl_jax.train --config recipes/mine.py\n"
  )
  done = run(tmp_path, "internvl_jax.train", "--config", "recipes/mine.py", "--print_config")
  assert "* training.seed = 7  (default: 42)" in done.stdout and "* mesh.fsdp = 4  " in done.stdout
  again = run(tmp_path, "internvl_jax.from_script", *words)
  assert (again.returncode, again.stdout) == (1, "")
  assert again.stderr.startswith("error: recipes/mine.py is there already; name another file with --output")


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ([], "name a script: python -m internvl_jax.from_script my_finetune.sh"),
    (["GPUS=4", "mine.sh"], "'GPUS=4': no such file; the script comes first"),
    (["mine.sh", "GPUS"], "'GPUS' is no NAME=VALUE; arguments of the script follow --"),
  ],
)
def test_words_that_are_refused(tmp_path, monkeypatch, words, message):
  monkeypatch.chdir(tmp_path)
  Path("mine.sh").touch()
  with pytest.raises(UserError) as error:
    command._positional(words)
  assert str(error.value).startswith(message)


def test_words_that_are_taken(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  Path("mine.sh").touch()
  assert command._positional(["mine.sh", "A=b=c", "B=", "--", "C=d", "--x"]) == (
    "mine.sh",
    {"A": "b=c", "B": ""},
    ["C=d", "--x"],
  )
  assert sys.modules[command.__name__] is command
