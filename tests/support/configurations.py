"""Configurations to test with, and command lines that make them."""

import textwrap

from absl import flags

from internvl_jax import cli
from internvl_jax.config import TrainConfig


def sound_config(folder):
  """A configuration that passes all checks; its files are made in `folder`."""
  model = folder / "model"
  model.mkdir()
  (model / "config.json").write_text("{}")
  for name in ("meta.json", "eval.jsonl"):
    (folder / name).write_text("{}")
  config = TrainConfig()
  config.model.model_name_or_path = str(model)
  config.data.meta_path = str(folder / "meta.json")
  config.data.conv_style = "internvl2_5"
  config.training.output_dir = str(folder / "out")
  return config


def set_field(config, path, value):
  """Sets the field at a path such as "model.freeze_llm"."""
  leaf, name = path.split(".")
  setattr(getattr(config, leaf), name, value)


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
  """The configuration that a command line makes of a recipe, which is written to `folder`."""
  path = folder / "recipe.py"
  path.write_text(textwrap.dedent(recipe))
  argv = ["command", f"--config={path}{arg}", *overrides]
  values = flags.FlagValues()
  holder = cli.define_config_flag(values, argv)
  assert cli.parse_flags(argv, values) == ["command"]
  return holder.value
