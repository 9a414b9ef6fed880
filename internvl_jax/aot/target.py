"""What to compile for: a slice of TPUs or NVIDIA's cards, both compile-only, or local devices."""

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from internvl_jax.aot import cuda
from internvl_jax.chips import GPUS, TPUS, Accelerator, Card, Chip
from internvl_jax.errors import UserError

_SHAPE = re.compile(r"\d+(x\d+)*")
_CPU = re.compile(r"cpu(?::(?P<devices>\d+))?")
_FORMS = "v5e:4x4 (or v4, v5p, v6e, v7x), h100:8 (or another card: hosts x cards, h100:2x8), cpu, cpu:8, gpu or local"

# libtpu asks the cloud's metadata server what machine it is on, and complains at length where there is none; and it
# lets one process at a time take the TPU, of which there is none to take.
_NO_TPU = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
  """Devices to compile for.

  Attributes:
    name: as asked for.
    devices: in the order that a mesh takes them.
    chip: what they can do; None where we have no data sheet.
    memory: bytes that a program may use on each; None where that is not known.
    shape: lengths of the slice's axes, or hosts and cards of each; empty for local devices.
  """

  name: str
  devices: Sequence[Any]
  chip: Accelerator | None = None
  memory: int | None = None
  shape: tuple[int, ...] = ()

  @property
  def platform(self) -> str:
    """The platform, as JAX calls it: "tpu", "cpu" or "gpu"."""
    return self.devices[0].platform

  @property
  def compile_only(self) -> bool:
    """Whether programs can only be compiled for the devices, which are not there."""
    return bool(self.shape)


def open_target(name: str) -> Target:
  """Finds the devices of that name; call it before anything else starts JAX's backends.

  Args:
    name: a slice ("v5e:4x4"), cards of a host ("h100:8") or of several ("h100:4x8": hosts x cards), "cpu", so many
      devices of a CPU ("cpu:8"), "gpu", or "local" for all local ones.

  Raises:
    UserError: no such devices, or no compiler for them.
  """
  if found := _CPU.fullmatch(name):
    return Target(name=name, devices=_cpus(name, int(found["devices"] or 0)))
  if name in ("gpu", "local"):
    return _at_hand(name)
  kind, _, shape = name.partition(":")
  chip = TPUS.get(kind) or GPUS.get(kind)
  if chip is None:
    raise UserError(f"--topology={name}: there is no such topology; {suggest(kind) or f'use {_FORMS}'}")
  if not _SHAPE.fullmatch(shape):
    raise UserError(f"--topology={name}: say how many; write {_example(chip)}")
  lengths = tuple(map(int, shape.split("x")))
  return _slice(name, chip, lengths) if isinstance(chip, Chip) else _cards(name, GPUS[kind], lengths)


def suggest(kind: str) -> str | None:
  """A "did you mean" of the kinds of chips and cards with a similar name."""
  names = [*TPUS, *GPUS]
  close = [name for name in names if kind and name.startswith(kind.lower())]
  close = close or difflib.get_close_matches(kind.lower(), names, n=3)
  return f"did you mean {' or '.join(close)}?" if close else None


def _example(chip: Accelerator) -> str:
  if isinstance(chip, Card):
    return f"{chip.name}:{chip.cards} for a host's cards, {chip.name}:2x{chip.cards} for hosts x cards"
  assert isinstance(chip, Chip)
  return f"{chip.name}:{chip.slices[1]}"


def _cpus(name: str, count: int) -> list[Any]:
  """So many devices that share this machine's CPU; 0 takes those that JAX was started with."""
  jax.config.update("jax_platforms", "cpu")
  try:
    if count:
      jax.config.update("jax_num_cpu_devices", count)
  except RuntimeError:
    pass  # The backend has started: it has the devices that it has.
  devices = jax.devices("cpu")
  if len(devices) < count:
    raise UserError(f"--topology={name}: JAX has started with {len(devices)} CPU devices")
  return devices[: count or None]


def _at_hand(name: str) -> Target:
  try:
    devices = jax.devices("gpu" if name == "gpu" else None)
  except RuntimeError as error:
    raise UserError(f"--topology={name}: {str(error).splitlines()[0]}; use {_FORMS}") from None
  stats = devices[0].memory_stats() or {}
  return Target(name=name, devices=devices, memory=stats.get("bytes_limit"))


def _slice(name: str, chip: Chip, shape: tuple[int, ...]) -> Target:
  if len(shape) != chip.dimensions:
    raise UserError(
      f"--topology={name}: links of {chip.name} have {chip.dimensions} dimensions; write {_example(chip)}"
    )
  check_compiler()
  os.environ.update({key: value for key, value in _NO_TPU.items() if key not in os.environ})
  jax.config.update("jax_platforms", "cpu")
  # What is compiled for a slice cannot be run here, and the cache would hide the compiler's own report.
  jax.config.update("jax_enable_compilation_cache", False)
  from jax.experimental import topologies

  known = name.replace(chip.name, chip.compiler_name or chip.name)
  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=known, **dict(chip.options)).devices
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f"--topology={name}: {str(error).splitlines()[0]}") from None
  assert len(devices) == chip.devices * math.prod(shape)
  return Target(name=name, devices=devices, chip=chip, memory=chip.hbm, shape=shape)


def _cards(name: str, card: Card, shape: tuple[int, ...]) -> Target:
  hosts, cards = shape if len(shape) == 2 else (1, *shape) if len(shape) == 1 else (0, 0)
  if not (hosts and 0 < cards <= card.cards):
    raise UserError(f"--topology={name}: a host has 1 to {card.cards} cards; write {_example(card)}")
  # As for a slice.
  jax.config.update("jax_enable_compilation_cache", False)
  return Target(
    name=name,
    devices=cuda.compile_only_devices(card, hosts, cards),
    chip=card,
    memory=card.usable,
    shape=(hosts, cards),
  )


def check_compiler() -> None:
  """Refuses where the compiler for TPUs is not installed.

  Raises:
    UserError: libtpu is missing.
  """
  try:
    import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
  except ImportError:
    raise UserError(
      "the compiler for TPUs is not installed: pip install 'internvl_jax[plan]' (or libtpu)"
    ) from None
