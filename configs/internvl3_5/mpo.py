"""Mixed preference optimisation of InternVL3.5.

Reproduces internvl_chat_gpt_oss/shell/internvl3_5_qwen3/*_mpo.sh and, for 20b, internvl3_5_gpt_oss/*_stage3_mpo.sh: 256
pairs a step. The scripts leave the number of nodes open; here it is one, of 8 GPUs (`devices=64` for eight). They name
no loss either: their program sets it, to TRL's sigmoid, bco_pair and sft with weights 0.8, 0.2 and 1. That is the loss
of the generations before, where sft is called rpo_alpha, as it is here. `data.meta_path` names preference data: lines
with question, chosen and rejected answer.

  python -m internvl_jax.train --config configs/internvl3_5/mpo.py:8b --config.data.meta_path=my_meta.json

Sizes: 1b, 2b, 4b, 8b, 14b, 38b (Qwen3), 30b, 241b (Qwen3-MoE), 20b (gpt-oss, from what sft.py left).
"""

from internvl_jax.config import TrainConfig
from internvl_jax.recipes import choose, published

SIZES = {
  # size: model, drop path
  "1b": ("OpenGVLab/InternVL3_5-1B-Instruct", 0.0),
  "2b": ("OpenGVLab/InternVL3_5-2B-Instruct", 0.0),
  "4b": ("OpenGVLab/InternVL3_5-4B-Instruct", 0.0),
  "8b": ("OpenGVLab/InternVL3_5-8B-Instruct", 0.1),
  "14b": ("OpenGVLab/InternVL3_5-14B-Instruct", 0.1),
  "20b": ("work_dirs/internvl3_5_gpt_oss_20b_pretrain/internvl3_5_gpt_oss_20b_stage2_sft", 0.1),
  "30b": ("OpenGVLab/InternVL3_5-30B-A3B-Instruct", 0.1),
  "38b": ("OpenGVLab/InternVL3_5-38B-Instruct", 0.4),
  "241b": ("OpenGVLab/InternVL3_5-241B-A28B-Instruct", 0.4),
}
CHOICES = tuple(SIZES)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `internvl_jax.recipes` says what `arg` may be, and it stands for 8b if empty."""
  choice = choose(arg, CHOICES, default="8b")
  model, drop_path = SIZES[choice.size]
  folder, script = f"internvl3_5_{choice.size}_mpo", f"internvl3_5_{choice.size}_mpo"
  if choice.size == "20b":
    folder, script = "internvl3_5_gpt_oss_20b_mpo", "internvl3_5_gpt_oss_20b_stage3_mpo"
  config = published(choice, batch=256, devices=8)

  config.model.model_name_or_path = model
  config.model.drop_path_rate = drop_path

  config.data.meta_path = "shell/data/debug_mpo.json"
  config.data.conv_style = "internvl3_5_gpt_oss" if choice.size == "20b" else "internvl2_5"
  config.data.max_seq_length = 16384
  config.data.dynamic_image_size = True
  config.data.max_dynamic_patch = 12
  config.data.use_thumbnail = True

  config.preference.loss_type = "sigmoid,bco_pair"
  config.preference.sigmoid_loss_weight = 0.8
  config.preference.bco_pair_loss_weight = 0.2
  config.preference.rpo_alpha = 1.0

  config.training.output_dir = f"work_dirs/{folder}/{script}"
  config.training.bf16 = True
  config.training.num_train_epochs = 1
  config.training.learning_rate = 2e-7
  config.training.lr_scheduler_type = "cosine"
  config.training.warmup_ratio = 0.03
  config.training.weight_decay = 0.05
  config.training.gradient_checkpointing = True
  config.training.dataloader_num_workers = 16
  config.training.save_steps = 200
  config.training.save_total_limit = 50
  return config
