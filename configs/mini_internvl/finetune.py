"""Mini-InternVL, adapted to a domain: InternVL2's small sizes, everything trains.

Reproduces shell/mini_internvl/domain_adaptation, on 8 GPUs: 64 packed rows of 16384 tokens a step (drivelm: 8).
Domains: bdd (driving, BDD-X), drivelm (driving, several views), medical, remote (remote sensing).

  python -m internvl_jax.train --config configs/mini_internvl/finetune.py:2b,drivelm

Sizes: 1b, 2b, 4b, each with one of the domains.
"""

from internvl_jax.config import TrainConfig
from internvl_jax.recipes import choose, published

SIZES = {
  # size: language model, template, epochs
  "1b": ("qwen2_0_5b", "Hermes-2", 2),
  "2b": ("internlm2_1_8b", "internlm2-chat", 2),
  "4b": ("phi3_3_8b", "phi3-chat", 1),
}
DOMAINS = {
  # domain: steps, rows of a step
  "bdd": (240, 64),
  "drivelm": (15100, 8),
  "medical": (2200, 64),
  "remote": (2500, 64),
}
# Every how many steps a checkpoint is saved, and how many are kept, where it is not 700 and 3.
SAVING = {"2b,bdd": (72, 3), "1b,remote": (500, 3), "2b,remote": (500, 7)}
CHOICES = tuple(f"{size},{domain}" for size in SIZES for domain in DOMAINS)


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `internvl_jax.recipes` says what `arg` may be, and it stands for 2b,drivelm if empty."""
  choice = choose(arg, CHOICES, default="2b,drivelm")
  size, domain = choice.size, choice.variant
  llm, template, epochs = SIZES[size]
  steps, batch = DOMAINS[domain]
  save_steps, save_total_limit = SAVING.get(f"{size},{domain}", (700, 3))
  config = published(choice, batch=batch, devices=8)

  config.model.model_name_or_path = f"./pretrained/InternVL2-{size.upper()}"
  config.model.drop_path_rate = 0.1

  config.data.meta_path = f"./InternVL-Domain-Adaptation-Data/train_meta/internvl_1_2_finetune_{domain}.json"
  config.data.conv_style = template
  config.data.max_seq_length = 8192
  config.data.dynamic_image_size = True
  config.data.max_dynamic_patch = 12
  config.data.use_thumbnail = True
  config.data.use_packed_ds = True
  config.data.max_packed_tokens = 16384
  config.data.num_images_expected = 48
  config.data.strict_mode = False
  config.data.loss_reduction = "square"
  config.data.loss_reduction_all_gather = True

  config.training.output_dir = (
    f"work_dirs/domain_adaptation/internvl2_{size}_{llm}_dynamic_res_finetune_{domain}"
  )
  config.training.bf16 = True
  config.training.max_steps = steps
  config.training.num_train_epochs = epochs  # The steps go before them.
  config.training.learning_rate = 1e-5
  config.training.lr_scheduler_type = "cosine"
  config.training.warmup_ratio = 0.03
  config.training.weight_decay = 0.01
  config.training.dataloader_num_workers = 8
  config.training.remove_unused_columns = False
  config.training.save_steps = save_steps
  config.training.save_total_limit = save_total_limit
  return config
