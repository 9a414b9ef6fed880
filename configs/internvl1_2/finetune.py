"""Fine-tunes InternVL-Chat-V1.2-Plus on your own data: one tile an image, ViT frozen.

Reproduces shell/internvl1.2/2nd_finetune: in full on 16 GPUs, 128 rows a step; adapters of rank 16 (`lora`) on 2
GPUs, 16 rows.

  python -m internvl_jax.train --config configs/internvl1_2/finetune.py:40b,lora --config.data.meta_path=my_meta.json

The one size is 40b.
"""

from internvl_jax.config import TrainConfig
from internvl_jax.recipes import choose, published

CHOICES = ("40b", "40b,lora")


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `internvl_jax.recipes` says what `arg` may be, and it stands for 40b if empty."""
  choice = choose(arg, CHOICES, default="40b")
  is_lora = choice.variant == "lora"
  config = published(choice, batch=16 if is_lora else 128, devices=2 if is_lora else 16, per_device=4)
  script = f"internvl_chat_v1_2_hermes2_yi34b_448_res_2nd_finetune_{choice.variant or 'full'}"

  config.model.model_name_or_path = "./pretrained/InternVL-Chat-V1-2-Plus"
  config.model.freeze_backbone = True  # The ViT.
  config.model.freeze_mlp = config.model.freeze_llm = is_lora
  config.model.use_llm_lora = 16 if is_lora else 0
  config.model.ps_version = "v1"

  config.data.meta_path = "./shell/data/internvl_1_2_finetune_custom.json"
  config.data.conv_style = "Hermes-2"
  config.data.max_seq_length = 2048
  config.data.max_dynamic_patch = 1  # Images are squeezed into one tile.

  config.training.output_dir = f"work_dirs/internvl_chat_v1_2/{script}"
  config.training.bf16 = True
  config.training.num_train_epochs = 1
  config.training.learning_rate = 1e-5
  config.training.lr_scheduler_type = "cosine"
  config.training.warmup_ratio = 0.03
  config.training.weight_decay = 0.05
  config.training.group_by_length = True
  config.training.dataloader_num_workers = 4
  config.training.save_steps = 200
  config.training.save_total_limit = 1
  return config
