"""The leaves of the configuration: plain dataclasses, one for each package's settings.

`ModelArguments` and `DataTrainingArguments` carry exactly the names, types and defaults of the
reference's command line (OpenGVLab/InternVL, `internvl_chat`), and `TrainingArguments` those of Hugging
Face's `TrainingArguments`, so that an existing launch script can be read across line by line. What neither
has a name for lives in the small configs below them, and the settings of tasks in `internvl_jax.task_arguments`.

This module imports nothing of the package: a package takes its leaf from here and never sees the whole tree,
which is put together and checked in `internvl_jax.config`.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(kw_only=True, slots=True)
class ModelArguments:
  """Which weights to start from and which parts of the model train (the reference's 17 fields)."""

  # The whole model (ViT, projector and LLM): a checkpoint folder in either layout, a PEFT adapter's folder, the URL of
  # one in a bucket (gs://, s3://), or a hub id.
  model_name_or_path: str | None = None
  # Checkpoint of the ViT, for building a new model (stage 1).
  vision_path: str | None = None
  # Checkpoint of the language model, for building a new model.
  llm_path: str | None = None
  # Checkpoint of the projector, of a new model or in place of a whole model's own.
  mlp_path: str | None = None
  # The language model does not train: no gradient, no optimizer state, no backward pass.
  freeze_llm: bool = False
  # The ViT does not train.
  freeze_backbone: bool = False
  # The projector does not train.
  freeze_mlp: bool = False
  # Train the ViT layers from this index on (negative: counted from the end) under a frozen backbone.
  unfreeze_vit_layers: int = 0
  # Which of the ViT's n+1 hidden states feeds the projector; later layers are not run.
  vision_select_layer: int = -1
  # Rank of LoRA adapters for the ViT, which is frozen; 0 is off.
  use_backbone_lora: int = 0
  # Rank of LoRA adapters for the language model, which is frozen; 0 is off.
  use_llm_lora: int = 0
  # Train the output embedding although the LLM is frozen.
  unfreeze_lm_head: bool = False
  # Recompute activations in the backward pass (`runtime.remat_policy` says which).
  grad_checkpoint: bool = True
  # Stochastic depth in the ViT: the rate of the last layer, rising linearly from 0.
  drop_path_rate: float = 0.0
  # Pixel shuffle: "v1" transposes height and width (checkpoints before 1.5), "v2" keeps them.
  ps_version: Literal["v1", "v2"] = "v2"
  # Has no effect, and is told so: the tokenizers library is always used.
  use_fast_tokenizer: bool = False
  # Accepted for compatibility: the [rows, sequence, vocabulary] logits are never built, with or without it.
  use_liger: bool = False


MOST_TILES = 4096
"""Most tiles of an image's grid, a million tokens: all grids of up to so many are compared for each image."""


@dataclasses.dataclass(kw_only=True, slots=True)
class DataTrainingArguments:
  """Which data to read and how a sample becomes tokens and tiles (the reference's 24 fields)."""

  # Longest sample in tokens, image tokens included.
  max_seq_length: int = 8192
  # Side of a square tile in pixels.
  force_image_size: int = 448
  # Pixel shuffle keeps this share of each side: 0.5 turns 32x32 patches into 16x16 tokens.
  down_sample_ratio: float = 0.5
  # Pad an image to a square with the mean color before resizing.
  pad2square: bool = False
  # Conversation template, by name.
  conv_style: str = "internlm2-chat"
  # JSON file that lists the datasets of the mixture; a path or a URL.
  meta_path: str | None = None
  # Draw datasets in proportion to the square root of their length.
  use_data_resampling: bool = False
  # Cut an image into the grid of tiles that fits its aspect ratio best.
  dynamic_image_size: bool = False
  # Add a tile with the whole image when it was cut into more than one.
  use_thumbnail: bool = False
  # Fewest tiles of one image's grid (the thumbnail comes on top).
  min_dynamic_patch: int = 1
  # Most tiles of one image's grid; several images of a line share it.
  max_dynamic_patch: int = 12
  # Fewest frames taken from a video.
  min_num_frame: int = 8
  # Most frames taken from a video.
  max_num_frame: int = 32
  # Mean and standard deviation of the pixels.
  normalize_type: Literal["imagenet", "clip", "siglip"] = "imagenet"
  # Pack several samples into one row.
  use_packed_ds: bool = False
  # Tile budget of a packed row.
  num_images_expected: int = 40
  # Token budget of a packed row.
  max_packed_tokens: int = 8192
  # Open rows that the reference keeps while packing. Here a row chooses among 12.8 waiting samples for each: 256 for 20.
  max_buffer_size: int = 20
  # Report the fill of packed rows every so many rows.
  log_freq: int = 1000
  # Pad the tiles of every packed row to `num_images_expected`.
  strict_mode: bool = True
  # Draw the dataset of every packed sample anew, in proportion to its length, and begin a dataset again when it ends.
  replacement: bool = False
  # Let a row exceed its token budget by its last sample.
  allow_overflow: bool = False
  # Weight of a packed token: "token" 1, "sample" 1/n, "square" 1/sqrt(n); n = supervised tokens of its sample.
  loss_reduction: str = "token"
  # One denominator for the whole optimizer batch, in place of one a device and micro-batch.
  loss_reduction_all_gather: bool = False


@dataclasses.dataclass(kw_only=True, slots=True)
class TrainingArguments:
  """How to optimize, log and save, under Hugging Face's names and defaults."""

  # Where checkpoints, logs and the final model go.
  output_dir: str | None = None
  # Start anew although output_dir holds a run; without it the run resumes from its newest checkpoint.
  overwrite_output_dir: bool = False
  # Must be True in effect: training is what this command does. Recipes set it.
  do_train: bool = False
  # Rows per data-parallel device and micro-batch.
  per_device_train_batch_size: int = 8
  # Micro-batches summed into one optimizer step.
  gradient_accumulation_steps: int = 1
  # Passes over the data; ignored when max_steps is positive.
  num_train_epochs: float = 3.0
  # Optimizer steps; -1 derives them from num_train_epochs.
  max_steps: int = -1
  # Peak learning rate.
  learning_rate: float = 5e-5
  # Peak learning rate of the ViT, under the same schedule; None: learning_rate.
  vision_lr: float | None = None
  # The same of the projector.
  projector_lr: float | None = None
  # The same of the language model.
  language_lr: float | None = None
  # The same of adapters, in whichever part they are.
  adapters_lr: float | None = None
  # Peak learning rates by names of the checkpoint's tensors, as JSON: '{"mlp1\\..*": 1e-4}'. Regular expressions; the first
  # that matches a whole name counts, before all other rates.
  lr_by_pattern: str | None = None
  # Layer-wise decay of the ViT's rates: that of a layer is so many times that of the layer above it. 1: no decay.
  layer_lr_decay: float = 1.0
  # Decoupled weight decay, on what the reference's names make decay: not on biases and most norms (`optim.labels.decays`).
  weight_decay: float = 0.0
  # Decoupled decay of what trains towards where the run began, in place of towards 0 (L2-SP); see docs/forgetting.md.
  l2_to_start: float = 0.0
  # Decay of AdamW's mean of gradients, for each step.
  adam_beta1: float = 0.9
  # Decay of AdamW's mean of squared gradients.
  adam_beta2: float = 0.999
  # Is added to the root of AdamW's mean of squared gradients.
  adam_epsilon: float = 1e-8
  # Gradients are scaled down to this global norm; 0 turns clipping off.
  max_grad_norm: float = 1.0
  # adamw_torch (the same as adamw_torch_fused, adamw_torch_xla, adamw_apex_fused), adamw_8bit (the same as adamw_bnb_8bit,
  # adamw_torch_8bit, paged_adamw_8bit), adafactor, lion_32bit, muon, sgd.
  optim: str = "adamw_torch"
  # Arguments of the optimizer: "momentum=0.9,nesterov=true". With any optimizer, ema_decay=0.999 keeps averages of the weights
  # (see checkpoint.export_average).
  optim_args: str | None = None
  # linear, cosine, constant, constant_with_warmup, cosine_with_restarts, cosine_with_min_lr, polynomial,
  # inverse_sqrt.
  lr_scheduler_type: str = "linear"
  # Arguments of the schedule, as JSON: '{"min_lr_rate": 0.1}'.
  lr_scheduler_kwargs: str | None = None
  # Share of all steps, rounded up, in which the learning rate rises linearly; of no meaning beside warmup_steps.
  warmup_ratio: float = 0.0
  # Steps in which the learning rate rises linearly; 0 leaves it to warmup_ratio.
  warmup_steps: int = 0
  # When to log: "steps", "epoch", or "no" (after the last step only).
  logging_strategy: str = "steps"
  # Log every so many optimizer steps (and after the first, if asked); below 1, a share of all steps.
  logging_steps: float = 500.0
  # Log after the first step, too.
  logging_first_step: bool = False
  # Trackers that get the metrics, with commas between: tensorboard, wandb, mlflow, trackio; "all" is each that is
  # installed, "none" is none.
  report_to: str = "none"
  # What trackers call the run; unset: the name of output_dir's last folder.
  run_name: str | None = None
  # What trackers file the run under (a project of W&B or Trackio, an experiment of MLflow); unset: what their own variable
  # of the environment says (WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME, TRACKIO_PROJECT), or internvl_jax.
  project: str | None = None
  # Where TensorBoard files go; output_dir/tensorboard if unset.
  logging_dir: str | None = None
  # Hide the progress bar.
  disable_tqdm: bool = False
  # When to write a resumable checkpoint: "no", "steps" or "epoch".
  save_strategy: str = "steps"
  # Save every so many optimizer steps; below 1, a share of all steps.
  save_steps: float = 500.0
  # Keep the newest so many checkpoints (and the best one, under load_best_model_at_end); None keeps all.
  save_total_limit: int | None = None
  # When to score `eval.annotation`: "no" (at the end only), "steps" or "epoch". Both spellings are read.
  evaluation_strategy: str = "no"
  # The same as evaluation_strategy, under its newer name.
  eval_strategy: str = "no"
  # Score every so many optimizer steps; below 1, a share of all steps; unset: logging_steps.
  eval_steps: float | None = None
  # Score before the first step, too.
  eval_on_start: bool = False
  # The final model is that of the checkpoint with the best score, in place of the last step's.
  load_best_model_at_end: bool = False
  # The score it goes by: "accuracy", "loss", "SET/METRIC", "METRIC_GROUP", or of pairs "rewards/accuracies", ...; unset:
  # the first metric of the first set, or the pairs' rewards/accuracies where there is none.
  metric_for_best_model: str | None = None
  # Whether the greatest value is the best; unset: of all metrics but losses.
  greater_is_better: bool | None = None
  # Seeds parameters, dropout and augmentation, and the order of the data where data_seed does not.
  seed: int = 42
  # Seeds the order of the data; None: seed does.
  data_seed: int | None = None
  # Compute in bfloat16; what trains keeps float32 master weights.
  bf16: bool = False
  # Refused: float16 would need loss scaling; use bf16.
  fp16: bool = False
  # Same effect as model.grad_checkpoint.
  gradient_checkpointing: bool = False
  # One of the reference's ZeRO JSON files; its stage picks the sharding.
  deepspeed: str | None = None
  # Worker processes that decode; 0 decodes in threads of this process.
  dataloader_num_workers: int = 0
  # Deal the samples of a step to devices by their length, so that none waits long for another.
  group_by_length: bool = False
  # Accepted for compatibility: batches hold only what the model reads.
  remove_unused_columns: bool = True


@dataclasses.dataclass(kw_only=True, slots=True)
class MeshConfig:
  """How many devices each axis of the mesh takes; -1 is the rest, on one axis at most."""

  # Copies of the model, which take rows of their own.
  data: int = -1
  # Parts of parameters, gradients and moments (sharded), all-gathered layer by layer; its devices take rows of their own, too.
  fsdp: int = 1
  # Parts of the experts, of models that have them; its devices share rows.
  expert: int = 1
  # Parts of a row's tokens; its devices share rows.
  sequence: int = 1
  # Parts of heads, feed-forward and vocabulary; its devices share rows.
  tensor: int = 1


@dataclasses.dataclass(kw_only=True, slots=True)
class LoRAConfig:
  """What `use_backbone_lora` and `use_llm_lora` leave open."""

  # Scale numerator; None is twice the rank, as in the reference.
  alpha: float | None = None
  # Share of the adapters' inputs that is dropped in training.
  dropout: float = 0.05
  # Regular expressions that end the adapted linear maps' paths in a layer ("q_proj", r"self_attn\.\w+"); empty
  # is the reference's choice: the projections of attention and of the feed-forward.
  targets: tuple[str, ...] = ()
  # Train the magnitude of each adapted map's columns apart from their direction (DoRA).
  use_dora: bool = False
  # Scale adapters by alpha / sqrt(rank) in place of alpha / rank (rsLoRA).
  use_rslora: bool = False
  # Store the frozen weights of the layers that have adapters in 4 bits ("nf4") or 8 ("int8"), as peft does with
  # load_in_4bit and load_in_8bit (QLoRA). Restored one by one as they are used. See docs/training.md for what it costs.
  quantize_base: Literal["none", "int8", "nf4"] = "none"


@dataclasses.dataclass(kw_only=True, slots=True)
class LoaderConfig:
  """The loader's behavior that the reference has no name for."""

  # Shuffle every epoch (a function of seed and epoch); False reads the lines in order.
  shuffle: bool = True
  # A sample that cannot be read: "error" stops the run, "drop" masks its place and counts it.
  on_bad_sample: Literal["error", "drop"] = "error"
  # A sample of more than data.max_seq_length tokens, or larger than a packed row: "error" stops the run, "drop"
  # leaves it out and counts it, "shrink_tiles" gives its images fewer tiles or its video fewer frames until it fits,
  # "truncate" cuts its end off, before an image rather than through it. See docs/data.md.
  on_over_length: Literal["error", "drop", "shrink_tiles", "truncate"] = "truncate"
  # Abort once a larger share of the samples read so far was lost; those that on_over_length="drop" drops not counted.
  max_bad_fraction: float = 0.01
  # Abort once a larger share of the samples read so far had no supervised token: nothing is learned from them. 1.0 never
  # does, as the reference.
  max_untaught_fraction: float = 0.5
  # Lengths that rows are padded to; empty: max_seq_length halved down to 256. The last one must hold
  # max_seq_length.
  sequence_buckets: tuple[int, ...] = ()
  # Sizes that a device's tile pool is padded to. Pools beyond the last one, and all pools where none is given,
  # take 1, 2, 3, 4, 6, 8, 12, 16, 24, ... tiles.
  tile_buckets: tuple[int, ...] = ()
  # Optimizer steps among which packed rows are exchanged so that the devices of each step finish together; 0 takes the
  # rows as they come. Nothing changes on a single data-parallel device. See docs/data.md.
  balance_steps: int = 64
  # What balance_steps takes a tile, a token and a pair of attention to cost, in any one unit of time: three numbers, as
  # benchmarks/gpu.py measures them; empty: in proportion to the model's FLOPs. A run that resumes keeps those it began with.
  balance_costs: tuple[float, ...] = ()
  # Micro-batches made ahead by each worker.
  prefetch: int = 4
  # Folder of the indexes of lines and sizes, and of copies of remote annotation files, on a disk of this machine; None:
  # internvl_jax in the user's cache folder.
  cache_dir: str | None = None


@dataclasses.dataclass(kw_only=True, slots=True)
class CheckpointConfig:
  """What is written at the end of a run."""

  # Names and layout of the final model: "internvl" (the reference's) or "hf" (transformers' own class).
  export_layout: Literal["internvl", "hf"] = "internvl"
  # Number format of the final model; "auto" is bfloat16 under bf16=True, else float32.
  export_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
  # Where training.optim_args keeps an average of the weights, it is scored and exported; False: the last weights are.
  export_average: bool = True
  # A checkpoint in the internvl layout whose Python files come along; None: those of the model's own checkpoint. One
  # of the hf layout has none, and programs that open the internvl layout do so by its code.
  code: str | None = None


@dataclasses.dataclass(kw_only=True, slots=True)
class EvalConfig:
  """Scoring on held-out sets, by greedy answers or by the loss: at the end of a run, and during it by eval_strategy."""

  # A jsonl of questions in the training format; its last answer is what is scored. Or sets by their names, as JSON or in
  # a JSON file: {"vqa": {"annotation": "vqa.jsonl", "root": "images", "metrics": ["vqa_accuracy"]}}. None: no scoring.
  annotation: str | None = None
  # Metrics of sets that name none (docs/evaluation.md). With "loss" alone, nothing is generated.
  metrics: tuple[str, ...] = ("accuracy",)
  # Prefix of the image paths, of sets that name none.
  root: str = ""
  # Name of the line's field by which scores are also reported, of sets that name none; None: the total only.
  group_field: str | None = None
  # Questions answered at once.
  batch_size: int = 64
  # Longest answer in tokens.
  max_new_tokens: int = 64
  # Score the first so many questions only; None: all.
  limit: int | None = None
  # Write so many questions, drawn by training.seed, with pictures and answers at every evaluation; -1: all.
  show: int = 0
  # Which tiles an InternVL3.5-Flash gives a quarter of the tokens when it answers: "auto" by the thresholds of its
  # config.json, "all", "none", or the relative and the absolute threshold, "0.3,0.5".
  compress: str = "auto"


@dataclasses.dataclass(kw_only=True, slots=True)
class RuntimeConfig:
  """How the numbers are computed."""

  # Attention backend: "xla", "cpu" (blocks for CPUs' caches), "splash" (kernels for TPUs), "triton" (kernels for NVIDIA
  # cards), or "auto", which is the one made for the platform.
  attention: str = "auto"
  # The same for the grouped matmul of experts: "xla", "megablox" (TPUs), "triton" (NVIDIA cards), or "auto".
  experts: str = "auto"
  # What the backward pass recomputes under grad_checkpoint: "full" keeps layer inputs only, "dots" also
  # keeps the results of products with weights (not those of experts).
  remat_policy: Literal["full", "dots"] = "full"
  # Products of the layers' linear maps in eight bits, for speed: "int8" (NVIDIA from Ampere on, TPU from v5e on) or
  # "fp8" (NVIDIA from Ada and Hopper on). Weights are stored as before. See docs/training.md for what it costs.
  quantize: Literal["none", "int8", "fp8"] = "none"
  # Layers in the body of the scans over layers. 0: one, and on CPUs all of a model of at most 12 that recomputes nothing.
  scan_unroll: int = 0
  # Draw the weights at random from model_name_or_path's config.json, in place of reading them.
  random_init: bool = False
  # Give tokens of the tokenizer that the embeddings have no row for a new row, the mean of the old ones, as the image
  # tokens get; else such a tokenizer is refused.
  grow_vocabulary: bool = False
  # Train with data.conv_style although the checkpoint was trained with another template.
  allow_other_template: bool = False
  # Weight of the load-balancing loss of a mixture of experts (Switch Transformer's); the reference adds none,
  # whatever the checkpoint's config.json says.
  router_aux_loss_coef: float = 0.0
  # How this process finds the run's others: "auto" asks the environment (TPU pod, JobSet, Slurm, MPI, torchrun's
  # or JAX's variables), "off" trains alone, "host:port,processes,process" says it.
  distributed: str = "auto"
  # A step whose loss or gradient is not finite changes nothing; so many in a row end the run. One comes of a bad
  # sample, many of a bad setting: what follows would be lost time.
  max_nonfinite_steps: int = 10
  # Tell where the run stands, with stacks, once a step, a save or a wait lasts this long, and every such time
  # again. Above what compiling the largest models takes, so that it means something.
  hang_seconds: int = 600
  # Write output_dir/report.html, the run on a page, at its end; `python -m internvl_jax.report` writes it at any time.
  report: bool = True
  # Words by which trackers find the run.
  tags: tuple[str, ...] = ()
  # Print a table of where the time from the command to the first step went; a line of it is always logged.
  timings: bool = False
  # Steps whose first and last bound an XProf trace in output_dir/profile; empty: none.
  profile_steps: tuple[int, ...] = ()
  # Options of XLA, "xla_…=value" each, that go before what the program sets for the platform and before XLA_FLAGS.
  xla_options: tuple[str, ...] = ()
  # Folder of compiled programs, reused by later runs, also one of a bucket (gs://, s3://); "auto": what
  # JAX_COMPILATION_CACHE_DIR names, or a folder in the user's cache folder; None: compile anew.
  compilation_cache_dir: str | None = "auto"
