"""Which values the fields of a configuration take, as tables: strings, ranges of numbers, and what is said of others."""

import dataclasses
import math

from internvl_jax.arguments import MOST_TILES

REFUSED: dict[str, str] = {
  "training.fp16": "float16 would need loss scaling; use training.bf16=True, which does not",
}
"""Field -> why it can never leave its default."""

ACCEPTED: dict[str, str] = {
  "model.use_fast_tokenizer": "the tokenizers library is always used",
  "model.use_liger": "the loss is fused with the output embedding either way, and its numbers are the same",
  "training.do_train": "training is what the command does, whatever it says",
  "training.remove_unused_columns": "batches hold only what the model reads",
}
"""Field -> why all of its values mean the same; existing scripts set them."""

CHOICES: dict[str, tuple[str, ...]] = {
  "data.loss_reduction": ("token", "sample", "square"),
  "training.lr_scheduler_type": (
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "inverse_sqrt",
  ),
  "training.logging_strategy": ("no", "steps", "epoch"),
  "training.save_strategy": ("no", "steps", "epoch"),
  "training.evaluation_strategy": ("no", "steps", "epoch"),
  "training.eval_strategy": ("no", "steps", "epoch"),
  "runtime.attention": ("auto", "cpu", "xla", "splash", "triton"),
  "runtime.experts": ("auto", "xla", "megablox", "triton"),
}
"""Field -> the strings it takes (fields typed `Literal` say so themselves)."""

INSTEAD_OF: dict[str, dict[str, str]] = {
  "training.optim": {
    r".*8bit.*|.*4bit.*": (
      "of these, adamw_8bit has moments of eight bits; mesh.fsdp (or training.deepspeed) shards those of all over the devices"
    ),
    r"paged_.*": "nothing is moved to the host's memory; mesh.fsdp shards the moments over the devices",
  },
  "training.save_strategy": {
    r"best": "save_strategy='steps' or 'epoch' with load_best_model_at_end=True keeps the best"
  },
}
"""Field -> what to say of values that Hugging Face's Trainer takes and this program does not, by what they look like."""


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
  """The values a number may take: from `low` to `high`, or one of `also`; `whole_from_1`: a share, or a whole number."""

  low: float = -math.inf
  high: float = math.inf
  low_is_in: bool = True
  high_is_in: bool = True
  also: tuple[int, ...] = ()
  whole_from_1: bool = False

  def holds(self, value: float) -> bool:
    """Whether `value` is inside; NaN and infinities never are."""
    if value in self.also:
      return True
    above = value >= self.low if self.low_is_in else value > self.low
    below = value <= self.high if self.high_is_in else value < self.high
    whole = not self.whole_from_1 or value < 1 or value == int(value)
    return math.isfinite(value) and above and below and whole

  def __str__(self) -> str:
    """The range in words, to follow "must be"."""
    words = [str(value) for value in self.also]
    bounds = []
    if math.isfinite(self.low):
      bounds.append(f"{'at least' if self.low_is_in else 'above'} {self.low:g}")
    if math.isfinite(self.high):
      bounds.append(f"{'at most' if self.high_is_in else 'below'} {self.high:g}")
    if self.whole_from_1:
      return "a number of steps, or a share of all steps between 0 and 1"
    return " or ".join([*words, " and ".join(bounds) or "finite"])


_ANY = Range()
_POSITIVE = Range(low=1)
NOT_NEGATIVE = Range(low=0)
ABOVE_0 = Range(low=0, low_is_in=False)
_SHARE = Range(low=0, high=1)
_BELOW_1 = Range(low=0, high=1, high_is_in=False)
_INTERVAL = Range(low=0, low_is_in=False, whole_from_1=True)
_AXIS = Range(low=1, also=(-1,))
# Seeds reach numpy as unsigned 32-bit integers.
_SEED = Range(low=0, high=2**32 - 1)

RANGES: dict[str, Range] = {
  # The ViT's depth bounds these two, and only the checkpoint knows it.
  "model.unfreeze_vit_layers": _ANY,
  "model.vision_select_layer": _ANY,
  "model.use_backbone_lora": NOT_NEGATIVE,
  "model.use_llm_lora": NOT_NEGATIVE,
  "model.drop_path_rate": _BELOW_1,
  "data.max_seq_length": _POSITIVE,
  # That patches divide it is checked where the patch size is known.
  "data.force_image_size": _POSITIVE,
  "data.down_sample_ratio": Range(low=0, high=1, low_is_in=False),
  "data.min_dynamic_patch": _POSITIVE,
  "data.max_dynamic_patch": Range(low=1, high=MOST_TILES),
  "data.min_num_frame": _POSITIVE,
  "data.max_num_frame": _POSITIVE,
  "data.num_images_expected": _POSITIVE,
  "data.max_packed_tokens": _POSITIVE,
  "data.max_buffer_size": _POSITIVE,
  "data.log_freq": _POSITIVE,
  "training.per_device_train_batch_size": _POSITIVE,
  "training.gradient_accumulation_steps": _POSITIVE,
  "training.num_train_epochs": ABOVE_0,
  "training.max_steps": _AXIS,
  "training.learning_rate": NOT_NEGATIVE,
  "training.vision_lr": NOT_NEGATIVE,
  "training.projector_lr": NOT_NEGATIVE,
  "training.language_lr": NOT_NEGATIVE,
  "training.adapters_lr": NOT_NEGATIVE,
  "training.layer_lr_decay": Range(low=0, high=1, low_is_in=False),
  "training.weight_decay": NOT_NEGATIVE,
  "training.l2_to_start": NOT_NEGATIVE,
  "training.adam_beta1": _BELOW_1,
  "training.adam_beta2": _BELOW_1,
  "training.adam_epsilon": ABOVE_0,
  "training.max_grad_norm": NOT_NEGATIVE,
  "training.warmup_ratio": _SHARE,
  "training.warmup_steps": NOT_NEGATIVE,
  "training.logging_steps": _INTERVAL,
  "training.save_steps": _INTERVAL,
  "training.save_total_limit": _POSITIVE,
  "training.eval_steps": _INTERVAL,
  "training.seed": _SEED,
  "training.data_seed": _SEED,
  "training.dataloader_num_workers": NOT_NEGATIVE,
  "mesh.data": _AXIS,
  "mesh.fsdp": _AXIS,
  "mesh.expert": _AXIS,
  "mesh.sequence": _AXIS,
  "mesh.tensor": _AXIS,
  "lora.alpha": ABOVE_0,
  "lora.dropout": _BELOW_1,
  "loader.max_bad_fraction": _SHARE,
  "loader.max_untaught_fraction": _SHARE,
  "loader.sequence_buckets": _POSITIVE,
  # A pool without tiles is what a batch of text needs.
  "loader.tile_buckets": NOT_NEGATIVE,
  "loader.balance_steps": NOT_NEGATIVE,
  "loader.balance_costs": NOT_NEGATIVE,
  "loader.prefetch": _POSITIVE,
  "eval.batch_size": _POSITIVE,
  "eval.max_new_tokens": _POSITIVE,
  "eval.limit": _POSITIVE,
  "eval.show": Range(low=-1),
  "runtime.router_aux_loss_coef": NOT_NEGATIVE,
  "runtime.scan_unroll": NOT_NEGATIVE,
  "runtime.profile_steps": _POSITIVE,
  "runtime.max_nonfinite_steps": _POSITIVE,
  "runtime.hang_seconds": _POSITIVE,
}
"""The range of every numeric field (of each entry, for a tuple); None, where a field allows it, is in range.

Tasks say those of their own fields: `tasks.settings.ranges` has them all.
"""
