"""Reinforcement of the quickstart's model, stopped early: answers are sampled and scored, on two CPU cores.

`scripts/quickstart_grpo.sh` runs all of it. Measured numbers stand in docs/reinforcement.md.

  python -m internvl_jax.train --config configs/quickstart_grpo.py

What differs from a published model's recipe: answers are a word, and the token that ends them, so that they are many a
step, and the rate is higher. The policy is held to its start (`beta`), and advantages are not divided by their deviation:
a model that tells no shapes apart yet is rewarded most for the commonest answer. Without both it is soon sure of that one,
samples no other, and has nothing to learn from.
"""

from internvl_jax.config import TrainConfig
from internvl_jax.recipe_files import load_recipe


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `arg` is the folder that the quickstart wrote to, by default "quickstart"."""
  folder = arg or "quickstart"
  config = load_recipe(f"quickstart:{folder}")
  config.model.model_name_or_path = f"{folder}/output_early"
  config.runtime.random_init = False
  config.loader.sequence_buckets = (48, 64)
  config.loader.tile_buckets = (64,)

  config.grpo.reward_funcs = ("exact_match",)
  config.grpo.num_generations = 8
  config.grpo.max_completion_length = 2
  config.grpo.scale_rewards = "none"
  config.grpo.beta = 0.2

  config.training.output_dir = f"{folder}/output_grpo"
  config.training.per_device_train_batch_size = 64
  config.training.max_steps = 800
  config.training.learning_rate = 1e-3
  config.training.warmup_ratio = 0.02
  config.training.logging_steps = 20
  config.training.eval_strategy = "steps"
  config.training.eval_steps = 200
  config.training.save_steps = 200
  config.training.save_total_limit = 1
  return config
