"""Where arrays live: logical axis names of weights, and the axes of a batch, mapped to the mesh."""

import math
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from internvl_jax.batch import SFTBatch
from internvl_jax.parallel.mesh import DATA_AXES

RULES: dict[str, str | None] = {
  "layers": None,
  "expert": "expert",
  "vocab": "tensor",
  "embed": "fsdp",
  "mlp": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "patch": "fsdp",
}
"""Mesh axis of each logical axis of a weight; None keeps it whole."""


def weight_shardings(
  axes: Mapping[str, tuple[str | None, ...]], shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh
) -> dict[str, NamedSharding]:
  """The sharding of every parameter; an axis that the mesh axis does not divide stays whole."""

  def spec(path: str) -> PartitionSpec:
    used: set[str] = set()
    entries = []
    for name, size in zip(axes[path], shapes[path].shape, strict=True):
      axis = RULES[name] if name is not None else None
      fits = axis is not None and axis not in used and size % mesh.shape[axis] == 0
      entries.append(axis if fits else None)
      used.update([axis] if fits and axis else [])
    return PartitionSpec(*entries)

  return {path: NamedSharding(mesh, spec(path)) for path in shapes}


def batch_shardings(mesh: Mesh) -> SFTBatch:
  """The sharding of each field of a batch [A, R, ...]: rows and tile pools over the data axes."""
  rows = NamedSharding(mesh, PartitionSpec(None, DATA_AXES))
  return SFTBatch(**dict.fromkeys(SFTBatch._fields, rows))


def replicated(mesh: Mesh) -> NamedSharding:
  """One whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def bytes_per_device(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> int:
  """Bytes of an array that one device holds."""
  return math.prod(sharding.shard_shape(shape.shape)) * shape.dtype.itemsize
