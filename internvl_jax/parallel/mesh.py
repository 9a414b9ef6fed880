"""The device mesh.

Axes, outermost first: `data` and `fsdp` split the batch (fsdp also splits weights and optimizer state),
`expert`, `sequence` and `tensor` split the model. Their devices share rows: a row's tokens, and a pool's tiles, are
sharded over all three (`parallel.rules`).

Where the widths of a model do not divide by `fsdp`, its devices are on two axes, `fsdp_outer` and `fsdp`: a weight
may take them apart, one for each of its own axes, or only one of them.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh

from internvl_jax.arguments import MeshConfig
from internvl_jax.errors import UserError

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
FSDP_OUTER = "fsdp_outer"
"""The axis before `fsdp` that `cut_fsdp` makes of a part of it; most meshes have none."""
DATA_AXES = ("data", FSDP_OUTER, "fsdp")
"""Axes that split the batch."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None, *, zero_stage: int = 0) -> Mesh:
  """Arranges the devices as the config says.

  Under ZeRO stage 3 the devices of `data` are devices of `fsdp`: both split the batch, and what stage 3 adds is
  what `fsdp` does.

  Raises:
    UserError: the axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = [getattr(config, axis) for axis in AXES]
  known = math.prod(size for size in sizes if size != -1)
  asked = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
  if len(devices) % known or (-1 not in sizes and known != len(devices)):
    needed = f"a multiple of {known}" if -1 in sizes else f"{known}"
    raise UserError(
      f"mesh ({asked}) needs {needed} devices, but there are {len(devices)}; {_mesh_remedy(config, len(devices), known)}"
    )
  shape = dict(zip(AXES, (len(devices) // known if size == -1 else size for size in sizes), strict=True))
  if zero_stage == 3:
    shape |= {"data": 1, "fsdp": shape["data"] * shape["fsdp"]}
  return Mesh(_arrange(devices, list(shape.values())), AXES)


def cut_fsdp(mesh: Mesh, outer: int) -> Mesh:
  """The same devices in the same order, those of `fsdp` in so many groups: the axis `fsdp_outer` counts the groups."""
  at = mesh.axis_names.index("fsdp")
  shape = [*mesh.axis_sizes]
  shape[at : at + 1] = outer, shape[at] // outer
  names = (*mesh.axis_names[:at], FSDP_OUTER, *mesh.axis_names[at:])
  return Mesh(mesh.devices.reshape(shape), names)


def data_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
  """Those of `DATA_AXES` that the mesh has."""
  return tuple(axis for axis in DATA_AXES if axis in mesh.shape)


def _mesh_remedy(config: MeshConfig, devices: int, known: int) -> str:
  """What to change where the axes do not multiply to the number of devices."""
  fixed = {axis: size for axis in AXES if (size := getattr(config, axis)) not in (-1, 1)}
  if devices % known == 0:  # Devices are left over, and no axis takes them.
    return "set mesh.data=-1, which takes the rest"
  names = " * ".join(f"mesh.{axis}" for axis in fixed)
  return f"choose {names} so that it divides {devices}, or use other devices"


def _arrange(devices: list[Any], sizes: list[int]) -> np.ndarray:
  """Lays devices out so that neighbors on an inner axis are neighbors in the machine.

  Several slices (of TPUs; of GPUs, hosts) are joined by the slow network, which only the axes that split the batch
  cross: `data` as far as it goes, then `fsdp`.
  """
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices == 1:
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  outer, left = [1] * len(sizes), slices
  for i, axis in enumerate(AXES):
    if axis in DATA_AXES:
      outer[i] = math.gcd(sizes[i], left)
      left //= outer[i]
  if left > 1:
    raise UserError(
      f"the mesh has data={sizes[0]} and fsdp={sizes[1]}, whose product must be a multiple of the {slices} slices (or "
      "hosts) that the slow network joins; lower mesh.expert, mesh.sequence or mesh.tensor"
    )
  inner = [size // n for size, n in zip(sizes, outer, strict=True)]
  return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


def check_lengths(lengths: Sequence[int], mesh: Mesh) -> None:
  """Refuses rows that the devices which share them cannot split evenly: each would compute all of them.

  Raises:
    UserError: a length does not divide.
  """
  sizes = {axis: mesh.shape[axis] for axis in AXES if axis not in DATA_AXES}
  devices = math.prod(sizes.values())
  odd = [length for length in lengths if length % devices]
  if odd:
    axes = " x ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size > 1)
    raise UserError(
      f"rows of {', '.join(map(str, odd))} tokens do not divide by {axes} = {devices} devices; make "
      f"loader.sequence_buckets multiples of {devices}"
    )


def data_parallel_size(mesh: Mesh) -> int:
  """Number of devices over which the batch is split: the shards that rows and tile pools are assigned to."""
  return math.prod(mesh.shape[axis] for axis in data_axes(mesh))


def data_parts(mesh: Mesh) -> list[int]:
  """Which part of every batch each process feeds to its devices, counted from 0.

  Processes whose devices hold other parts of the model for the same rows feed the same part.

  Raises:
    UserError: the mesh cuts a host's devices in a way that leaves no equal parts.
  """
  held: dict[int, set[int]] = {}
  for shard, devices in enumerate(mesh.devices.reshape(data_parallel_size(mesh), -1)):
    for device in devices:
      held.setdefault(device.process_index, set()).add(shard)
  shards = {process: tuple(sorted(found)) for process, found in held.items()}
  parts = sorted(set(shards.values()))
  together = [shard for part in parts for shard in part]
  if len({len(part) for part in parts}) > 1 or len(together) != len(set(together)):
    raise UserError(
      f"the mesh {dict(mesh.shape)} spreads the rows unevenly over the hosts; let mesh.tensor * mesh.sequence * "
      "mesh.expert divide the devices of a host, or be a multiple of them"
    )
  return [parts.index(shards[process]) for process in sorted(shards)]
