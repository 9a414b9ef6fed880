"""Fine-tunes all of InternVL2.5, each part at a rate of its own: the ViT slowly, its lower layers most of all.

The recipe internvl2_5/finetune, with the ViT thawed at a tenth of the language model's rate and a layer-wise decay of 0.9 (its first
layer learns at 0.08 times the last one's), and the projector at five times the language model's rate. These rates are a
place to start from, and not measured. docs/optimizers.md explains the fields.

  python -m internvl_jax.train --config configs/examples/rates.py:8b --config.data.meta_path=my_meta.json

Sizes: those of internvl2_5/finetune in full: 1b, 2b, 4b, 8b, 26b, 38b, 78b.
"""

from internvl_jax.config import TrainConfig
from internvl_jax.recipe_files import load_recipe


def get_config(arg: str = "8b") -> TrainConfig:
  """The recipe; `arg` is that of internvl2_5/finetune."""
  config = load_recipe(f"internvl2_5/finetune:{arg}")
  config.model.freeze_backbone = False
  config.training.vision_lr = 0.1 * config.training.learning_rate
  config.training.layer_lr_decay = 0.9
  config.training.projector_lr = 5 * config.training.learning_rate
  config.training.output_dir = "work_dirs/rates"
  return config
