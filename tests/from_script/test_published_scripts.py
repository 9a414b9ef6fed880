"""Every published launch script becomes the recipe that the package has of it, field by field."""

import dataclasses
import os
from pathlib import Path

import pytest

from internvl_jax.config import FIELDS, get
from internvl_jax.errors import UserError
from internvl_jax.from_script.launches import read_script
from internvl_jax.from_script.recipe import make_recipe
from internvl_jax.nearest_recipe import SLIPS
from internvl_jax.recipe_files import load_recipe
from internvl_jax.reference_arguments import parse
from tests.support.launch_scripts import SCRIPTS, script_of
from tests.test_recipes import INSTEAD, recipe_of

# A checkout of OpenGVLab/InternVL, whose scripts are not ours to ship.
CHECKOUT = Path(os.environ.get("INTERNVL_CHECKOUT", "nowhere"))

ALIKE = pytest.mark.parametrize("script", SCRIPTS)


def spec_of(script):
  return recipe_of(script).replace(".py:", ":")


def check(script, launch):
  """That a launch becomes the published recipe."""
  given = parse(launch.words)
  assert given.problems == []
  recipe = make_recipe(launch, given)
  published = load_recipe(spec_of(script))
  assert recipe.base == spec_of(script)
  assert {path: get(recipe.config, path) for path in FIELDS} == {
    path: get(published, path) for path in FIELDS
  }
  assert (recipe.settings, recipe.numbers, recipe.lost) == ({}, "", {})


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
  """What scripts in the shape of all the published ones start, which is asked of bash at once."""
  file = tmp_path_factory.mktemp("scripts") / "all.sh"
  file.write_text("\n".join(f"(\n{script_of(name)})" for name in SCRIPTS))
  reading = read_script(str(file))
  assert reading.assumed == {"WORLD_SIZE": "1"}
  return dict(zip(SCRIPTS, reading.launches, strict=True))


@ALIKE
def test_a_script_of_the_published_shape_becomes_its_recipe(script, launches):
  check(script, launches[script])


@pytest.mark.skipif(not CHECKOUT.is_dir(), reason="INTERNVL_CHECKOUT names no checkout of OpenGVLab/InternVL")
@ALIKE
def test_a_published_script_becomes_its_recipe(script):
  (file,) = CHECKOUT.glob(f"internvl_chat*/shell/{script}.sh")
  (launch,) = read_script(str(file)).launches
  check(script, launch)


@pytest.mark.skipif(not CHECKOUT.is_dir(), reason="INTERNVL_CHECKOUT names no checkout of OpenGVLab/InternVL")
def test_published_scripts_that_train_nothing_are_refused():
  files = sorted(CHECKOUT.glob("internvl_chat/shell/internvl3.0/*_data_construction/*.sh"))
  assert len(files) == 4
  for file in files:
    with pytest.raises(UserError, match="starts no training of the reference"):
      read_script(str(file))


def test_slips_are_those_that_the_recipes_correct(launches):
  corrected = {(spec_of(script), argument) for script, argument in INSTEAD}
  assert corrected == {(spec, path.partition(".")[2]) for spec, (path, _) in SLIPS.items()}
  for script, _ in INSTEAD:
    given = parse(launches[script].words)
    (remark,) = make_recipe(launches[script], given).remarks
    assert "is a slip of the published script" in remark
    path, _ = SLIPS[spec_of(script)]
    mine = dataclasses.replace(given, values=given.values | {path: "mine"})
    assert make_recipe(launches[script], mine).settings == {path: "mine"}
