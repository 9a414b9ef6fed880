"""Where the parameters lie, for the log: one line each, and what stays whole although it is large."""

import math
from collections.abc import Mapping

import jax
from jax.sharding import NamedSharding

from internvl_jax.parallel.rules import StateShardings, bytes_per_device

LARGE = 16 * 2**20
"""Bytes from which on a parameter that no device shares is worth a warning."""


def placement_table(shapes: Mapping[str, jax.ShapeDtypeStruct], places: StateShardings) -> list[str]:
  """A line for each parameter: path, shape, dtype, MiB a device of itself and of its moments, axes of the mesh.

  Args:
    shapes: all parameters by path, as they are stored.
    places: where they lie; those with moments train.
  """
  lines = [f"{'parameter':<72}{'shape':>22} {'dtype':<9}{'MiB':>9}{'moments':>9}  spread over"]
  total = {"params": 0, "moments": 0}
  for path, leaf in shapes.items():
    own, moments = bytes_per_device(leaf, places.params[path]), _moment_bytes(path, leaf, places)
    total["params"] += own
    total["moments"] += moments
    shape = "x".join(map(str, leaf.shape))
    lines.append(
      f"{path:<72}{shape:>22} {leaf.dtype.name:<9}{own / 2**20:>9.2f}{moments / 2**20:>9.2f}  "
      f"{describe_spec(places.params[path])}"
    )
  sums = f"{total['params'] / 2**20:>9.2f}{total['moments'] / 2**20:>9.2f}"
  return [*lines, f"{'a device holds':<72}{'':>22} {'':<9}{sums}"]


def placement_warnings(shapes: Mapping[str, jax.ShapeDtypeStruct], places: StateShardings) -> list[str]:
  """A line for each large parameter that every device holds whole although the mesh could share it."""
  lines = []
  for path, leaf in shapes.items():
    size = math.prod(leaf.shape) * leaf.dtype.itemsize
    if size >= LARGE and places.can_share and places.params[path].is_fully_replicated:
      lines.append(
        f"{path} ({'x'.join(map(str, leaf.shape))}, {size / 2**20:,.0f} MiB) stays whole on every device: no axis of "
        "it divides by the mesh's; choose mesh sizes that are powers of two"
      )
  return lines


def describe_spec(sharding: NamedSharding) -> str:
  """The axes of the mesh that split each axis of an array, e.g. "-, fsdp+sequence, tensor"; "whole" without any."""
  entries = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in sharding.spec]
  return ", ".join("+".join(entry) or "-" for entry in entries) if any(entries) else "whole"


def _moment_bytes(path: str, leaf: jax.ShapeDtypeStruct, places: StateShardings) -> int:
  """Bytes of Adam's two moments on a device; 0 of what does not train."""
  return 2 * bytes_per_device(leaf, places.moments[path]) if path in places.moments else 0
