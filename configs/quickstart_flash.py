"""InternVL3.5-Flash on easy-VQA, from the quickstart's model: larger pictures, then ViCO's two stages, on two CPU cores.

`scripts/quickstart_flash.sh` runs all of it. Measured accuracies and times stand in docs/flash.md.

  python -m internvl_jax.train --config configs/quickstart_flash.py
"""

from internvl_jax.config import TrainConfig
from internvl_jax.recipe_files import load_recipe


def get_config(arg: str = "") -> TrainConfig:
  """The recipe.

  Args:
    arg: the folder that the quickstart wrote to, by default "quickstart", and the stage: "tiles" (the default),
      "consistency" or "router".
  """
  folder, _, stage = arg.partition(",")
  config = _tiles(folder or "quickstart")
  if stage not in STAGES:
    raise ValueError(f"{stage!r} is no stage; use {', '.join(STAGES)}")
  STAGES[stage](config, folder or "quickstart")
  return config


def _tiles(folder: str) -> TrainConfig:
  """The quickstart's model goes on with larger pictures: four tiles and a thumbnail."""
  config = load_recipe(f"quickstart:{folder}")
  config.model.model_name_or_path = f"{folder}/output"
  config.runtime.random_init = False

  # Twice as large as they are.
  config.data.dynamic_image_size = True
  config.data.use_thumbnail = True
  config.data.min_dynamic_patch = 4
  config.data.max_dynamic_patch = 4
  config.data.max_seq_length = 128
  config.loader.sequence_buckets = (112, 128)
  config.loader.tile_buckets = (160,)

  config.training.output_dir = f"{folder}/output_tiles"
  config.training.max_steps = 400
  config.training.learning_rate = 5e-4
  config.training.warmup_ratio = 0.05
  config.training.logging_steps = 10
  config.training.save_steps = 200
  config.training.save_total_limit = 1
  config.eval.batch_size = 128
  return config


def _consistency(config: TrainConfig, folder: str) -> None:
  """The model of larger pictures becomes a Flash."""
  config.flash.stage = "consistency"
  # Of five tiles, at most four are compressed.
  config.flash.relative_threshold = 0.1
  config.model.model_name_or_path = f"{folder}/output_tiles"
  config.training.output_dir = f"{folder}/output_consistency"
  config.training.max_steps = 600
  config.training.learning_rate = 3e-4
  # Its router is not trained yet: of all tiles compressed, and again of none by scripts/quickstart_flash.sh.
  config.eval.compress = "all"


def _router(config: TrainConfig, folder: str) -> None:
  """Its router is trained."""
  config.flash.stage = "router"
  config.flash.percentile = 75.0
  config.model.model_name_or_path = f"{folder}/output_consistency"
  config.training.output_dir = f"{folder}/output_router"
  config.training.max_steps = 300
  config.training.learning_rate = 1e-3


def _nothing(config: TrainConfig, folder: str) -> None:
  del config, folder


STAGES = {"": _nothing, "tiles": _nothing, "consistency": _consistency, "router": _router}
"""What a stage changes of the first."""
