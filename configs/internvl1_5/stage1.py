"""InternVL-Chat-V1.5, first stage: the projector, and in two sizes the ViT, learn on captions; the LLM is frozen.

Reproduces shell/internvl1.5/*/*_pretrain.sh: 2048 rows a step on 128 GPUs (2b, 4b) or 256 (26b, 40b).

  python -m internvl_jax.train --config configs/internvl1_5/stage1.py:26b --config.data.meta_path=my_meta.json

Sizes: 2b (Mini-InternVL, InternLM2-1.8B), 4b (Mini-InternVL, Phi-3), 26b (InternLM2-20B), 40b (Yi-34B).
"""

from internvl_jax.config import TrainConfig
from internvl_jax.recipes import choose, published

SIZES = {
  # size: ViT, language model, template, drop path, learning rate, weight decay, rows a device, GPUs
  "2b": ("300M-448px", "internlm2-chat-1_8b", "internlm2-chat", 0.1, 2e-5, 0.01, 8, 128),
  "4b": ("300M-448px", "Phi-3-mini-128k-instruct", "phi3-chat", 0.0, 2e-4, 0.05, 8, 128),
  "26b": ("6B-448px-V1-5", "internlm2-chat-20b", "internlm2-chat", 0.2, 1e-5, 0.05, 4, 256),
  "40b": ("6B-448px-V1-5", "Nous-Hermes-2-Yi-34B", "Hermes-2", 0.0, 1e-4, 0.05, 2, 256),
}
LANGUAGE_MODELS = {"2b": "internlm2_1_8b", "4b": "phi3_3_8b", "26b": "internlm2_20b", "40b": "hermes2_yi34b"}
CHOICES = tuple(SIZES)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `internvl_jax.recipes` says what `arg` may be, and it stands for 26b if empty."""
  choice = choose(arg, CHOICES, default="26b")
  vit, llm, template, drop_path, rate, decay, per_device, gpus = SIZES[choice.size]
  config = published(choice, batch=2048, devices=gpus, per_device=per_device)

  config.model.vision_path = f"./pretrained/InternViT-{vit}"
  config.model.llm_path = f"./pretrained/{llm}"
  if choice.size == "40b":
    config.model.mlp_path = "./pretrained/InternViT-6B-448px-V1-2/mlp_projector/hermes_2_yi_34b.pth"
  config.model.freeze_backbone = choice.size in ("4b", "40b")  # The ViT.
  config.model.freeze_llm = True
  config.model.drop_path_rate = drop_path

  config.data.meta_path = "path/to/pretrain/data.json"
  config.data.conv_style = template
  config.data.max_seq_length = 4096
  config.data.dynamic_image_size = True
  config.data.max_dynamic_patch = 12
  config.data.use_thumbnail = True

  config.training.output_dir = (
    f"work_dirs/internvl_chat_v1_5_{LANGUAGE_MODELS[choice.size]}_dynamic_res_pretrain"
  )
  config.training.bf16 = True
  config.training.num_train_epochs = 1
  config.training.learning_rate = rate
  config.training.lr_scheduler_type = "cosine"
  config.training.warmup_steps = 100
  config.training.weight_decay = decay
  config.training.dataloader_num_workers = 4
  config.training.save_steps = 200
  config.training.save_total_limit = 3
  return config
