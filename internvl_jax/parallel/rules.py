"""Where arrays live: logical axis names of weights, activations and batches, mapped to the mesh.

Models name the axes of what they compute and know no mesh. `constrain` and `Product` turn names into the
compiler's sharding constraints under the mesh in scope (`scope`), and do nothing without one or on one device.

A row's tokens are sharded over `expert`, `sequence` and `tensor`, whose devices share the rows: what works on
each token apart (norms, residuals, the loss) is computed once. Between a projection that widens and the one
that narrows again, `tensor` splits the heads or the feed-forward instead. The tiles of a pool are sharded over
all axes, and what works on them all-gathers its weights.

Letters: R rows, S tokens, D data shards.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Num, Shaped

from internvl_jax.parallel.mesh import DATA_AXES, FSDP_OUTER

MeshAxes: TypeAlias = tuple[str, ...]
Names: TypeAlias = tuple[str | None, ...]

_FSDP = ("fsdp", FSDP_OUTER)

_SHARED = ("expert", "sequence")
"""Axes whose devices share rows, and that split no axis of a dense weight in use: they store it like `fsdp`."""

SHARING = (*_SHARED, "tensor")
"""All axes whose devices share rows and pools of tiles."""

WEIGHTS: dict[str, MeshAxes] = {
  "layers": (),
  "expert": ("expert",),
  "embed": (*_FSDP, *_SHARED),
  "patch": (*_FSDP, *_SHARED),
  # The token embeddings: their number is rarely a multiple of anything, so their width is split.
  "vocab": (),
  "table": (*_FSDP, *SHARING),
  # Split in use as well.
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "mlp": ("tensor",),
  # All-gathered before use: by the ViT, whose tiles are sharded over `tensor`, and where queries, keys and values
  # (gates and ups) stand one after the other, so that a piece of their axis is no set of heads.
  "vision": ("tensor",),
  "fused": ("tensor",),
}
"""Mesh axes over which each logical axis of a weight is stored, as far as they divide it."""

SPLIT_IN_USE = frozenset({"heads", "kv_heads", "mlp"})
"""Axes of weights that products are computed in pieces of; the others are all-gathered before."""

_FOR_FSDP = frozenset({"embed", "table"})
"""Axes of weights that `fsdp` should divide."""

_INSTEAD = frozenset({"heads", "kv_heads", "mlp", "vision", "fused"})
"""Axes of weights that take what of `fsdp` does not divide those."""

ACTIVATIONS: dict[str, MeshAxes] = {
  "tiles": (*DATA_AXES, *SHARING),
  "rows": DATA_AXES,
  "heads": ("tensor",),
  # Within attention, where tokens give up their axes to heads.
  "attention_heads": ("tensor", *_SHARED),
  # Within the loss.
  "vocab": ("tensor",),
  "tokens": SHARING,
}
"""Mesh axes of each logical axis of an activation; earlier entries choose first, later ones take what is left."""


# --- Activations --------------------------------------------------------------------------------------------


def scope(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
  """Lets `constrain` and its kin see the mesh while a function is traced."""
  return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _on_gpus() -> bool:
  """Whether the devices of the mesh in scope are GPUs."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device is not None and device.platform == "gpu"


def mesh_of(params: Mapping[str, jax.Array]) -> Mesh | None:
  """The mesh that parameters lie on; None for those of one device."""
  sharding = next(iter(params.values())).sharding
  return sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None


def mesh_in_scope() -> AbstractMesh | None:
  """The mesh to shard over; None without one, on one device, and where a function runs device by device."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def dividing_axes(
  axes: Iterable[str], size: int, mesh: Mesh | AbstractMesh, used: Iterable[str] = ()
) -> MeshAxes:
  """Those of the mesh's axes that, taken in order, divide an axis of that size, apart from the `used` ones."""
  taken, used = [], set(used)
  for axis in axes:
    devices = mesh.shape.get(axis, 1)
    if devices > 1 and axis not in used and size % devices == 0:
      taken.append(axis)
      size //= devices
  return tuple(taken)


def without(entry: MeshAxes, others: Iterable[str]) -> MeshAxes:
  """The axes of an entry that are not among the others."""
  return tuple(axis for axis in entry if axis not in others)


