"""InternVL3.5, supervised fine-tuning of the pre-trained models: everything trains on instructions.

Reproduces internvl_chat_gpt_oss/shell/internvl3_5_qwen3/*_sft.sh and, for 20b, internvl3_5_gpt_oss/*_stage2_sft.sh: 512
packed rows of 32768 tokens a step. The scripts leave the number of nodes open; here it is one, of 8 GPUs (`devices=64`
for eight). Of 241b, two GPUs share rows.

  python -m internvl_jax.train --config configs/internvl3_5/sft.py:8b --config.data.meta_path=my_meta.json

Sizes: 1b, 2b, 4b, 8b, 14b, 38b (Qwen3), 30b, 241b (Qwen3-MoE), 20b (gpt-oss, from what pretrain.py left).
"""

from internvl_jax.config import TrainConfig
from internvl_jax.recipes import choose, published

SIZES = {
  # size: model, drop path, learning rate, GPUs that share rows
  "1b": ("OpenGVLab/InternVL3_5-1B-Pretrained", 0.0, 8e-5, 1),
  "2b": ("OpenGVLab/InternVL3_5-2B-Pretrained", 0.0, 8e-5, 1),
  "4b": ("OpenGVLab/InternVL3_5-4B-Pretrained", 0.0, 8e-5, 1),
  "8b": ("OpenGVLab/InternVL3_5-8B-Pretrained", 0.1, 8e-5, 1),
  "14b": ("OpenGVLab/InternVL3_5-14B-Pretrained", 0.1, 8e-5, 1),
  "20b": ("work_dirs/internvl3_5_gpt_oss_20b_pretrain/internvl3_5_gpt_oss_20b_stage1_pretrain", 0.1, 8e-5, 1),
  "30b": ("OpenGVLab/InternVL3_5-30B-A3B-Pretrained", 0.1, 8e-5, 1),
  "38b": ("OpenGVLab/InternVL3_5-38B-Pretrained", 0.4, 8e-5, 1),
  "241b": ("OpenGVLab/InternVL3_5-241B-A28B-Pretrained", 0.4, 2e-5, 2),
}
CHOICES = tuple(SIZES)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `internvl_jax.recipes` says what `arg` may be, and it stands for 8b if empty."""
  choice = choose(arg, CHOICES, default="8b")
  model, drop_path, rate, sharing = SIZES[choice.size]
  folder, script = f"internvl3_5_{choice.size}_sft", f"internvl3_5_{choice.size}_sft"
  if choice.size == "20b":
    folder, script = "internvl3_5_gpt_oss_20b_pretrain", "internvl3_5_gpt_oss_20b_stage2_sft"
  config = published(choice, batch=512, devices=8, sharing=sharing)

  config.model.model_name_or_path = model
  config.model.drop_path_rate = drop_path

  config.data.meta_path = "shell/data/debug_sft.json"
  config.data.conv_style = "internvl3_5_gpt_oss" if choice.size == "20b" else "internvl2_5"
  config.data.max_seq_length = 32768
  config.data.dynamic_image_size = True
  config.data.max_dynamic_patch = 12
  config.data.use_thumbnail = True
  config.data.use_packed_ds = True
  config.data.max_packed_tokens = 32768
  config.data.num_images_expected = 96
  config.data.strict_mode = False
  config.data.replacement = True
  config.data.loss_reduction = "square"

  config.training.output_dir = f"work_dirs/{folder}/{script}"
  config.training.bf16 = True
  config.training.max_steps = 8000
  config.training.learning_rate = rate
  config.training.lr_scheduler_type = "cosine"
  config.training.warmup_ratio = 0.03
  config.training.weight_decay = 0.05
  config.training.gradient_checkpointing = True
  config.training.dataloader_num_workers = 16
  config.training.remove_unused_columns = False
  config.training.save_steps = 500
  config.training.save_total_limit = 100
  return config
