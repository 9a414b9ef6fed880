"""InternVL2.5, first stage: the projector warms up between a ViT and a language model, both frozen.

Reproduces shell/internvl2.5/stage1, on 512 GPUs with one packed row of 16384 tokens each.

  python -m internvl_jax.train --config configs/internvl2_5/stage1.py:8b --config.data.meta_path=my_meta.json

Sizes: 1b, 2b, 4b, 8b, 26b, 38b, 78b. Next: stage1_5.py for 8b and 26b, stage2.py for the others.
"""

from internvl_jax.config import TrainConfig
from internvl_jax.recipes import choose, published

SIZES = {
  # size: ViT, language model, weight decay
  "1b": ("InternViT-300M-448px-V2_5", "Qwen2.5-0.5B-Instruct", 0.01),
  "2b": ("InternViT-300M-448px-V2_5", "internlm2_5-1_8b-chat", 0.01),
  "4b": ("InternViT-300M-448px-V2_5", "Qwen2.5-3B-Instruct", 0.01),
  # These two continue with the ViTs of before, and their ViT learns in stage 1.5.
  "8b": ("InternViT-300M-448px", "internlm2_5-7b-chat", 0.05),
  "26b": ("InternViT-6B-448px-V1-5", "internlm2_5-20b-chat", 0.05),
  "38b": ("InternViT-6B-448px-V2_5", "Qwen2.5-32B-Instruct", 0.05),
  "78b": ("InternViT-6B-448px-V2_5", "Qwen2.5-72B-Instruct", 0.05),
}
LANGUAGE_MODELS = {
  "1b": "qwen2_5_0_5b",
  "2b": "internlm2_5_1_8b",
  "4b": "qwen2_5_3b",
  "8b": "internlm2_5_7b",
  "26b": "internlm2_5_20b",
  "38b": "qwen2_5_32b",
  "78b": "qwen2_5_72b",
}
CHOICES = tuple(SIZES)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `internvl_jax.recipes` says what `arg` may be, and it stands for 8b if empty."""
  choice = choose(arg, CHOICES, default="8b")
  vit, llm, decay = SIZES[choice.size]
  script = f"internvl2_5_{choice.size}_{LANGUAGE_MODELS[choice.size]}_dynamic_res_stage1"
  config = published(choice, batch=512, devices=512)

  config.model.vision_path = f"./pretrained/{vit}"
  config.model.llm_path = f"./pretrained/{llm}"
  config.model.freeze_backbone = True  # The ViT.
  config.model.freeze_llm = True

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

  config.training.output_dir = f"work_dirs/internvl_chat_v2_5/{script}"
  config.training.bf16 = True
  config.training.max_steps = 100000
  config.training.learning_rate = 2e-4
  config.training.lr_scheduler_type = "cosine"
  config.training.warmup_steps = 100
  config.training.weight_decay = decay
  config.training.dataloader_num_workers = 8
  config.training.remove_unused_columns = False
  config.training.save_steps = 100
  config.training.save_total_limit = 3
  return config