def spec(*entries: MeshAxes | None) -> PartitionSpec:
  """The spec of an array whose axes are sharded over these axes of the mesh; None or () stays whole."""
  return PartitionSpec(*(entry[0] if entry and len(entry) == 1 else entry or None for entry in entries))


def activation_spec(names: Names, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
  """How an activation with axes of these names is sharded."""
  assert {name for name in names if name} <= ACTIVATIONS.keys(), names
  entries: list[MeshAxes] = [()] * len(names)
  for name, axes in ACTIVATIONS.items():
    for i in (i for i, found in enumerate(names) if found == name):
      entries[i] = dividing_axes(axes, shape[i], mesh, used=(axis for entry in entries for axis in entry))
  return spec(*entries)


def constrain(x: Shaped[Array, "*axes"], *names: str | None) -> Shaped[Array, "*axes"]:
  """Shards x, whose axes have these names in `ACTIVATIONS`, over the mesh in scope; None stays whole."""
  mesh = mesh_in_scope()
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, activation_spec(names, x.shape, mesh))


def even_shares(tiles: int) -> int:
  """The size of a shard's pool of tiles, rounded up so that all devices that share it take as many."""
  mesh = mesh_in_scope()
  if mesh is None:
    return tiles
  devices = device_count(SHARING, mesh)
  return -(-tiles // devices) * devices


# --- Products with weights ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Product:
  """How `x @ w` of x [*leading, D] and w [D, F] is sharded over the mesh in scope.

  An axis that is split in use stays as it is stored, if that splits it into whole pieces (heads); all others
  are all-gathered in the compute dtype, right before the product, forward and backward. Gradients of w are
  summed straight into the pieces that are stored.

  Attributes:
    axes: the names of D and F in `WEIGHTS`.
    pieces: how many equal pieces the split axis consists of that must stay whole; None: any number.
    over: what stands along the two leading axes of x: rows of tokens, or tiles and their patches.
  """

  axes: tuple[str | None, str | None]
  pieces: int | None = None
  over: Literal["tokens", "tiles"] = "tokens"

  def stored(self, w: Num[Array, "D F"]) -> Num[Array, "D F"]:
    """The pieces of w that are stored."""
    mesh = mesh_in_scope()
    if mesh is None:
      return w
    return jax.lax.with_sharding_constraint(w, spec(*weight_entries(self.axes, w.shape, mesh)))

  def gradient(self, dw: Float[Array, "D F"]) -> Float[Array, "D F"]:
    """The gradient of w, summed over devices, in the pieces that are stored."""
    mesh = mesh_in_scope()
    if mesh is None:
      return dw
    # One axis of the mesh at first. Asked for pieces over several, XLA all-gathers both factors of the product
    # rather than scattering the sum; what is left to sum is smaller by the first axis.
    first = [_first(entry) for entry in weight_entries(self.axes, dw.shape, mesh)]
    return self.stored(jax.lax.with_sharding_constraint(dw, spec(*first)))

  def used(self, w: Num[Array, "D F"]) -> Num[Array, "D F"]:
    """The pieces of w that products are computed with."""
    mesh = mesh_in_scope()
    if mesh is None:
      return w
    # Held where it is stored until it has the compute dtype: pieces would else travel in float32.
    w, split = self.stored(w), self._split(w.shape, mesh)
    rows, columns = weight_entries(self.axes, w.shape, mesh)
    # Over the groups of `fsdp` first: between them, slow as it is, then only pieces of what a group holds travel.
    apart = FSDP_OUTER in columns
    if _on_gpus() and columns and not split[1]:
      pieces = w.reshape(w.shape[0], device_count(columns, mesh), -1).swapaxes(0, 1)
      pieces = jax.lax.with_sharding_constraint(pieces, spec(columns, rows))
      pieces = jax.lax.with_sharding_constraint(pieces, spec((), rows if apart else split[0]))
      w = _from_pieces(pieces, axis=1)
      return jax.lax.with_sharding_constraint(w, spec(*split)) if apart else w
    if apart:
      w = jax.lax.with_sharding_constraint(w, spec(rows, without(columns, (FSDP_OUTER,))))
    return jax.lax.with_sharding_constraint(w, spec(*split))

  def in_use(self, w: Num[Array, "D F"]) -> Num[Array, "D F"]:
    """The pieces of w that products are computed with, where it was made of what is all-gathered already."""
    mesh = mesh_in_scope()
    return w if mesh is None else jax.lax.with_sharding_constraint(w, spec(*self._split(w.shape, mesh)))

  def inputs(self, x: Num[Array, "*rows D"], w_shape: tuple[int, ...]) -> Num[Array, "*rows D"]:
    """Input x, or its gradient, as the product takes it."""
    mesh = mesh_in_scope()
    if mesh is None:
      return x
    split_in, split_out = self._split(w_shape, mesh)
    return self._shard(x, split_in, (*split_in, *split_out), mesh)

  def outputs(self, y: Num[Array, "*rows F"], w_shape: tuple[int, ...]) -> Num[Array, "*rows F"]:
    """Output y, or its gradient, as the product leaves it."""
    mesh = mesh_in_scope()
    if mesh is None:
      return y
    _, split_out = self._split(w_shape, mesh)
    return self._shard(y, split_out, split_out, mesh)

  def _split(self, shape: tuple[int, ...], mesh: AbstractMesh) -> list[MeshAxes]:
    """Mesh axes that split D and F in use."""
    # Devices that have other rows each need the whole axis.
    entries = [without(entry, DATA_AXES) for entry in weight_entries(self.axes, shape, mesh)]
    return [
      entry if self.over == "tokens" and name in SPLIT_IN_USE and self._whole(entry, size, mesh) else ()
      for name, entry, size in zip(self.axes, entries, shape, strict=True)
    ]

  def _whole(self, entry: MeshAxes, size: int, mesh: AbstractMesh) -> bool:
    return (size if self.pieces is None else self.pieces) % device_count(entry, mesh) == 0

  def _shard(self, x: jax.Array, last: MeshAxes, used: MeshAxes, mesh: AbstractMesh) -> jax.Array:
    leading: Names = ("rows", "tokens") if self.over == "tokens" else ("tiles", None)
    entries = [
      dividing_axes(ACTIVATIONS[name], size, mesh, used=used) if name else ()
      for name, size in zip(leading, x.shape[:2], strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, spec(*entries, last))


def _first(entry: MeshAxes) -> MeshAxes:
  """The axes of the mesh over which a gradient's axis is sharded at first; both halves of `fsdp` are as one."""
  if entry[:2] == (FSDP_OUTER, "fsdp"):
    return entry[:2]
  return without(entry, (FSDP_OUTER,))[:1]


def all_gather(x: Shaped[Array, "..."], names: MeshAxes, *, axis: int) -> Shaped[Array, "..."]:
  """`jax.lax.all_gather` of the pieces of an axis, where a function runs device by device."""
  if not _on_gpus() or axis == 0:
    return jax.lax.all_gather(x, names, axis=axis, tiled=True)
  return _from_pieces(jax.lax.all_gather(x, names), axis=axis)


def _from_pieces(pieces: jax.Array, *, axis: int) -> jax.Array:
  """The array whose axis was cut into pieces [n, ...], which were all-gathered one after the other.

  XLA for GPUs lays an array out so that the axis to be gathered is the outermost. Left to choose, it does so with all
  layers' weights before the loop over them: a copy of them all, in float32. Where pieces are that axis, it is the
  all-gathered weight of one layer that is laid out anew.
  """
  shape = [*pieces.shape[1:]]
  shape[axis] *= len(pieces)
  return jnp.moveaxis(pieces, 0, axis).reshape(shape)


# --- Weights ------------------------------------------------------------------------------------------------


def weight_shardings(
  axes: Mapping[str, Names], shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh
) -> dict[str, NamedSharding]:
  """The sharding of every parameter; what no axis of the mesh divides stays whole."""
  return {
    path: NamedSharding(mesh, spec(*weight_entries(axes[path], leaf.shape, mesh)))
    for path, leaf in shapes.items()
  }


def weight_entries(axes: Names, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> list[MeshAxes]:
  """Mesh axes over which each axis of a weight is stored."""
  # A vector is split only where what it is added to is: all-gathering it would cost more than it saves.
  is_vector = len([name for name in axes if name != "layers"]) < 2
  used: MeshAxes = ()
  entries = []
  for name, size in zip(axes, shape, strict=True):
    entry = (
      () if name is None or (is_vector and name not in SPLIT_IN_USE) else stored_over(name, size, mesh, used)
    )
    entries.append(entry)
    used += entry
  return entries if is_vector else _elsewhere(entries, axes, shape, mesh)


def stored_over(name: str, size: int, mesh: Mesh | AbstractMesh, used: Iterable[str] = ()) -> MeshAxes:
  """Mesh axes over which an axis of that name and size is stored, apart from the `used` ones."""
  taken = dividing_axes(WEIGHTS[name], size, mesh, used)
  # Pieces over both halves of `fsdp` lie as they would over the whole of it.
  return tuple(sorted(taken, key=lambda axis: axis != FSDP_OUTER))


def _elsewhere(
  entries: list[MeshAxes], axes: Names, shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> list[MeshAxes]:
  """Gives what of `fsdp` the weight's own axis for it has not taken to the first other one that it divides."""
  if not any(name in _FOR_FSDP for name in axes):
    return entries
  used = {axis for entry in entries for axis in entry}
  for i, (name, size) in enumerate(zip(axes, shape, strict=True)):
    if name in _INSTEAD and (
      more := dividing_axes(_FSDP, size // device_count(entries[i], mesh), mesh, used)
    ):
      entries[i] += tuple(sorted(more, key=lambda axis: axis != FSDP_OUTER))
      used |= set(more)
  return entries


def fsdp_groups(
  axes: Mapping[str, Names], shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh | AbstractMesh
) -> int:
  """In how many groups (`cut_fsdp`) the devices of `fsdp` hold least of the large weights, those of over 2^22 numbers.

  The fewest such groups: 1 where all of them divide.
  """
  large = {path: leaf.shape for path, leaf in shapes.items() if leaf.size > 2**22}

  def held(groups: int) -> int:
    sizes = {**mesh.shape, FSDP_OUTER: groups, "fsdp": mesh.shape["fsdp"] // groups}
    cut = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    return sum(
      math.prod(shape)
      // math.prod(device_count(entry, cut) for entry in weight_entries(axes[path], shape, cut))
      for path, shape in large.items()
    )

  size = mesh.shape["fsdp"]
  return min((n for n in range(1, size + 1) if size % n == 0), key=held)


def device_count(axes: MeshAxes, mesh: Mesh | AbstractMesh) -> int:
  """How many devices these axes of a mesh have together."""
  return math.prod(mesh.shape[axis] for axis in axes)


# --- The state ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class StateShardings:
  """The shardings of a run's state, by path.

  Attributes:
    mesh: the devices.
    params: all parameters.
    gradients, moments: the gradients and the optimizer's moments of those that train.
  """

  mesh: Mesh
  params: dict[str, NamedSharding]
  gradients: dict[str, NamedSharding]
  moments: dict[str, NamedSharding]


def state_shardings(
  axes: Mapping[str, Names],
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  trainable: Iterable[str],
  mesh: Mesh,
  *,
  zero_stage: int = 0,
) -> StateShardings:
  """Shardings of the state: parameters as `weight_shardings` says, the rest as ZeRO's stage says.

  Stage 1 shards the optimizer's moments over `data` as well, stage 2 also the gradients. Stage 3 also shards
  the parameters; that is what `fsdp` is, so that `make_mesh` makes `data` devices `fsdp` devices.
  """
  params = weight_shardings(axes, shapes, mesh)
  kept = {path: params[path] for path in shapes if path in set(trainable)}
  spread = {
    path: NamedSharding(mesh, spec(*_over_data(axes[path], shapes[path].shape, mesh))) for path in kept
  }
  return StateShardings(
    mesh, params, gradients=spread if zero_stage >= 2 else kept, moments=spread if zero_stage >= 1 else kept
  )


def _over_data(axes: Names, shape: tuple[int, ...], mesh: Mesh) -> list[MeshAxes]:
  """`weight_entries`, with `data` added to the first axis that it divides."""
  entries = weight_entries(axes, shape, mesh)
  for i, (name, size) in enumerate(zip(axes, shape, strict=True)):
    if name != "layers" and (more := dividing_axes(("data",), size // device_count(entries[i], mesh), mesh)):
      return [*entries[:i], (*entries[i], *more), *entries[i + 1 :]]
  return entries


def replicated(mesh: Mesh) -> NamedSharding:
  """One whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def bytes_per_device(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> int:
  """Bytes of an array that one device holds."""
  return math.prod(sharding.shard_shape(shape.shape)) * shape.dtype.itemsize
