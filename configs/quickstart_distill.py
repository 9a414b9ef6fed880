"""Distillation of the quickstart's model into one of half its size, on two CPU cores.

`scripts/quickstart_distill.sh` runs all of it, and trains the same student on the labels alone to compare.
`scripts/quickstart_data.py` writes the student's config. Measured numbers stand in docs/distillation.md.

  python -m internvl_jax.train --config configs/quickstart_distill.py

What differs from configs/quickstart.py: the model, its teacher, and that it takes fewer steps.
"""

from internvl_jax.config import TrainConfig
from internvl_jax.recipe_files import load_recipe


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `arg` is the folder that the quickstart wrote to, by default "quickstart"."""
  folder = arg or "quickstart"
  config = load_recipe(f"quickstart:{folder}")
  config.model.model_name_or_path = f"{folder}/student"
  config.distillation.teacher = f"{folder}/output"
  config.distillation.cache_dir = f"{folder}/teacher_logps"
  config.distillation.top_k = 8
  config.distillation.temperature = 2.0
  config.training.output_dir = f"{folder}/output_distill"
  config.training.max_steps = 1000
  config.training.save_total_limit = 1
  return config
