"""InternVL-Chat-V1.5, second stage: everything trains, from what stage1.py left.

Reproduces shell/internvl1.5/*/*_finetune.sh: 1024 rows a step on 128 GPUs (2b, 4b) or 256 (26b, 40b). The script of
4b starts from the folder that it writes to; here it starts from stage1.py's, as the others do.

  python -m internvl_jax.train --config configs/internvl1_5/stage2.py:26b --config.data.meta_path=my_meta.json

Sizes: 2b (Mini-InternVL, InternLM2-1.8B), 4b (Mini-InternVL, Phi-3), 26b (InternLM2-20B), 40b (Yi-34B).
"""

from internvl_jax.config import TrainConfig
from internvl_jax.recipes import choose, published

SIZES = {
  # size: language model, template, longest sample, drop path, learning rate, weight decay, GPUs
  "2b": ("internlm2_1_8b", "internlm2-chat", 8192, 0.1, 4e-5, 0.01, 128),
  "4b": ("phi3_3_8b", "phi3-chat", 8192, 0.1, 4e-5, 0.05, 128),
  "26b": ("internlm2_20b", "internlm2-chat", 4096, 0.4, 2e-5, 0.05, 256),
  "40b": ("hermes2_yi34b", "Hermes-2", 4096, 0.4, 2e-5, 0.05, 256),
}
CHOICES = tuple(SIZES)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `internvl_jax.recipes` says what `arg` may be, and it stands for 26b if empty."""
  choice = choose(arg, CHOICES, default="26b")
  llm, template, longest, drop_path, rate, decay, gpus = SIZES[choice.size]
  config = published(choice, batch=1024, devices=gpus, per_device=4)
  script = f"internvl_chat_v1_5_{llm}_dynamic_res"

  config.model.model_name_or_path = f"./work_dirs/{script}_pretrain"
  config.model.drop_path_rate = drop_path

  config.data.meta_path = "path/to/finetune/data.json"
  config.data.conv_style = template
  config.data.max_seq_length = longest
  config.data.dynamic_image_size = True
  config.data.max_dynamic_patch = 12
  config.data.use_thumbnail = True

  config.training.output_dir = f"work_dirs/internvl_chat_v1_5/{script}_finetune"
  config.training.bf16 = True
  config.training.num_train_epochs = 1
  config.training.learning_rate = rate
  config.training.lr_scheduler_type = "cosine"
  config.training.warmup_ratio = 0.03
  config.training.weight_decay = decay
  config.training.group_by_length = True
  config.training.dataloader_num_workers = 4
  config.training.save_steps = 200
  config.training.save_total_limit = 3
  return config
