"""Helpers of the recipes for InternVL's published launch scripts: reading the argument, dividing the batch among devices.

Each of the 117 scripts (OpenGVLab/InternVL, shell/) is one recipe in `configs/` and its argument, and sets what the script
sets, under the script's names and with its relative paths; tests/test_recipes.py compares them all. In every recipe,

- `training.output_dir` is the script's, or where the script of the next stage looks.
- Weights, gradients and optimizer state are sharded over all devices (`mesh.fsdp=-1`), whichever ZeRO file the
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

Steps of gradient accumulation follow from the three: batch / per_device / devices, twice that where two share. Without
`devices`, they are those for the script's number of devices, and the batch grows and shrinks with the devices that there
are.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from internvl_jax.config import TrainConfig
from internvl_jax.errors import UserError, suggest

# --- The argument -------------------------------------------------------------------------------------------

_NUMBERS = ("devices", "batch", "per_device")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
  """A recipe's argument.

  Attributes:
    size: of the model: "8b".
    variant: what comes after it: "lora"; empty for none.
    launch: the numbers that it sets: {"devices": 4}.
  """

  size: str
  variant: str = ""
  launch: Mapping[str, int] = dataclasses.field(default_factory=dict)


def choose(arg: str, choices: Iterable[str], default: str) -> Choice:
  """Parses a recipe's argument.

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
  return Choice(size=size, variant=variant, launch=dict(_number(word) for word in words if "=" in word))


def _number(word: str) -> tuple[str, int]:
  name, _, value = word.partition("=")
  if name not in _NUMBERS:
    raise UserError(
      f"the recipe's argument has no {name!r}{suggest(name, _NUMBERS)}; it has {', '.join(_NUMBERS)}"
    )
  if not value.isdecimal() or int(value) < 1:
    raise UserError(f"{word}: {name} must be a number, at least 1")
  return name, int(value)


# --- The launch ---------------------------------------------------------------------------------------------


def published(
  choice: Choice, *, batch: int, devices: int, per_device: int = 1, sharing: int = 1
) -> TrainConfig:
  """The configuration that a published script's recipe starts from: its batch on its devices, a log of every step.

  The numbers of `choice` go before those given here.

  Args:
    choice: the recipe's argument.
    batch: BATCH_SIZE, rows of an optimizer step.
    devices: GPUS.
    per_device: PER_DEVICE_BATCH_SIZE.
    sharing: devices that share rows (`mesh.sequence`).

  Raises:
    UserError: the batch or the devices do not divide.
  """
  launch = {"batch": batch, "devices": devices, "per_device": per_device, **choice.launch}
  shards = _shards(launch["devices"], sharing)
  config = TrainConfig()
  config.mesh.data, config.mesh.fsdp = 1, shards if "devices" in choice.launch else -1
  config.mesh.sequence = sharing
  config.training.per_device_train_batch_size = launch["per_device"]
  config.training.gradient_accumulation_steps = _micro_batches(launch, shards, sharing)
  config.training.do_train = True
  config.training.logging_steps = 1
  config.training.report_to = "tensorboard"
  return config


def _shards(devices: int, sharing: int) -> int:
  """Devices, or groups of them that share rows, which split the batch."""
  if devices % sharing:
    raise UserError(
      f"devices={devices} does not divide by the {sharing} that share rows; add another devices"
    )
  return devices // sharing


def _micro_batches(launch: Mapping[str, int], shards: int, sharing: int) -> int:
  """Micro-batches of an optimizer step."""
  rows = launch["per_device"] * shards
  if launch["batch"] % rows:
    shared = f" by {sharing}" if sharing > 1 else ""
    raise UserError(
      f"batch={launch['batch']} does not divide by per_device={launch['per_device']} times "
      f"devices={launch['devices']}{shared}, {rows}; add batch={-(-launch['batch'] // rows) * rows} to the recipe's "
      "argument, or another per_device or devices"
    )
  return launch["batch"] // rows
