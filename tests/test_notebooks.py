"""The notebooks: kept small and without outputs, and executed at a toy size, cell by cell, in this process."""

import csv
import json
import shutil
import sys
import types

import pytest

from internvl_jax import cli
from tests.support.toy import CURVE, RECIPE, REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))

PREFERENCE = """
  config.preference.loss_type = "sigmoid,bco_pair"
  config.preference.rpo_alpha = 1.0
"""


def cells(path):
  """The code cells: source and tags."""
  notebook = json.loads(path.read_text(encoding="utf-8"))
  assert notebook["nbformat"] == 4
  code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
  return [("".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in code]


def execute(path, **parameters):
  """Runs the cells; the parameters take the place of those of the cell that is tagged so. Returns the names they leave."""
  names = {"__name__": "__main__"}
  for source, tags in cells(path):
    if "install" in tags:
      continue
    exec(compile(source, str(path), "exec"), names)
    if "parameters" in tags:
      assert parameters.keys() <= names.keys()
      names |= parameters
  return names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
  notebook = json.loads(path.read_text(encoding="utf-8"))
  assert path.read_text(encoding="utf-8") == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
  assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
  for cell in notebook["cells"]:
    if cell["cell_type"] == "code":
      assert cell["outputs"] == [] and cell["execution_count"] is None
  assert sum("parameters" in tags for _, tags in cells(path)) == 1


@pytest.fixture
def workplace(tmp_path, monkeypatch):
  """A folder with toy recipes: two steps of the recorded run's model."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(cli, "set_up_logging", lambda process=None: None)  # Tests share the log.
  text = RECIPE.replace('output_dir, _, curve = arg.partition(",")', 'output_dir, curve = "output", ""')
  text = text.replace("  return curve", "  config = curve").replace("get_config(arg)", 'get_config(arg="")')
  steps = "  config.training.max_steps = 2\n  config.runtime.compilation_cache_dir = None\n"
  (tmp_path / "sft.py").write_text(f"{text.rstrip()}\n{steps}  return config\n")
  (tmp_path / "mpo.py").write_text(f"{text.rstrip()}\n{steps}{PREFERENCE}  return config\n")
  return tmp_path


def table(folder, name, **columns):
  """A folder of pictures with a table about them."""
  folder.mkdir()
  pictures = sorted((CURVE / "data/images").iterdir())[:20]
  with (folder / name).open("w", newline="") as file:
    writer = csv.DictWriter(file, ["picture", *columns])
    writer.writeheader()
    for picture in pictures:
      shutil.copy(picture, folder)
      writer.writerow({"picture": picture.name, **columns})


MODEL = str(CURVE / "init")


def test_fine_tuning_on_pictures(workplace, capsys):
  table(workplace / "my_pictures", "labels.csv", question="What is it?", answer="A shape.")
  names = execute(
    REPOSITORY / "notebooks/fine_tune.ipynb", RECIPE="sft.py", MODEL=MODEL, FIELDS={"training.max_steps": 2}
  )
  assert names["trained"].complete and (workplace / "fine_tuned_hf/config.json").exists()
  assert len(names["after"]) == len(names["held_out"]) == 2 and len(names["chat"].history) == 2
  assert "wanted 'A shape.'" in capsys.readouterr().out


def test_preferences(workplace):
  table(workplace / "my_pairs", "pairs.csv", question="What is it?", chosen="A shape.", rejected="Nothing.")
  fields = {"training.max_steps": 2}
  names = execute(REPOSITORY / "notebooks/preferences.ipynb", RECIPE="mpo.py", MODEL=MODEL, FIELDS=fields)
  assert names["trained"].complete and "rewards/margins" in names["trained"].history[-2]
  results = json.loads((workplace / "preferred/preference_results.json").read_text())
  assert any("rewards/accuracies" in name for name in results)


def test_planning(workplace, capsys):
  names = execute(
    REPOSITORY / "notebooks/plan.ipynb",
    RECIPE="sft.py",
    TOPOLOGIES=["cpu:2"],
    SIZES={"tokens": 64, "tiles": 1},
    SEARCH=None,
  )
  assert [plan["chips"] for plan in names["plans"].values()] == [2]
  assert "cpu:2     2 devices" in capsys.readouterr().out


@pytest.mark.slow
def test_quickstart_on_one_card(workplace, monkeypatch):
  pictures = dict(enumerate(map(str, sorted((CURVE / "data/images").iterdir())[:12])))
  questions = [f"is picture {number} red?" for number in pictures], ["no"] * len(pictures), list(pictures)
  easy_vqa = types.ModuleType("easy_vqa")
  for part in ("train", "test"):
    setattr(easy_vqa, f"get_{part}_image_paths", lambda: pictures)
    setattr(easy_vqa, f"get_{part}_questions", lambda: questions)
  monkeypatch.setitem(sys.modules, "easy_vqa", easy_vqa)
  names = execute(
    REPOSITORY / "notebooks/quickstart_colab.ipynb",
    RECIPE="sft.py",
    MODEL=MODEL,
    TRAINED_ON=12,
    ASKED=4,
    FIELDS={"training.max_steps": 2},
  )
  assert names["trained"].complete and len(names["answers"]) == 4
  install = next(
    source for source, tags in cells(REPOSITORY / "notebooks/quickstart_colab.ipynb") if "install" in tags
  )
  assert "quickstart" in install and 'EXTRA = "cuda"' in install
