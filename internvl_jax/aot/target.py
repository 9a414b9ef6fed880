"""What to compile for: a slice of TPUs that is only described, or the devices at hand."""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from internvl_jax.aot.chips import TPUS, Chip
from internvl_jax.errors import UserError

_SLICE = re.compile(r"(?P<kind>\w+):(?P<shape>\d+(x\d+)*)")
_CPU = re.compile(r"cpu(?::(?P<devices>\d+))?")
_FORMS = "v5e:4x4 (or v4, v5p, v6e), cpu, cpu:8, gpu or local"

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
    shape: lengths of the slice's axes; empty for devices at hand.
  """

  name: str
  devices: Sequence[Any]
  chip: Chip | None = None
  memory: int | None = None
  shape: tuple[int, ...] = ()

  @property
  def platform(self) -> str:
    """The platform, as JAX calls it: "tpu", "cpu" or "gpu"."""
    return self.devices[0].platform

  @property
  def described(self) -> bool:
    """Whether the devices are only described, so that nothing can be put on them."""
    return bool(self.shape)


def open_target(name: str) -> Target:
  """Finds the devices of that name; call it before anything else starts JAX's backends.

  Args:
    name: a slice ("v5e:4x4"), "cpu", so many devices of a CPU ("cpu:8"), "gpu", or "local" for those at hand.

  Raises:
    UserError: no such devices, or no compiler for them.
  """
  if found := _SLICE.fullmatch(name):
    if found["kind"] in TPUS:
      return _slice(name, TPUS[found["kind"]], tuple(map(int, found["shape"].split("x"))))
  if found := _CPU.fullmatch(name):
    return Target(name=name, devices=_cpus(name, int(found["devices"] or 0)))
  if name in ("gpu", "local"):
    return _at_hand(name)
  raise UserError(f"--topology={name}: there is no such topology; use {_FORMS}")


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
    example = "x".join(["2"] * chip.dimensions)
    raise UserError(
      f"--topology={name}: links of {chip.name} have {chip.dimensions} dimensions; write {chip.name}:{example}"
    )
  check_compiler()
  os.environ.update({key: value for key, value in _NO_TPU.items() if key not in os.environ})
  jax.config.update("jax_platforms", "cpu")
  # What is compiled for a slice cannot be run here, and the cache would hide what the compiler says about it.
  jax.config.update("jax_enable_compilation_cache", False)
  from jax.experimental import topologies

  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **dict(chip.options)).devices
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f"--topology={name}: {str(error).splitlines()[0]}") from None
  assert len(devices) == math.prod(shape)
  return Target(name=name, devices=devices, chip=chip, memory=chip.hbm, shape=shape)


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
