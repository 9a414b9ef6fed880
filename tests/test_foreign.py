"""Arguments of Hugging Face's Trainer and of the reference that no field has: accepted, said, or refused with a reason."""

import re

import pytest
from absl import flags

from internvl_jax import cli
from internvl_jax.config import FIELDS
from internvl_jax.errors import UserError
from internvl_jax.foreign import FOREIGN, HARMLESS, PASSING, answer

# Fields of transformers.TrainingArguments, of releases 4.37, 4.49 and 5.24 together.
THEIRS = """
  output_dir overwrite_output_dir do_train do_eval do_predict evaluation_strategy eval_strategy prediction_loss_only
  per_device_train_batch_size per_device_eval_batch_size per_gpu_train_batch_size per_gpu_eval_batch_size
  gradient_accumulation_steps eval_accumulation_steps eval_delay torch_empty_cache_steps learning_rate weight_decay
  adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_train_epochs max_steps lr_scheduler_type lr_scheduler_kwargs
  warmup_ratio warmup_steps log_level log_level_replica log_on_each_node logging_dir logging_strategy
  logging_first_step logging_steps logging_nan_inf_filter save_strategy save_steps save_total_limit save_safetensors
  save_on_each_node save_only_model restore_callback_states_from_checkpoint no_cuda use_cpu use_mps_device seed
  data_seed jit_mode_eval use_ipex bf16 fp16 fp16_opt_level half_precision_backend bf16_full_eval fp16_full_eval tf32
  local_rank ddp_backend tpu_num_cores tpu_metrics_debug debug dataloader_drop_last eval_steps dataloader_num_workers
  dataloader_prefetch_factor past_index run_name disable_tqdm remove_unused_columns label_names
  load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip fsdp fsdp_min_num_params fsdp_config
  fsdp_transformer_layer_cls_to_wrap accelerator_config deepspeed label_smoothing_factor optim optim_args adafactor
  group_by_length length_column_name report_to ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
  dataloader_pin_memory dataloader_persistent_workers skip_memory_metrics push_to_hub resume_from_checkpoint
  hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision gradient_checkpointing
  gradient_checkpointing_kwargs include_inputs_for_metrics include_for_metrics eval_do_concat_batches fp16_backend
  push_to_hub_model_id push_to_hub_organization push_to_hub_token mp_parameters auto_find_batch_size full_determinism
  torchdynamo ray_scope ddp_timeout torch_compile torch_compile_backend torch_compile_mode include_tokens_per_second
  include_num_input_tokens_seen neftune_noise_alpha optim_target_modules batch_eval_metrics eval_on_start
  use_liger_kernel liger_kernel_config eval_use_gather_object average_tokens_across_devices activation_checkpointing
  activation_checkpointing_kwargs use_cache project trackio_space_id trackio_bucket_id trackio_static_space_id
  enable_jit_checkpoint parallelism_config dataloader_multiprocessing_context dataloader_in_order
  train_sampling_strategy ddp_static_graph predict_with_generate generation_max_length generation_num_beams
"""


def test_all_of_the_trainers_arguments_are_answered():
  known = {path.split(".")[1] for path in FIELDS} | set(FOREIGN)
  assert [name for name in THEIRS.split() if name not in known] == []


def test_tables_fit_together():
  # mesh.fsdp is a number of devices, training.fsdp would be a text.
  assert set(FOREIGN) & {path.split(".")[1] for path in FIELDS} == {"fsdp"}
  assert set(HARMLESS) == set(FOREIGN) > PASSING
  named = re.compile(r"\b(?:model|data|training|preference|distillation|loader|lora|eval|runtime|mesh)\.\w+")
  assert set(named.findall(" ".join(FOREIGN.values()))) - {"training.md"} <= set(FIELDS)
  assert not [name for name, why in FOREIGN.items() if "\n" in why or why.endswith(".")]


def parse(tmp_path, *overrides):
  recipe = tmp_path / "recipe.py"
  recipe.write_text(
    "from internvl_jax.config import TrainConfig\ndef get_config(arg=''):\n  return TrainConfig()\n"
  )
  argv = ["command", f"--config={recipe}", *(f"--{override}" for override in overrides)]
  values = flags.FlagValues()
  holder = cli.define_config_flag(values, argv)
  cli.parse_flags(argv, values)
  return holder.value


def test_what_is_so_anyway_is_accepted_in_silence(tmp_path):
  config = parse(
    tmp_path,
    "config.training.ddp_find_unused_parameters=False",
    "config.training.dataloader_persistent_workers",
    "config.training.learning_rate=0.5",
    "config.training.push_to_hub=False",
    "noconfig.training.fsdp_config",
    "config.training.do_eval=True",
    "config.training.neftune_noise_alpha=None",
    "config.training.resume_from_checkpoint=True",
    "config.training.ignore_data_skip=False",
    "config.training.data_seed=None",
  )
  assert config.training.learning_rate == 0.5
  assert cli._passed == []


def test_what_changes_nothing_that_is_learned_is_said_once(tmp_path, absl_log):
  config = parse(tmp_path, "config.training.log_level=debug", "config.data.split_annotations=True")
  cli.warn_idle(config)
  assert absl_log.messages == [
    "training.log_level=debug has no effect: --verbosity=1 tells more, --verbosity=-1 less",
    "data.split_annotations=True has no effect: every host already reads only its share of the lines",
  ]


@pytest.mark.parametrize(
  ("override", "words"),
  [
    ("save_only_model=True", "a checkpoint is there to go on from"),
    ("neftune_noise_alpha=5", "no noise is added to embeddings"),
    ("label_smoothing_factor=0.1", "the loss is plain cross-entropy"),
    ("ignore_data_skip=True", "the very next batch"),
    ("resume_from_checkpoint=out/checkpoint-100", "the same command resumes"),
    ("push_to_hub=True", "huggingface-cli upload"),
    ("fsdp=full_shard auto_wrap", "mesh.fsdp shards"),
    ("auto_find_batch_size=True", "`plan` tells"),
    ("average_tokens_across_devices=True", "data.loss_reduction_all_gather=True"),
    ("save_safetensors=False", "always written as safetensors"),
    ("generation_num_beams=4", "answers are greedy"),
    ("hub_token=hf_secret", "publishes the final model"),
  ],
)
def test_what_asks_for_another_result_is_refused(tmp_path, override, words):
  with pytest.raises(UserError) as error:
    parse(tmp_path, f"config.training.{override}")
  assert words in str(error.value) and "\n" not in str(error.value) and "hf_secret" not in str(error.value)


@pytest.mark.parametrize("name", FOREIGN)
def test_switched_off_they_ask_for_nothing(name):
  """Where off is what is so; the others have a word for it."""
  always = {"save_safetensors", "logging_nan_inf_filter", "dataloader_in_order", "predict_with_generate"}
  by_name = {"train_sampling_strategy", "ddp_timeout", "local_rank", "past_index", "resume_from_checkpoint"}
  accepted, _ = answer(name, "False" if name not in {"generation_num_beams"} else "1")
  assert accepted is (name not in always | by_name)
