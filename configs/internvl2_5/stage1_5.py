"""InternVL2.5, stage 1.5: the ViT learns with the projector, under a frozen language model.

Reproduces shell/internvl2.5/stage1.5, on 512 GPUs: 1024 packed rows of 16384 tokens a step, from what stage1.py left.

  python -m internvl_jax.train --config configs/internvl2_5/stage1_5.py:8b --config.data.meta_path=my_meta.json

Sizes: 8b, 26b.
"""

from internvl_jax.config import TrainConfig
from internvl_jax.recipes import choose, published

SIZES = {
  # size: language model, drop path
  "8b": ("internlm2_5_7b", 0.1),
  "26b": ("internlm2_5_20b", 0.4),
}
CHOICES = tuple(SIZES)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `internvl_jax.recipes` says what `arg` may be, and it stands for 8b if empty."""
  choice = choose(arg, CHOICES, default="8b")
  llm, drop_path = SIZES[choice.size]
  script = f"work_dirs/internvl_chat_v2_5/internvl2_5_{choice.size}_{llm}_dynamic_res"
  config = published(choice, batch=1024, devices=512)

  config.model.model_name_or_path = f"./{script}_stage1/"
  config.model.freeze_llm = True
  config.model.drop_path_rate = drop_path

  config.data.meta_path = "./path/to/pretrain/data/mixture.json"
  config.data.conv_style = "internvl2_5"
  config.data.max_seq_length = 16384
  config.data.dynamic_image_size = True
  config.data.max_dynamic_patch = 12
  config.data.use_thumbnail = True
  config.data.use_packed_ds = True
  config.data.max_packed_tokens = 16384
  config.data.num_images_expected = 48
  config.data.strict_mode = False
  config.data.loss_reduction = "square"
  config.data.loss_reduction_all_gather = True

  config.training.output_dir = f"{script}_stage1_5"
  config.training.bf16 = True
  config.training.max_steps = 100000
  config.training.learning_rate = 1e-5
  config.training.lr_scheduler_type = "cosine"
  config.training.warmup_steps = 100
  config.training.weight_decay = 0.05
  config.training.dataloader_num_workers = 8
  config.training.remove_unused_columns = False
  config.training.save_steps = 100
  config.training.save_total_limit = 3
  return config
