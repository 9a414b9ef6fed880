"""Where batches are placed: rows and pools of tiles over the data-parallel devices, as their kinds declare it.

Letters as in `internvl_jax.batch`.
"""

import functools
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from internvl_jax.batch import Axes, fields_of
from internvl_jax.parallel.mesh import data_axes, data_parts
from internvl_jax.parallel.rules import SHARING, device_count

_OVER_DATA = ("R", "D")
"""Axes of a batch's fields that are sharded over the data-parallel devices: rows, and pools of tiles."""


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
  """The sharding of each field of a batch of arrays or shapes, as its kind declares them: over the data axes.

  The tiles of a pool are sharded over the devices that share it, too, where these take as many each: the pixels of a
  long row are the largest thing in a batch.
  """
  fields = {
    name: _field_sharding(getattr(batch, name), declared, mesh)
    if isinstance(declared, Axes)
    else batch_shardings(getattr(batch, name), mesh)
    for name, declared in fields_of(type(batch)).items()
  }
  return type(batch)(**fields)


def _field_sharding(field: Any, axes: Axes, mesh: Mesh) -> NamedSharding:
  entries: list[Any] = [None] * len(axes.names)
  for i, (name, size) in enumerate(zip(axes.names, field.shape, strict=True)):
    if name in _OVER_DATA:
      entries[i] = data_axes(mesh)
    elif name == "T" and size > 0 and size % device_count(SHARING, mesh) == 0:
      entries[i] = SHARING
  while entries[-1:] == [None]:
    entries.pop()
  return NamedSharding(mesh, PartitionSpec(*entries))


def place_batch(batch: Any, mesh: Mesh) -> Any:
  """Numpy arrays, of each field the part of the rows and pools that this process feeds, on its devices."""
  parts = _num_parts(mesh)

  def place(leaf: Any, sharding: NamedSharding):
    A, fed, *rest = leaf.shape
    return jax.make_array_from_process_local_data(sharding, leaf, (A, parts * fed, *rest))

  return jax.tree.map(place, batch, batch_shardings(batch, mesh))


def abstract_placed(batch: Any, mesh: Mesh) -> Any:
  """The shapes and shardings of what `place_batch` makes of a batch, from the shapes of this process's part."""
  parts = _num_parts(mesh)

  def placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    A, fed, *rest = leaf.shape
    return jax.ShapeDtypeStruct((A, parts * fed, *rest), leaf.dtype, sharding=sharding)

  return jax.tree.map(placed, batch, batch_shardings(batch, mesh))


@functools.cache
def _num_parts(mesh: Mesh) -> int:
  """How many parts processes feed: see `data_parts`."""
  return 1 + max(data_parts(mesh))
