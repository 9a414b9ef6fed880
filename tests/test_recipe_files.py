"""Recipes are found by their names from any folder, and by the paths of files."""

import pytest

from internvl_jax import recipe_files
from internvl_jax.config import FIELDS, get
from internvl_jax.errors import UserError
from internvl_jax.recipe_files import load_recipe


def test_a_name_is_the_packages_own_recipe_whatever_lies_in_the_folder(tmp_path, monkeypatch):
  by_path = load_recipe(f"{recipe_files.recipe_folder()}/internvl2_5/finetune.py:8b,lora")
  monkeypatch.chdir(tmp_path)
  (tmp_path / "quickstart").mkdir()  # As its own data do.
  assert load_recipe("internvl2_5/finetune:8b,lora") == by_path
  assert by_path.model.use_llm_lora == 16
  assert load_recipe("quickstart:elsewhere").model.model_name_or_path == "elsewhere/init"


def test_the_packed_recipes_go_before_those_of_a_checkout(tmp_path, monkeypatch):
  monkeypatch.setattr(recipe_files, "_PACKAGE", tmp_path / "internvl_jax")
  for folder in ("configs", "internvl_jax/configs/mine"):
    (tmp_path / folder).mkdir(parents=True)
  (tmp_path / "configs" / "old.py").write_text("")
  (tmp_path / "internvl_jax/configs/mine/new.py").write_text("")
  assert recipe_files.recipe_names() == ["mine/new"]
  (tmp_path / "internvl_jax/configs").rename(tmp_path / "away")
  assert recipe_files.recipe_names() == ["old"]


def test_no_recipe_needs_another_file_of_its_folder(tmp_path):
  for name in recipe_files.recipe_names():
    alone = tmp_path / "alone.py"
    alone.write_bytes((recipe_files.recipe_folder() / f"{name}.py").read_bytes())
    config, named = load_recipe(str(alone)), load_recipe(name)
    assert [path for path in FIELDS if get(config, path) != get(named, path)] == []


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    (
      "internvl2_5/finetun:8b",
      "--config=internvl2_5/finetun: no such recipe; did you mean internvl2_5/finetune, ",
    ),
    (
      "nothing_like_it",
      "--config=nothing_like_it: no such recipe; there are examples/rates, internvl1_2/finetune",
    ),
    ("nowhere.py", "--config=nowhere.py: no such recipe file"),
    (
      "configs/internvl2_5/mpo.py:8b",
      "--config=configs/internvl2_5/mpo.py: no such recipe file; the package's own is named without folder and "
      "suffix: internvl2_5/mpo",
    ),
    (
      "shell/mine.sh",
      "--config=shell/mine.sh: is a launch script; `python -m internvl_jax.from_script shell/mine.sh` makes a recipe",
    ),
    ("notes.txt", "--config=notes.txt: a recipe is a Python file, so its name must end in .py"),
  ],
)
def test_names_that_are_none(tmp_path, monkeypatch, spec, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "notes.txt").write_text("")
  with pytest.raises(UserError) as error:
    load_recipe(spec)
  assert str(error.value).startswith(message)
  assert "\n" not in str(error.value)
