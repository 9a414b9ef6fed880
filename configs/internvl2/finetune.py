"""Fine-tunes InternVL2 on your own data: up to 6 tiles an image, ViT frozen.

Reproduces shell/internvl2.0/2nd_finetune: in full on 8 GPUs (40b: 16, 76b: 32), 128 rows a step; adapters of rank 16
(`lora`) on 2 GPUs (76b: 8), 16 rows; `2b,lora_coco` captions COCO with adapters of rank 128 on 8 GPUs, 512 rows.

  python -m internvl_jax.train --config configs/internvl2/finetune.py:8b,lora --config.data.meta_path=my_meta.json

Sizes: 1b, 2b, 4b, 8b, 26b, 40b, 76b; each also with `lora`.
"""

from internvl_jax.config import TrainConfig
from internvl_jax.recipes import choose, published

SIZES = {
  # size: model, template, drop path, learning rate, weight decay, rows a device, GPUs, GPUs of LoRA
  "1b": ("InternVL2-1B", "Hermes-2", 0.1, 4e-5, 0.01, 4, 8, 2),
  "2b": ("InternVL2-2B", "internlm2-chat", 0.1, 4e-5, 0.01, 4, 8, 2),
  "4b": ("InternVL2-4B", "phi3-chat", 0.1, 4e-5, 0.01, 4, 8, 2),
  "8b": ("InternVL2-8B", "internlm2-chat", 0.1, 4e-5, 0.05, 4, 8, 2),
  "26b": ("InternVL2-26B", "internlm2-chat", 0.4, 2e-5, 0.05, 2, 8, 2),
  "40b": ("InternVL2-40B", "Hermes-2", 0.4, 2e-5, 0.05, 2, 16, 2),
  "76b": ("InternVL2-Llama3-76B", "internlm2-chat", 0.4, 2e-5, 0.05, 1, 32, 8),
}
LANGUAGE_MODELS = {
  "1b": "qwen2_0_5b",
  "2b": "internlm2_1_8b",
  "4b": "phi3_3_8b",
  "8b": "internlm2_7b",
  "26b": "internlm2_20b",
  "40b": "hermes2_yi_34b",
  "76b": "hermes2_llama3_70b",
}
CHOICES = (*SIZES, *(f"{size},lora" for size in SIZES), "2b,lora_coco")


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `internvl_jax.recipes` says what `arg` may be, and it stands for 8b if empty."""
  choice = choose(arg, CHOICES, default="8b")
  model, template, drop_path, rate, decay, per_device, gpus, lora_gpus = SIZES[choice.size]
  # variant: rows of a step, GPUs, rank of the adapters
  variants = {"": (128, gpus, 0), "lora": (16, lora_gpus, 16), "lora_coco": (512, 8, 128)}
  batch, devices, rank = variants[choice.variant]
  config = published(choice, batch=batch, devices=devices, per_device=per_device)
  script = f"internvl_chat_v2_0/internvl2_{choice.size}_{LANGUAGE_MODELS[choice.size]}_dynamic_res"

  config.model.model_name_or_path = f"./pretrained/{model}"
  config.model.freeze_backbone = True  # The ViT.
  config.model.freeze_mlp = config.model.freeze_llm = rank > 0  # Of LoRA, the adapters alone train.
  config.model.use_llm_lora = rank
  config.model.drop_path_rate = 0.0 if rank else drop_path

  data = "coco_caption" if choice.variant == "lora_coco" else "internvl_1_2_finetune_custom"
  config.data.meta_path = f"./shell/data/{data}.json"
  config.data.conv_style = template
  config.data.max_seq_length = 4096
  config.data.dynamic_image_size = True
  config.data.max_dynamic_patch = 6
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
