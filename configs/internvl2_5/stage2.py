"""InternVL2.5, second stage: everything trains on instructions.

Reproduces shell/internvl2.5/stage2, on 512 GPUs with one packed row of 16384 tokens each, from what stage1.py (8b and
26b: stage1_5.py) left. The small sizes see the mixture several times.

  python -m internvl_jax.train --config configs/internvl2_5/stage2.py:8b --config.data.meta_path=my_meta.json

Sizes: 1b, 2b, 4b, 8b, 26b, 38b, 78b.
"""

from internvl_jax.config import TrainConfig
from internvl_jax.recipes import choose, published

SIZES = {
  # size: stage before, mixture, steps, drop path, learning rate, weight decay
  "1b": ("qwen2_5_0_5b_dynamic_res_stage1", "mixture_4x", 22000, 0.1, 4e-5, 0.01),
  "2b": ("internlm2_5_1_8b_dynamic_res_stage1", "mixture_4x", 22000, 0.1, 4e-5, 0.01),
  "4b": ("qwen2_5_3b_dynamic_res_stage1", "mixture_2x", 11000, 0.1, 4e-5, 0.01),
  "8b": ("internlm2_5_7b_dynamic_res_stage1_5", "mixture", 5500, 0.1, 4e-5, 0.05),
  "26b": ("internlm2_5_20b_dynamic_res_stage1_5", "mixture", 5500, 0.4, 2e-5, 0.05),
  "38b": ("qwen2_5_32b_dynamic_res_stage1", "mixture", 5500, 0.4, 2e-5, 0.05),
  "78b": ("qwen2_5_72b_dynamic_res_stage1", "mixture", 5500, 0.4, 2e-5, 0.05),
}
CHOICES = tuple(SIZES)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `internvl_jax.recipes` says what `arg` may be, and it stands for 8b if empty."""
  choice = choose(arg, CHOICES, default="8b")
  before, mixture, steps, drop_path, rate, decay = SIZES[choice.size]
  before = f"work_dirs/internvl_chat_v2_5/internvl2_5_{choice.size}_{before}"
  config = published(choice, batch=512, devices=512)

  config.model.model_name_or_path = f"./{before}/"
  config.model.drop_path_rate = drop_path
  config.model.use_liger = choice.size in ("38b", "78b")

  config.data.meta_path = f"./path/to/finetune/data/{mixture}.json"
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

  config.training.output_dir = f"{before.partition('_stage1')[0]}_stage2"
  config.training.bf16 = True
  config.training.max_steps = steps
  config.training.learning_rate = rate
  config.training.lr_scheduler_type = "cosine"
  config.training.warmup_ratio = 0.03
  config.training.weight_decay = decay
  config.training.dataloader_num_workers = 8
  config.training.remove_unused_columns = False
  config.training.save_steps = 100
  config.training.save_total_limit = 3
  return config
