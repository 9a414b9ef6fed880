"""The device mesh.

Axes, outermost first: `data` and `fsdp` split the batch (fsdp also splits weights and optimizer state),
`expert`, `sequence` and `tensor` split the model.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from internvl_jax.arguments import MeshConfig
from internvl_jax.errors import UserError

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
DATA_AXES = ("data", "fsdp")
"""Axes that split the batch."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """Arranges the devices as the config says.

  Raises:
    UserError: the axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = [getattr(config, axis) for axis in AXES]
  known = math.prod(size for size in sizes if size != -1)
  asked = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
  if len(devices) % known or (-1 not in sizes and known != len(devices)):
    raise UserError(
      f"mesh ({asked}) needs a multiple of {known} devices, but there are {len(devices)}; set mesh.data=-1"
    )
  sizes = [len(devices) // known if size == -1 else size for size in sizes]
  return Mesh(np.array(devices).reshape(sizes), AXES)


def data_parallel_size(mesh: Mesh) -> int:
  """Number of devices over which the batch is split: the shards that rows and tile pools are dealt to."""
  return math.prod(mesh.shape[axis] for axis in DATA_AXES)
