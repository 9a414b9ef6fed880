"""Online reinforcement of InternVL3.5, the second stage of its cascade: GSPO on questions with verifiable answers.

The numbers are those of Weiyun1025/verl-internvl, shell/internvl3_5_*.sh, which InternVL's README names for this stage: 16
answers to a prompt at temperature 1, 32 prompts a step, rate 1e-6, constant, AdamW with verl's weight decay of 0.01, no KL
divergence, ratios of sequences, losses averaged over tokens. What differs: there, 512 prompts are answered at once and
learned from in 16 steps of 32, with ratios clipped to 1 +- 0.2 (verl's default); here each step samples anew, so that all
ratios are 1. Answers may have 32,768 tokens there, and 1,024 here, where a row holds all answers to a prompt. Its
rewards are those of MMPR-Tiny's graders; name yours in `grpo.reward_funcs`. It has not been run at these sizes.

  python -m internvl_jax.train --config configs/internvl3_5/grpo.py:8b --config.data.meta_path=my_meta.json

Sizes: 1b, 2b, 4b, 8b, 14b, 38b, 30b. `lora` trains adapters of rank 16 on the language model, at 10 times the rate.
"""

from internvl_jax.config import TrainConfig
from internvl_jax.recipes import choose, published

SIZES = {
  "1b": "1B",
  "2b": "2B",
  "4b": "4B",
  "8b": "8B",
  "14b": "14B",
  "30b": "30B-A3B",
  "38b": "38B",
}
CHOICES = (*SIZES, *(f"{size},lora" for size in SIZES))


def get_config(arg: str = "") -> TrainConfig:
  """The recipe; `internvl_jax.recipes` says what `arg` may be, and it stands for 8b if empty."""
  choice = choose(arg, CHOICES, default="8b")
  config = published(choice, batch=32, devices=16)

  config.model.model_name_or_path = f"OpenGVLab/InternVL3_5-{SIZES[choice.size]}-MPO"
  config.data.conv_style = "internvl2_5"
  config.data.max_seq_length = 8192
  config.data.dynamic_image_size = True
  config.data.max_dynamic_patch = 12
  config.data.use_thumbnail = True

  config.grpo.reward_funcs = ("exact_match",)
  config.grpo.num_generations = 16
  config.grpo.max_completion_length = 1024
  config.grpo.importance_sampling_level = "sequence"
  config.grpo.loss_type = "dapo"
  config.grpo.num_completions_to_print = 2

  config.training.output_dir = f"work_dirs/internvl3_5_{choice.size}_grpo"
  config.training.bf16 = True
  config.training.num_train_epochs = 1
  config.training.learning_rate = 1e-6
  config.training.lr_scheduler_type = "constant"
  config.training.weight_decay = 0.01
  config.training.gradient_checkpointing = True
  config.training.dataloader_num_workers = 4
  config.training.save_steps = 10
  config.training.save_total_limit = 2
  if choice.variant == "lora":
    config.model.use_llm_lora = 16
    config.model.freeze_backbone = config.model.freeze_mlp = config.model.freeze_llm = True
    config.training.learning_rate = 1e-5
  return config
