"""Shardings of parameters while they are read: each host reads contiguous ranges of the files, and each of them once.

A file holds tensors row by row. Where devices hold parts of every row, or parts of what must be read whole, each host
would read all of it for each of them. So parameters are first read in another sharding, and the devices exchange what
others need.
"""

import math
from typing import Any

import jax

from internvl_jax.models.checkpoint_names import Transform


def reading_sharding(
  transform: Transform, lead: int, shape: tuple[int, ...], sharding: jax.sharding.Sharding, *, far: bool
) -> jax.sharding.Sharding:
  """The sharding in which a parameter is first read: `sharding` itself where that reads nothing twice.

  Args:
    transform: between the parameter and its tensors.
    lead: how many of its first axes run over layers and experts.
    shape: the parameter's.
    sharding: where it is wanted.
    far: whether files are fetched each time they are read. Those of a disk stay in its host's memory, so that
      what several devices of one host read is read once.
  """
  inner = len(shape) - lead
  if far and transform.part is None:
    return _by_layers(lead, shape, sharding)
  if transform.part is None or inner < 2 or not (far or _spans_hosts(sharding)):
    return sharding
  # Which of our axes is the tensor's first, and which its last.
  places: Any = transform.part(tuple(slice(axis) for axis in range(inner)))
  row, column = lead + places[0].stop, lead + places[-1].stop
  if sharding.shard_shape(shape)[column] == shape[column]:
    return sharding
  return _divided(sharding, row, shape)


def _by_layers(lead: int, shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
  """Whole tensors for each device, of some layers or some experts."""
  if sharding.shard_shape(shape)[lead:] == shape[lead:]:
    return sharding
  count = len(sharding.device_set)
  axis = max(range(lead), key=lambda axis: math.gcd(shape[axis], count), default=None)
  # Without a divisor, each device would hold all of it.
  return sharding if axis is None or math.gcd(shape[axis], count) == 1 else _divided(sharding, axis, shape)


def _divided(sharding: jax.sharding.Sharding, axis: int, shape: tuple[int, ...]) -> jax.sharding.Sharding:
  """As many parts along an axis as divide it and the devices evenly."""
  assert isinstance(sharding, jax.sharding.NamedSharding) and isinstance(sharding.mesh, jax.sharding.Mesh)
  devices = sharding.mesh.devices
  parts = math.gcd(shape[axis], devices.size)
  mesh = jax.sharding.Mesh(devices.reshape(parts, -1), ("rows", "copies"))
  return jax.sharding.NamedSharding(
    mesh, jax.P(*("rows" if place == axis else None for place in range(len(shape))))
  )


def _spans_hosts(sharding: jax.sharding.Sharding) -> bool:
  return not sharding.is_fully_addressable
