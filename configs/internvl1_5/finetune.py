"""Fine-tunes InternVL-Chat-V1.5 and Mini-InternVL-Chat-V1.5 on your own data: up to 12 tiles an image, ViT frozen.

Reproduces shell/internvl1.5/2nd_finetune: in full on 8 GPUs, 128 rows a step; adapters of rank 16 (`lora`) on 2
GPUs, 16 rows.

  python -m internvl_jax.train --config configs/internvl1_5/finetune.py:26b,lora --config.data.meta_path=my_meta.json

Sizes: 2b, 4b (Mini-InternVL), 26b; each also with `lora`.
"""

from internvl_jax.config import TrainConfig
from internvl_jax.recipes import choose, published

SIZES = {
  # size: model, template, drop path, learning rate, weight decay, rows a device
  "2b": ("Mini-InternVL-Chat-2B-V1-5", "internlm2-chat", 0.1, 4e-5, 0.01, 4),
  "4b": ("Mini-InternVL-Chat-4B-V1-5", "phi3-chat", 0.1, 4e-5, 0.05, 4),
  "26b": ("InternVL-Chat-V1-5", "internlm2-chat", 0.4, 2e-5, 0.05, 2),
}
LANGUAGE_MODELS = {"2b": "internlm2_1_8b", "4b": "phi3_3_8b", "26b": "internlm2_20b"}
CHOICES = (*SIZES, *(f"{size},lora" for size in SIZES))


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `internvl_jax.recipes` says what `arg` may be, and it stands for 26b if empty."""
  choice = choose(arg, CHOICES, default="26b")
  model, template, drop_path, rate, decay, per_device = SIZES[choice.size]
  # variant: rows of a step, GPUs, rank of the adapters
  variants = {"": (128, 8, 0), "lora": (16, 2, 16)}
  batch, devices, rank = variants[choice.variant]
  config = published(choice, batch=batch, devices=devices, per_device=per_device)
  script = f"internvl_chat_v1_5/internvl_chat_v1_5_{LANGUAGE_MODELS[choice.size]}_dynamic_res"

  config.model.model_name_or_path = f"./pretrained/{model}"
  config.model.freeze_backbone = True  # The ViT.
  config.model.freeze_mlp = config.model.freeze_llm = rank > 0  # Of LoRA, the adapters alone train.
  config.model.use_llm_lora = rank
  config.model.drop_path_rate = 0.0 if rank else drop_path

  config.data.meta_path = "./shell/data/internvl_1_2_finetune_custom.json"
  config.data.conv_style = template
  config.data.max_seq_length = 4096
  config.data.dynamic_image_size = True
  config.data.max_dynamic_patch = 12
  config.data.use_thumbnail = True

  config.training.output_dir = f"work_dirs/{script}_2nd_finetune_{choice.variant or 'full'}"
  config.training.bf16 = True
  config.training.num_train_epochs = 1
  config.training.learning_rate = rate
  config.training.lr_scheduler_type = "cosine"
  config.training.warmup_ratio = 0.03
  config.training.weight_decay = decay
  config.training.group_by_length = True
  config.training.dataloader_num_workers = 4
  config.training.save_steps = 200
  config.training.save_total_limit = 1
  return config
