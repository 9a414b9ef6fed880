"""What the recipes of InternVL's published launch scripts share: the argument, the batch, the common settings.

Each of the 117 scripts (OpenGVLab/InternVL, shell/) is one recipe and its argument, and sets what the script sets,
under the script's names and with its relative paths; tests/test_recipes.py compares them all. In every recipe,

- `training.output_dir` is the script's, or where the script of the next stage looks.
- Weights, gradients and optimizer state are spread over all devices (`mesh.fsdp=-1`), whichever ZeRO file the
  script names: the numbers are the same, and memory is least. For the script's own sharding, give your file and the
  axis it acts on: --config.training.deepspeed=FILE.json --config.mesh.data=-1 --config.mesh.fsdp=1.
- Where the script's rows do not fit on a card of 80 GB (docs/scale.md), two cards share them (`mesh.sequence=2`) and
  take twice as many micro-batches: the rows of a step, and those that are averaged together, are the script's.
- `training.overwrite_output_dir` stays False, where most scripts say True: with it, the restart of a run that was
  interrupted would delete its checkpoints and begin again.

The argument is `size[,variant]`, and then, if wanted, the script's environment variables under these names:

  devices=N      GPUS: the devices. A run on another number is refused.
  batch=N        BATCH_SIZE: rows of an optimizer step, over all devices.
  per_device=N   PER_DEVICE_BATCH_SIZE: rows that a device, or the two that share them, take at once.

Steps of gradient accumulation follow from the three: batch / per_device / devices, twice that where two share. Without `devices`, they are those
for the script's number of devices, and the batch grows and shrinks with the devices that there are.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from internvl_jax.config import FIELDS, TrainConfig
from internvl_jax.errors import UserError, suggest

Arguments = Mapping[str, Any]
"""Values by the scripts' names: {"freeze_llm": True}."""

_LEAF_OF = {
  path.split(".")[1]: path.split(".")[0]
  for path in FIELDS
  if path.split(".")[0] in ("model", "data", "training", "preference")
}

# --- Settings -----------------------------------------------------------------------------------------------

ALL: Arguments = {
  "bf16": True,
  "do_train": True,
  "dynamic_image_size": True,
  "logging_steps": 1,
  "lr_scheduler_type": "cosine",
  "report_to": "tensorboard",
  "use_thumbnail": True,
  "weight_decay": 0.05,
}
"""What (nearly) all scripts set."""

PACKED: Arguments = {
  "loss_reduction": "square",
  "max_packed_tokens": 16384,
  "num_images_expected": 48,
  "remove_unused_columns": False,
  "strict_mode": False,
  "use_packed_ds": True,
}
"""Rows of 16384 tokens and 48 tiles, filled with whole samples."""

FINETUNE: Arguments = {
  "dataloader_num_workers": 4,
  "freeze_backbone": True,
  "group_by_length": True,
  "meta_path": "./shell/data/internvl_1_2_finetune_custom.json",
  "num_train_epochs": 1,
  "save_steps": 200,
  "save_total_limit": 1,
  "warmup_ratio": 0.03,
}
"""Fine-tuning a released model on one's own data: language model and projector train."""

LORA: Arguments = {"drop_path_rate": 0.0, "freeze_llm": True, "freeze_mlp": True, "use_llm_lora": 16}
"""The same with adapters of the language model alone."""

LORA_COCO: Arguments = {**LORA, "meta_path": "./shell/data/coco_caption.json", "use_llm_lora": 128}
"""Adapters for captions of COCO, the example of InternVL's documentation."""

MPO: Arguments = {
  "loss_type": "sigmoid,bco_pair",
  "sigmoid_loss_weight": 0.8,
  "bco_pair_loss_weight": 0.2,
  "rpo_alpha": 1.0,
}
"""The loss of mixed preference optimisation (arXiv:2411.10442): preference, quality and generation."""


