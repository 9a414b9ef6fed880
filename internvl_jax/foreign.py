"""Arguments that launch scripts set and that no field has: the reference's, those of Hugging Face's Trainer, others' names.

One rule, that of `internvl_jax.unused_settings`: a value that asks for what is so anyway (HARMLESS) is accepted; one that asks
for what will not happen, and for no other result (PASSING: speed, messages), is said once in the log with what takes its
place; all others are refused, with the same words.
"""

FOREIGN: dict[str, str] = {
  # The reference's.
  "split_annotations": "every host already reads only its share of the lines",
  "use_custom_flash_attn": "runtime.attention names the attention backend",
  "wandb_project": "training.project is W&B's project, with training.report_to='wandb'",
  # What computes, and how.
  "local_rank": "processes find their place by themselves (runtime.distributed)",
  "tf32": "float32 is computed as float32; use training.bf16=True to be faster",
  "half_precision_backend": "training.bf16=True is the one mixed precision",
  "fp16_opt_level": "training.bf16=True is the one mixed precision",
  "fp16_backend": "training.bf16=True is the one mixed precision",
  "bf16_full_eval": "evaluation computes as training does (training.bf16)",
  "fp16_full_eval": "evaluation computes as training does (training.bf16)",
  "torch_compile": "the whole step is always compiled, by XLA",
  "torch_compile_backend": "the whole step is always compiled, by XLA",
  "torch_compile_mode": "the whole step is always compiled, by XLA (runtime.xla_options are its options)",
  "torchdynamo": "the whole step is always compiled, by XLA",
  "jit_mode_eval": "the whole step is always compiled, by XLA",
  "use_ipex": "the whole step is always compiled, by XLA",
  "use_liger_kernel": "the loss is always a fused linear cross-entropy, which never builds all logits",
  "liger_kernel_config": "the loss is always a fused linear cross-entropy, which never builds all logits",
  "torch_empty_cache_steps": "memory is laid out when the step is compiled, and does not fragment",
  "use_cache": "training keeps no keys and values",
  "gradient_checkpointing_kwargs": "runtime.remat_policy says what is recomputed",
  "activation_checkpointing": "training.gradient_checkpointing recomputes, and runtime.remat_policy says what",
  "activation_checkpointing_kwargs": "runtime.remat_policy says what is recomputed",
  "auto_find_batch_size": "`plan` tells what fits before a run starts; set training.per_device_train_batch_size by it",
  "use_cpu": "JAX_PLATFORMS=cpu in the environment does that",
  "no_cuda": "JAX_PLATFORMS=cpu in the environment does that",
  "use_mps_device": "JAX takes the devices that it finds (JAX_PLATFORMS)",
  "tpu_num_cores": "all of the TPU's cores are used",
  "tpu_metrics_debug": "runtime.profile_steps writes a trace",
  "full_determinism": "the same settings give the same numbers anyway, on the same devices",
  "enable_jit_checkpoint": "SIGTERM always saves and ends the run",
  # Parallelism.
  "fsdp": "mesh.fsdp shards parameters, gradients and moments",
  "fsdp_config": "mesh.fsdp shards parameters, gradients and moments",
  "fsdp_min_num_params": "mesh.fsdp shards all parameters that divide",
  "fsdp_transformer_layer_cls_to_wrap": "mesh.fsdp gathers layer by layer",
  "parallelism_config": "mesh.data, fsdp, expert, sequence and tensor are the axes",
  "accelerator_config": "mesh.* and loader.* say what it does",
  "sharded_ddp": "mesh.fsdp shards parameters, gradients and moments",
  "ddp_timeout": "runtime.hang_seconds tells where a run stands still, and a lost process ends the others",
  "ddp_find_unused_parameters": "what is frozen has no gradient, and nothing waits for one",
  "ddp_bucket_cap_mb": "XLA combines collectives (runtime.xla_options sets its thresholds)",
  "ddp_broadcast_buffers": "there are no buffers that change",
  "ddp_static_graph": "the compiled step is static",
  "ddp_backend": "XLA's collectives are used: NCCL on GPUs",
  # Data.
  "dataloader_persistent_workers": "workers (training.dataloader_num_workers) live as long as the run",
  "dataloader_pin_memory": "batches go to the devices while the step before them runs",
  "dataloader_prefetch_factor": "loader.prefetch is the number of micro-batches that each worker makes ahead",
  "dataloader_multiprocessing_context": "workers are started the one way that is safe beside JAX",
  "dataloader_in_order": "the order of samples depends on the seed alone, whatever the workers do",
  "dataloader_drop_last": "rows of all epochs follow each other without a gap; the last step of a run is filled up",
  "ignore_data_skip": "a resumed run goes on with the very next batch, without reading those before it",
  "length_column_name": "lengths are measured and kept in an index (loader.cache_dir)",
  "train_sampling_strategy": "loader.shuffle, training.group_by_length and data.use_data_resampling are the ways",
  "label_names": "labels are the answers' tokens",
  "include_for_metrics": "answers are scored against the jsonl of eval.annotation",
  "include_inputs_for_metrics": "answers are scored against the jsonl of eval.annotation",
  "include_num_input_tokens_seen": "the log has supervised tokens and tiles a second",
  "include_tokens_per_second": "the log has supervised tokens and tiles a second",
  "average_tokens_across_devices": "data.loss_reduction_all_gather=True takes one mean over all devices' tokens",
  # What is learned.
  "label_smoothing_factor": "the loss is plain cross-entropy, as the reference's",
  "neftune_noise_alpha": "no noise is added to embeddings; lora.dropout and model.drop_path_rate are what there is",
  "optim_target_modules": "the optimizer updates all that trains; lora.targets names what adapters are put on",
  "adafactor": "training.optim='adafactor' is what asks for it",
  "lr_scheduler_args": "training.lr_scheduler_kwargs takes them as JSON",
  # Evaluation.
  "do_eval": "training.eval_strategy says when eval.annotation is scored; at the end it always is",
  "do_predict": "`python -m internvl_jax.generate` answers, `python -m internvl_jax.evaluate` scores",
  "evaluate_during_training": "training.eval_strategy says when eval.annotation is scored",
  "eval_delay": "training.eval_strategy says when eval.annotation is scored",
  "per_device_eval_batch_size": "eval.batch_size is the number of questions answered at once",
  "per_gpu_train_batch_size": "training.per_device_train_batch_size is its name",
  "per_gpu_eval_batch_size": "eval.batch_size is the number of questions answered at once",
  "eval_accumulation_steps": "answers are short, and leave the devices after each batch",
  "eval_do_concat_batches": "answers are scored one by one",
  "eval_use_gather_object": "answers are scored one by one",
  "batch_eval_metrics": "answers are scored one by one",
  "prediction_loss_only": "eval.metrics=('loss',) computes the loss alone",
  "predict_with_generate": "answers are always generated",
  "generation_max_length": "eval.max_new_tokens is the longest answer",
  "generation_num_beams": "answers are greedy",
  # Saving.
  "resume_from_checkpoint": "the same command resumes from the newest checkpoint in training.output_dir",
  "save_only_model": (
    "a checkpoint is there to go on from, so it holds the optimizer; the final model holds weights alone "
    "(docs/training.md tells how to make a model of a checkpoint)"
  ),
  "save_safetensors": "models are always written as safetensors",
  "save_on_each_node": "one copy of each checkpoint is written, by all hosts together",
  "restore_callback_states_from_checkpoint": "a checkpoint holds all of the run's state",
  "push_to_hub": "the final model in training.output_dir is whole: `huggingface-cli upload ORG/NAME FOLDER` publishes it",
  **dict.fromkeys(
    (
      *("push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token", "hub_model_id", "hub_token"),
      *("hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
    ),
    "`huggingface-cli upload ORG/NAME FOLDER` publishes the final model",
  ),
  # Logging.
  "trackio_space_id": "TRACKIO_SPACE_ID in the environment names the Space",
  "trackio_bucket_id": "TRACKIO_SPACE_ID in the environment names the Space, which has a bucket",
  "trackio_static_space_id": "`trackio sync` makes a static Space of a run",
  "log_level": "--verbosity=1 tells more, --verbosity=-1 less",
  "log_level_replica": "the first process tells what all of them do, the others what goes wrong",
  "log_on_each_node": "the first process tells what all of them do, the others what goes wrong",
  "logging_nan_inf_filter": "a step whose loss is not finite is skipped, named and left out of the logged mean",
  "skip_memory_metrics": "the log has the peak of the devices' memory",
  "debug": "a step whose loss is not finite names its samples",
  "mp_parameters": "mesh.* and loader.* say what it does",
  "past_index": "training keeps no keys and values",
  "ray_scope": "there is no search of settings",
}
"""Name -> what takes its place."""

SAME_AS: dict[str, str] = {
  # ms-swift's.
  "vit_lr": "training.vision_lr",
  "aligner_lr": "training.projector_lr",
  # LLaVA's and Qwen-VL's.
  "mm_projector_lr": "training.projector_lr",
  "mm_vision_tower_lr": "training.vision_lr",
  "vision_tower_lr": "training.vision_lr",
  "merger_lr": "training.projector_lr",
}
"""Arguments of other trainers -> the fields that say the same."""

_OFF = ("false", "none", "0", "0.0", "", "no")
_EITHER = ("true", "false")

HARMLESS: dict[str, tuple[str, ...]] = {
  **dict.fromkeys(FOREIGN, _OFF),
  "logging_nan_inf_filter": ("true",),
  "torch_compile": _EITHER,
  "use_liger_kernel": _EITHER,
  "full_determinism": _EITHER,
  "enable_jit_checkpoint": _EITHER,
  "ddp_find_unused_parameters": _EITHER,
  "ddp_broadcast_buffers": _EITHER,
  "ddp_static_graph": _EITHER,
  "dataloader_persistent_workers": _EITHER,
  "dataloader_pin_memory": _EITHER,
  "dataloader_in_order": ("true",),
  "ignore_data_skip": ("false",),
  "train_sampling_strategy": ("random",),
  "average_tokens_across_devices": _OFF,
  "do_eval": _EITHER,
  "predict_with_generate": ("true",),
  "generation_num_beams": ("1", "none"),
  "evaluate_during_training": _OFF,
  "resume_from_checkpoint": ("true", "none"),
  "save_safetensors": ("true",),
  "ddp_timeout": ("1800",),
  "local_rank": ("-1", "0"),
  "past_index": ("-1",),
}
"""Name -> the values, as they are typed in lower case, that ask for what is so anyway."""

PASSING = frozenset(
  {
    *("split_annotations", "use_custom_flash_attn"),
    *("torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "ddp_bucket_cap_mb"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "length_column_name"),
    *(
      "per_device_eval_batch_size",
      "per_gpu_eval_batch_size",
      "eval_accumulation_steps",
    ),
    *("log_level", "log_level_replica", "log_on_each_node", "skip_memory_metrics", "eval_do_concat_batches"),
    *(
      "include_num_input_tokens_seen",
      "include_tokens_per_second",
      "gradient_checkpointing_kwargs",
      "ddp_backend",
    ),
    *("hub_strategy", "hub_private_repo", "hub_model_id"),
  }
)
"""Names all of whose values are accepted, with a word: none of them changes what is learned or left."""


def answer(name: str, value: str) -> tuple[bool, str]:
  """Whether an argument that no field has is accepted with that value, and what is to be said of it; "" is nothing.

  Args:
    name: one of FOREIGN.
    value: as it is typed.
  """
  typed = value.strip().strip("'\"").lower()
  if typed in HARMLESS[name]:
    return True, ""
  return name in PASSING, FOREIGN[name]
