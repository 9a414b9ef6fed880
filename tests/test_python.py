"""The package in Python: its public names, and the examples of its documentation at a toy size."""

import doctest
import subprocess
import sys
import types

import pytest

import internvl_jax
from internvl_jax import api
from tests.support.toy import CURVE, RECIPE, REPOSITORY

_IMPORTS = """
import sys
import internvl_jax
heavy = {"jax", "numpy", "flax", "transformers"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
internvl_jax.load_config("quickstart")
assert not {"jax", "flax", "transformers"} & set(sys.modules)
"""


def test_the_import_takes_nothing_along():
  """Nor does a configuration need JAX."""
  subprocess.run([sys.executable, "-c", _IMPORTS], check=True, cwd=REPOSITORY)


def test_public_names_are_functions_whatever_was_imported():
  import internvl_jax.train.run
  import internvl_jax.verification

  assert sys.modules["internvl_jax.train"] is not internvl_jax.train
  for name in internvl_jax.__all__:
    assert not isinstance(getattr(internvl_jax, name), types.ModuleType), name
    assert name in dir(internvl_jax)
  with pytest.raises(AttributeError, match="no attribute 'tran'"):
    internvl_jax.tran  # noqa: B018


@pytest.fixture
def workplace(tmp_path, monkeypatch):
  """A folder with what the examples name."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "OUTPUT_DIR").symlink_to(CURVE / "init")
  (tmp_path / "cat.jpg").symlink_to(next((CURVE / "data/images").iterdir()))
  text = RECIPE.replace('output_dir, _, curve = arg.partition(",")', 'output_dir, curve = "output", ""')
  (tmp_path / "my_recipe.py").write_text(text.replace("get_config(arg)", "get_config()"))
  return tmp_path


EXAMPLES = {found.name: found for found in doctest.DocTestFinder().find(api) if found.examples}


@pytest.mark.parametrize(
  "name",
  # Whole runs: tests/test_notebooks.py has others in the gate.
  [pytest.param(name, marks=pytest.mark.slow) if name.endswith(".train") else name for name in EXAMPLES],
)
def test_the_examples_of_the_documentation_run(workplace, name):
  example = EXAMPLES[name]
  example.globs |= {public: getattr(internvl_jax, public) for public in internvl_jax.__all__}
  runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
  assert runner.run(example).failed == 0


def test_mistakes_are_told_in_a_line(workplace):
  for call, message in (
    (lambda: internvl_jax.open_model("nowhere"), "nowhere"),
    (lambda: internvl_jax.load_config("quickstrat"), "no such recipe; did you mean quickstart"),
    (lambda: internvl_jax.convert("OUTPUT_DIR", "new", "onnx"), "onnx"),
    (lambda: internvl_jax.convert("OUTPUT_DIR", "new", "hf", dtype="int3"), "dtype='int3': must be one of"),
    (lambda: internvl_jax.plan(internvl_jax.load_config(), "cpu:1"), "model"),
    (
      lambda: internvl_jax.train(internvl_jax.load_config(fields={"model.freeze_llm": 3})),
      "model.freeze_llm",
    ),
  ):
    with pytest.raises(internvl_jax.UserError, match=message):
      call()
