"""The configuration: its fields."""

import ast
import dataclasses
import json
from pathlib import Path

import pytest

from internvl_jax import config_checks
from internvl_jax.allowed_values import ACCEPTED, CHOICES, REFUSED
from internvl_jax.arguments import DataTrainingArguments, ModelArguments
from internvl_jax.config import FIELDS, LEAVES, TrainConfig, to_json, type_name
from internvl_jax.foreign import FOREIGN
from internvl_jax.help_text import field_comments
from internvl_jax.task_arguments import LOSS_WEIGHTS
from internvl_jax.tasks.settings import ranges
from tests.support.configurations import parse

ROOT = Path(__file__).parent.parent
ASSETS = Path(__file__).parent / "assets"
RECIPES = json.loads((ASSETS / "recipe_arguments.json").read_text())

# Fields that are read where this test does not see it: in config.py itself, and by the axis's name.
READ_ELSEWHERE = {
  "training.overwrite_output_dir",
  # By the table `optim.optimizer.OPTIMIZERS`.
  *("training.adam_beta1", "training.adam_beta2", "training.adam_epsilon"),
  *(path for path in FIELDS if path.startswith("mesh.")),
}

# Fields that nothing reads yet although they are not in a table of config.py. To be emptied, never filled.
PENDING: set[str] = set()


# --- Fields -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", [ModelArguments, DataTrainingArguments], ids=lambda leaf: leaf.__name__)
def test_fields_equal_the_reference(leaf):
  expected = json.loads((ASSETS / "arguments.json").read_text())[leaf.__name__]
  fields = {field.name: field for field in dataclasses.fields(leaf)}
  assert list(fields) == list(expected)
  for name, field in fields.items():
    type_ = type_name(field.type)
    wanted = expected[name]["type"].replace("Optional[str]", "str or None")
    if wanted.startswith("Literal["):
      wanted = wanted.removeprefix("Literal[").removesuffix("]").replace(", ", " or ")
    if name == "meta_path":  # The reference types it `str` and gives it None.
      wanted = "str or None"
    assert (type_, field.default) == (wanted, expected[name]["default"]), name


def test_every_default_has_its_own_type():
  assert not list(config_checks._type_problems(TrainConfig()))


def test_every_number_has_a_range_that_holds_its_default():
  numeric = {p for p, field in FIELDS.items() if {"int", "float"} & set(type_name(field.type).split())}
  assert numeric == set(ranges())
  assert not list(config_checks._range_problems(TrainConfig()))


def test_tables_name_fields():
  for table in (REFUSED, ACCEPTED, CHOICES, ranges()):
    assert set(table) <= set(FIELDS)


def names_read(package: Path) -> set[str]:
  """Attribute names that the package reads, outside the files that declare and check the configuration."""
  read = set()
  for path in package.rglob("*.py"):
    if (
      path.name in ("arguments.py", "task_arguments.py", "config.py", "config_checks.py", "config_paths.py")
      and path.parent == package
    ):
      continue
    tree = ast.parse(path.read_text(encoding="utf-8"))
    read |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
  return read


def test_no_field_is_ignored_in_silence():
  """A field is read by the package, or a table says why it is not."""
  weights = {"preference.loss_weights", *(f"preference.{name}" for name in LOSS_WEIGHTS.values())}
  excused = set(REFUSED) | set(ACCEPTED) | READ_ELSEWHERE | weights  # `PreferenceConfig.terms`
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
        assert not list(config_checks._type_problems(config)) + list(config_checks._range_problems(config))


def test_to_json_round_trips_through_json():
  config = TrainConfig()
  config.loader.sequence_buckets = (64, 8192)
  tree = to_json(config)
  assert json.loads(json.dumps(tree)) == tree
  assert tree["loader"]["sequence_buckets"] == [64, 8192]
  assert set(tree) == set(LEAVES)


def test_every_field_is_commented():
  for leaf in LEAVES.values():
    comments = field_comments(leaf)
    assert len(set(comments.values())) == len(comments), "fields share a comment"
    assert [field.name for field in dataclasses.fields(leaf) if not comments.get(field.name)] == []