# --- The batch ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
  """A script's GPUS, BATCH_SIZE and PER_DEVICE_BATCH_SIZE, and how many devices share the rows of one."""

  devices: int
  batch: int
  per_device: int = 1
  sharing: int = 1

  @property
  def shards(self) -> int:
    """Devices, or groups that share rows, which split the batch.

    Raises:
      UserError: the devices do not divide.
    """
    if self.devices % self.sharing:
      raise UserError(
        f"devices={self.devices} does not divide by the {self.sharing} that share rows; add another devices"
      )
    return self.devices // self.sharing

  @property
  def accumulation(self) -> int:
    """Micro-batches of an optimizer step.

    Raises:
      UserError: the batch does not divide.
    """
    rows = self.per_device * self.shards
    if self.batch % rows:
      shared = f" by {self.sharing}" if self.sharing > 1 else ""
      raise UserError(
        f"batch={self.batch} does not divide by per_device={self.per_device} times devices={self.devices}{shared}, {rows}; "
        f"add batch={-(-self.batch // rows) * rows} to the recipe's argument, or another per_device or devices"
      )
    return self.batch // rows


_SIZES = tuple(field.name for field in dataclasses.fields(Launch) if field.name != "sharing")


# --- The argument -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
  """What a recipe's argument says."""

  size: str
  variant: str = ""
  launch: Mapping[str, int] = dataclasses.field(default_factory=dict)


def choose(arg: str, choices: Iterable[str], default: str) -> Choice:
  """Reads a recipe's argument.

  Args:
    arg: `size[,variant][,devices=N][,batch=N][,per_device=N]`.
    choices: what the recipe has, as "size" or "size,variant".
    default: the one to take where none is named.

  Raises:
    UserError: there is no such choice, or a number is none.
  """
  words = [word.strip() for word in arg.split(",") if word.strip()]
  name = ",".join(word for word in words if "=" not in word) or default
  known = list(choices)
  if name not in known:
    raise UserError(f"the recipe has no {name!r}{suggest(name, known)}; it has {'  '.join(known)}")
  size, _, variant = name.partition(",")
  return Choice(size, variant, dict(_number(word) for word in words if "=" in word))


def _number(word: str) -> tuple[str, int]:
  name, _, value = word.partition("=")
  if name not in _SIZES:
    raise UserError(
      f"the recipe's argument has no {name!r}{suggest(name, _SIZES)}; it has {', '.join(_SIZES)}"
    )
  if not value.isdecimal() or int(value) < 1:
    raise UserError(f"{word}: {name} must be a number, at least 1")
  return name, int(value)


# --- The configuration --------------------------------------------------------------------------------------


def build(choice: Choice, launch: Launch, *deltas: Arguments) -> TrainConfig:
  """The configuration of a launch with `ALL` and the deltas, of which later ones count."""
  launch = dataclasses.replace(launch, **choice.launch)
  config = TrainConfig()
  config.mesh.data, config.mesh.fsdp = 1, launch.shards if "devices" in choice.launch else -1
  config.mesh.sequence = launch.sharing
  config.training.per_device_train_batch_size = launch.per_device
  config.training.gradient_accumulation_steps = launch.accumulation
  for delta in (ALL, *deltas):
    for name, value in delta.items():
      setattr(getattr(config, _LEAF_OF[name]), name, value)
  return config


@dataclasses.dataclass(frozen=True, slots=True)
class Finetuning:
  """How a size is fine-tuned, as a whole and by adapters."""

  model: str
  arguments: Arguments
  per_device: int = 4
  devices: int = 8
  lora_devices: int = 2
  sharing: int = 1

  def launch(self, variant: str) -> Launch:
    """What the scripts run on."""
    if variant == "lora_coco":
      return Launch(batch=512, per_device=self.per_device, devices=8)
    if variant == "lora":
      return Launch(batch=16, per_device=self.per_device, devices=self.lora_devices)
    return Launch(batch=128, per_device=self.per_device, devices=self.devices, sharing=self.sharing)


def finetune(choice: Choice, size: Finetuning, script: str, generation: Arguments) -> TrainConfig:
  """The fine-tuning of a size: in full or, by the variant, LoRA.

  Args:
    choice: the recipe's argument.
    size: the size that it names.
    script: folder and name of the script, without what tells LoRA from full.
    generation: what all sizes of the generation set.
  """
  variants: Mapping[str, Arguments] = {"": {}, "lora": LORA, "lora_coco": LORA_COCO}
  names = {
    "model_name_or_path": size.model,
    "output_dir": f"work_dirs/{script}_2nd_finetune_{choice.variant or 'full'}",
  }
  return build(
    choice,
    size.launch(choice.variant),
    FINETUNE,
    generation,
    size.arguments,
    variants[choice.variant],
    names,
  )
