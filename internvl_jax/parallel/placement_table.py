"""Where the parameters lie, for the log: one line each, and what stays whole although it is large."""

import math
from collections.abc import Mapping

import jax
from jax.sharding import NamedSharding

from internvl_jax.parallel.rules import StateShardings, bytes_per_device

LARGE = 2**26
"""Bytes from which on a parameter that no device shares is worth a warning."""

GIB = 2**30


def placement_table(shapes: Mapping[str, jax.ShapeDtypeStruct], places: StateShardings) -> list[str]:
  """A line for each parameter: path, shape, dtype, MiB a device of itself and of its moments, axes of the mesh.

  Args:
    shapes: all parameters by path, as they are stored.
    places: where they lie; those with moments train.
  """
  lines = [f"{'parameter':<72}{'shape':>22} {'dtype':<9}{'MiB':>9}{'moments':>9}  sharded over"]
  total = {"params": 0, "moments": 0}
  for path, leaf in shapes.items():
    own, moments = bytes_per_device(leaf, places.params[path]), _moment_bytes(path, leaf, places)
    total["params"] += own
    total["moments"] += moments
    shape = "x".join(map(str, leaf.shape))
    lines.append(
      f"{path:<72}{shape:>22} {leaf.dtype.name:<9}{own / 2**20:>9.2f}{moments / 2**20:>9.2f}  "
      f"{spec_text(places.params[path])}"
    )
  sums = f"{total['params'] / 2**20:>9.2f}{total['moments'] / 2**20:>9.2f}"
  return [*lines, f"{'a device holds':<72}{'':>22} {'':<9}{sums}"]


def placement_warnings(shapes: Mapping[str, jax.ShapeDtypeStruct], places: StateShardings) -> list[str]:
  """A line on the large parameters that every device holds whole, one on those that too few share; none if all is well."""
  devices = places.mesh.size // places.mesh.shape["data"]
  pieces = {
    path: leaf.size // math.prod(places.params[path].shard_shape(leaf.shape))
    for path, leaf in shapes.items()
    if leaf.size * leaf.dtype.itemsize >= LARGE
  }
  whole = {path: shapes[path] for path, n in pieces.items() if n == 1 < devices}
  few = {path: shapes[path] for path, n in pieces.items() if 1 < n < devices}
  extra = sum(_held(path, leaf, places) * (1 - pieces[path] / devices) for path, leaf in few.items())
  lines = []
  if whole:
    held = sum(_held(path, leaf, places) for path, leaf in whole.items())
    lines.append(
      f"{_some(whole)} stay whole on every device and take {held / GIB:,.2f} GiB of each with their gradients and moments: "
      f"{_remedy(places)}"
    )
  if extra >= GIB:
    lines.append(
      f"{_some(few)} are in fewer than {devices} pieces and take {extra / GIB:,.2f} GiB of each device, with their "
      f"gradients and moments, that they would not in as many: {_remedy(places)}"
    )
  return lines


def _held(path: str, leaf: jax.ShapeDtypeStruct, places: StateShardings) -> int:
  """Bytes of a device for a parameter, its gradient and its moments."""
  gradient = bytes_per_device(leaf, places.gradients[path]) if path in places.gradients else 0
  return bytes_per_device(leaf, places.params[path]) + gradient + _moment_bytes(path, leaf, places)


def _some(found: Mapping[str, jax.ShapeDtypeStruct]) -> str:
  largest = max(found, key=lambda path: found[path].size)
  return f"{len(found)} large parameter(s) ({largest} is {'x'.join(map(str, found[largest].shape))})"


def _remedy(places: StateShardings) -> str:
  """Why, and what to do: widths are multiples of large powers of two, and rarely of other numbers."""
  sizes = {axis: size for axis, size in places.mesh.shape.items() if size > 1 and axis != "data"}
  mesh = " ".join(f"{axis}={size}" for axis, size in sizes.items())
  devices = places.mesh.size
  below = 2 ** (devices.bit_length() - 1)
  instead = "" if below == devices else f", on {below} or {2 * below} devices in place of {devices}"
  return f"their axes do not divide by the mesh ({mesh}); make mesh.fsdp a power of two{instead}"


def spec_text(sharding: NamedSharding) -> str:
  """The axes of the mesh that split each axis of an array, e.g. "-, fsdp+sequence, tensor"; "whole" without any."""
  entries = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in sharding.spec]
  return ", ".join("+".join(entry) or "-" for entry in entries) if any(entries) else "whole"


def _moment_bytes(path: str, leaf: jax.ShapeDtypeStruct, places: StateShardings) -> int:
  """Bytes of Adam's two moments on a device; 0 of what does not train."""
  return 2 * bytes_per_device(leaf, places.moments[path]) if path in places.moments else 0
