"""Reading safetensors, lazily and tensor by tensor, through the tables of names; saving.py writes them.

Strict both ways: every key of the checkpoint is used and every parameter of the model is filled, and all
that does not fit is reported together, with shapes, before any number is read.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from internvl_jax.errors import UserError
from internvl_jax.hf import dtypes, files
from internvl_jax.hf.arrangement import reading_sharding
from internvl_jax.hf.files import INDEX
from internvl_jax.hf.pickled import PickledTensors
from internvl_jax.hf.ranges import AHEAD_BYTES, PARTS, RangedTensors, ahead, check_unchanged, read_headers
from internvl_jax.models.checkpoint_names import Index, Row
from internvl_jax.parallel import distributed
from internvl_jax.storage.snapshots import Pointer, read_pointer
from internvl_jax.trees import LAYER_RANGE

MOST_TENSORS = 100_000
"""Most tensors of a file: the largest published model, of 94 layers and 128 experts, has 37,000 in all."""

BLOCK_BYTES = 1 << 28
"""Of a tensor on a disk, read at once, if its numbers are of four bytes."""

TOLD = 40
"""How many tensors that do not fit are listed one by one."""

READ_SECONDS = 3600
"""How long hosts wait for the last one to read its weights: 150 GB from a slow disk."""

# Numbers the loads of a run, which all its processes make alike.
_LOADS = itertools.count()


class Checkpoint:
  """The tensors of one or several places: names and shapes at once, numbers when they are asked for."""

  def __init__(self):
    """An empty one; see `open_checkpoint`."""
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.where: dict[str, Path] = {}
    self.types: dict[str, str] = {}
    self._handles: dict[str, tuple[Any, str]] = {}

  def add_file(self, path: Path, rename: "Rename") -> None:
    """Adds the tensors of a safetensors file, or of one of torch.save's.

    Raises:
      UserError: a damaged file, or a tensor that is there already.
    """
    try:
      handle = _open(path)
      keys = handle.keys()
      if len(keys) > MOST_TENSORS:
        raise UserError(f"{path}: names {len(keys):,} tensors, more than any InternVL has; take another file")
      if not keys:
        raise UserError(f"{path}: holds no tensors; take another file")
      for key in keys:
        name, tensor = rename(key), handle.get_slice(key)
        if name in self.shapes:
          raise UserError(f"{path}: the tensor {key} is there twice, also in {self.where[name]}")
        self.shapes[name], self.types[name] = tuple(tensor.get_shape()), tensor.get_dtype()
        self.where[name] = path
        self._handles[name] = handle, key
    except SafetensorError as error:
      raise UserError(
        f"{path}: damaged or truncated safetensors file ({files.shown_error(error)}); download it again"
      ) from None
    except OSError as error:
      raise UserError(f"{path}: cannot be read ({error})") from None

  def replace(self, other: "Checkpoint") -> None:
    """Takes over the tensors of another, in place of those of the same names."""
    self.shapes |= other.shapes
    self.types |= other.types
    self.where |= other.where
    self._handles |= other._handles

  def drop(self, names: Iterable[str]) -> None:
    """Forgets tensors."""
    for name in list(names):
      del self.shapes[name], self.types[name], self.where[name], self._handles[name]

  @property
  def dtypes(self) -> set[str]:
    """The types of the model's numbers as safetensors names them; adapters, which are kept in float32, do not count."""
    return {found for name, found in self.types.items() if ".lora_" not in name}

  @property
  def place(self) -> str:
    """The folders of its files, for messages."""
    return ", ".join(sorted({str(path.parent) for path in self.where.values()}))

  @property
  def pointers(self) -> set[Pointer]:
    """The files of buckets that its tensors are in."""
    handles = {id(handle): handle for handle, _ in self._handles.values()}
    return {handle.pointer for handle in handles.values() if isinstance(handle, RangedTensors)}

  def key(self, name: str) -> str:
    """What the file calls a tensor."""
    return self._handles[name][1]

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """A tensor, or the part of it at `index`: then no more than that part is read."""
    handle, key = self._handles[name]
    if index is None or all(part == slice(None) for part in index):
      return handle.get_tensor(key)
    tensor = handle.get_slice(key)
    # Of a bucket, a run of bytes is read in parts already.
    return tensor[index] if isinstance(handle, RangedTensors) or not index else _in_blocks(tensor, index)


def _in_blocks(tensor: Any, index: Index) -> np.ndarray:
  """The part of a tensor at `index`, a block of rows at a time: safetensors holds twice what it reads at once."""
  (rows, *others), shape = index, tensor.get_shape()
  start, stop, _ = rows.indices(shape[0])
  count = max(1, BLOCK_BYTES // max(1, 4 * math.prod(shape[1:])))
  if stop - start <= count:
    return tensor[index]
  first = tensor[slice(start, start + count), *others]
  out = np.empty((stop - start, *first.shape[1:]), first.dtype)
  out[:count] = first
  for at in range(start + count, stop, count):
    out[at - start : at - start + count] = tensor[slice(at, min(at + count, stop)), *others]
  return out


def _open(path: Path) -> Any:
  """A file's tensors, of which numbers are read when they are asked for."""
  if pointer := read_pointer(path):
    return RangedTensors(pointer)
  if path.suffix in files.PICKLES:
    return PickledTensors(path)
  _check_beginning(path)
  # The handle maps the file into memory: pages are read when a tensor is.
  return safe_open(path, framework="np")


def _check_beginning(path: Path) -> None:
  """Refuses a file that is none of safetensors, or whose header would take minutes to read."""
  if found := files.what_it_is(path):
    raise UserError(f"{path}: {found}")
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
  if files.HEADER_BYTES < length < path.stat().st_size:
    raise UserError(
      f"{path}: has a header of {length:,} bytes, more than any InternVL needs; take another file"
    )


@dataclasses.dataclass(frozen=True)
class Rename:
  """From a checkpoint's keys to those of the tables: patterns replaced in order, then a prefix added."""

  patterns: tuple[tuple[str, str], ...] = ()
  prefix: str = ""

  def __call__(self, key: str) -> str:
    for pattern, replacement in self.patterns:
      key = re.sub(pattern, replacement, key)
    return self.prefix + key


def open_checkpoint(path: str | Path, rename: Rename = Rename(), *, pickles: bool = False) -> Checkpoint:
  """The tensors of a folder's safetensors files, or of one file.

  Args:
    path: a folder or a file.
    rename: from its keys to the tables'.
    pickles: a file may be one of torch.save's.

  Raises:
    UserError: no weights, only pickled weights, a damaged file, files of two models, or an index that names what is
      not there.
  """
  checkpoint = Checkpoint()
  paths, where = files.weight_files(Path(path), pickles=pickles)
  read_headers([pointer for file in paths if (pointer := read_pointer(file))])
  for file in paths:
    checkpoint.add_file(file, rename)
  for key, name in where.items():
    if rename(key) not in checkpoint.shapes:
      raise UserError(
        f"{path}: {INDEX} says that {files.shown(key)} is in {name}, which lacks it; they are of different models, or "
        "the file is of another download: download both again"
      )
  return checkpoint


@dataclasses.dataclass(frozen=True)
class Names:
  """A parameter's place in a checkpoint.

  Attributes:
    row: its line of the table.
    keys: str [*lead, n]: the n tensors of every layer (first axis of `lead`) and expert (the next), where
      there are any.
  """

  row: Row
  keys: np.ndarray

  @property
  def lead(self) -> int:
    """How many of our first axes run over layers and experts."""
    return self.keys.ndim - 1


def names_of(path: str, shape: Sequence[int], table: Sequence[Row]) -> Names:
  """The place of a parameter, by the table."""
  span = LAYER_RANGE.search(path)
  template = LAYER_RANGE.sub(".layers.{i}.", path)
  row = next((row for row in table if row.ours == template), None)
  if row is None:
    raise UserError(f"the checkpoint's layout has no form for the parameter {path}")
  layers = range(int(span[1]), int(span[2])) if span else None
  with_experts = "{e}" in row.theirs[0]
  experts = range(shape[1 if span else 0]) if with_experts else None

  def keys(i: int, e: int) -> list[str]:
    return [key.replace("{i}", str(i)).replace("{e}", str(e)) for key in row.theirs]

  found = [[keys(i, e) for e in experts or [0]] for i in layers or [0]]
  lead = tuple(len(axis) for axis in (layers, experts) if axis is not None)
  return Names(row, np.array(found, dtype=object).reshape(*lead, len(row.theirs)))


def load(
  checkpoint: Checkpoint,
  table: Sequence[Row],
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  place: Mapping[str, jax.sharding.Sharding],
  *,
  paths: Set[str] | None = None,
) -> dict[str, jax.Array]:
  """Fills a model's parameters from a checkpoint, each shard straight to its devices.

  On the host there is no more than one shard of one parameter and one tensor of the checkpoint at a time. Where there
  are several hosts, each reads contiguous rows of the files, and the devices exchange what others need: all
  hosts call this alike.

  Args:
    checkpoint: the source.
    table: its names.
    shapes: shape and dtype of every parameter; numbers are cast to the dtype.
    place: the sharding of every parameter.
    paths: the parameters to read; None: all. All of them are checked.

  Raises:
    UserError: one line for each missing, left-over or mis-shaped tensor.
  """
  names = {path: names_of(path, leaf.shape, table) for path, leaf in shapes.items()}
  _check(checkpoint, names, shapes)
  wanted = {path: leaf for path, leaf in shapes.items() if paths is None or path in paths}
  pointers = checkpoint.pointers
  rows = {
    path: reading_sharding(
      names[path].row.transform, names[path].lead, leaf.shape, place[path], far=bool(pointers)
    )
    for path, leaf in wanted.items()
  }
  params = {path: _fill(checkpoint, names[path], leaf, rows[path]) for path, leaf in wanted.items()}
  check_unchanged(pointers)
  moved = [path for path in wanted if rows[path] is not place[path]]
  if moved:
    # Devices wait for each other less long than hosts take to read.
    distributed.barrier(f"weights {next(_LOADS)} are in memory", seconds=READ_SECONDS)
  for path in moved:
    params[path] = jax.jit(lambda x: x, out_shardings=place[path])(params[path])
  return params


@dataclasses.dataclass(frozen=True, eq=False)
class LazyParameter:
  """A parameter of which a layer (and expert) is read when it is asked for by index; `np.asarray` reads all."""

  checkpoint: Checkpoint
  names: Names
  leaf: jax.ShapeDtypeStruct

  @property
  def shape(self) -> tuple[int, ...]:
    return self.leaf.shape

  def __getitem__(self, cell: tuple[int, ...]) -> np.ndarray:
    index = tuple(slice(i, i + 1) for i in cell) + (slice(None),) * (len(self.shape) - len(cell))
    return read_shard(self.checkpoint, self.names, self.leaf, index).reshape(self.shape[len(cell) :])

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    del copy
    whole = read_shard(self.checkpoint, self.names, self.leaf, (slice(None),) * len(self.shape))
    return whole if dtype is None else whole.astype(dtype)


def lazy(
  checkpoint: Checkpoint,
  table: Sequence[Row],
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  dtype: np.dtype,
  paths: Iterable[str] | None = None,
) -> dict[str, LazyParameter]:
  """A model's parameters, read layer by layer when they are asked for; arguments and errors as of `load`.

  A checkpoint may hold more than `shapes` asks for where it holds adapters that are left aside.
  """
  names = {path: names_of(path, leaf.shape, table) for path, leaf in shapes.items()}
  _check(checkpoint, names, shapes)
  chosen = shapes if paths is None else paths
  return {
    path: LazyParameter(checkpoint, names[path], jax.ShapeDtypeStruct(shapes[path].shape, dtype))
    for path in chosen
  }


def _fill(
  checkpoint: Checkpoint, names: Names, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding
) -> jax.Array:
  devices_of: dict[str, list[tuple[Any, Any]]] = {}
  for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
    devices_of.setdefault(str(index), []).append((device, index))
  arrays = []
  for group in devices_of.values():
    shard = read_shard(checkpoint, names, leaf, group[0][1])
    arrays += [jax.device_put(shard, device) for device, _ in group]
  return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def read_shard(checkpoint: Checkpoint, names: Names, leaf: jax.ShapeDtypeStruct, index: Any) -> np.ndarray:
  """The part of a parameter at `index`, from the tensors that it needs."""
  index = tuple(slice(*part.indices(size)) for part, size in zip(index, leaf.shape, strict=True))
  inner, part = leaf.shape[names.lead :], index[names.lead :]
  part = tuple(slice(None) if s == slice(0, n, 1) else s for s, n in zip(part, inner, strict=True))
  keys = names.keys[index[: names.lead]]
  cells = keys.reshape(-1, keys.shape[-1])
  transform = names.row.transform

  def read(cell: np.ndarray) -> np.ndarray:
    if transform.part is not None:
      return transform.load([checkpoint.read(cell[0], transform.part(part))], inner)
    return transform.load([checkpoint.read(key) for key in cell], inner)[part]

  with np.errstate(over="ignore", invalid="ignore"):  # What becomes infinite is told by name.
    first = read(cells[0])
    if len(cells) == 1:  # Tables of embeddings are the largest tensors: no second copy of them.
      out = np.asarray(first, leaf.dtype, order="C")
      if not dtypes.all_finite(out):
        _blame(checkpoint, cells[0], leaf.dtype)
      return out.reshape(*keys.shape[:-1], *out.shape)
    out = np.empty((len(cells), *first.shape), leaf.dtype)
    # Of a bucket, where each of them waits, several at a time.
    most = min(PARTS, AHEAD_BYTES // max(1, first.nbytes)) if checkpoint.pointers else 0
    others = ahead(read, cells[1:], most) if most > 1 else map(read, cells[1:])
    layers = itertools.chain([first], others)
    del first
    for i, cell in enumerate(cells):
      out[i] = next(layers)
      # A layer at a time, while it is in the cache.
      if not dtypes.all_finite(out[i : i + 1]):
        _blame(checkpoint, cell, leaf.dtype)
  return out.reshape(*keys.shape[:-1], *out.shape[1:])


def _blame(checkpoint: Checkpoint, cell: np.ndarray, dtype: Any) -> NoReturn:
  """Raises with the first of a layer's tensors that is not finite, of which the whole is read for that."""
  for name in cell:
    tensor = checkpoint.read(name)
    if dtypes.is_float(tensor) and (wrong := dtypes.count_not_finite(tensor.astype(dtype))):
      there = dtypes.count_not_finite(tensor)
      words = "NaN or infinite" if there else f"too large for {np.dtype(dtype)}"
      raise UserError(
        f"{checkpoint.where[name]}: the tensor {checkpoint.key(name)} holds {wrong:,} of {tensor.size:,} numbers that are "
        f"{words}; the run that wrote it diverged or the file is damaged: take an earlier checkpoint, or download it again"
      )
  names = " and ".join(checkpoint.key(name) for name in cell)
  raise UserError(
    f"{checkpoint.where[cell[0]]}: {names} hold numbers that are NaN or infinite; download the file again"
  )


def _check(checkpoint: Checkpoint, names: Mapping[str, Names], shapes: Mapping[str, Any]) -> None:
  """Raises with all that does not fit."""
  problems = _misfits(checkpoint, names, shapes, checkpoint.shapes)
  if len(problems) > TOLD:
    problems = [*problems[:TOLD], f"and {len(problems) - TOLD} more"]
  if problems:
    raise UserError(
      "\n".join([f"{checkpoint.place}: the checkpoint does not fit the model of its config.json:", *problems])
    )


def misfits(
  checkpoint: Checkpoint, table: Sequence[Row], shapes: Mapping[str, Any], keys: Iterable[str]
) -> list[str]:
  """What does not fit, a text each: parameters without a tensor of their shape, and tensors of `keys` without a parameter."""
  names = {path: names_of(path, leaf.shape, table) for path, leaf in shapes.items()}
  return _misfits(checkpoint, names, shapes, keys)


def _misfits(
  checkpoint: Checkpoint, names: Mapping[str, Names], shapes: Mapping[str, Any], keys: Iterable[str]
) -> list[str]:
  found, problems, used = checkpoint.shapes, [], set()
  for path, place in names.items():
    inner = shapes[path].shape[place.lead :]
    transform = place.row.transform
    expected = (transform.shapes or shapes_of(transform.save))(inner)
    for cell in place.keys.reshape(-1, place.keys.shape[-1]):
      for key, shape in zip(cell, expected, strict=True):
        used.add(key)
        if key not in found:
          problems.append(f"missing: {key} (wanted for {path} {inner})")
        elif found[key] != shape and not _resizes(place.row, found[key], inner):
          problems.append(f"mis-shaped: {key} is {found[key]}, expected {shape} for {path}")
  left = sorted(set(keys) - used)
  return problems + [f"left over: {key[:200]} {found[key]} fits no parameter of the model" for key in left]


def shapes_of(save: Callable) -> Callable[[tuple[int, ...]], list[tuple[int, ...]]]:
  """From a parameter's shape to those of the tensors that `save` makes of it."""
  # A broadcast zero has the shape without the memory.
  return lambda shape: [x.shape for x in save(np.broadcast_to(np.int8(0), shape))]


def _resizes(row: Row, found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
  if not row.transform.resizes:
    return False
  try:
    return row.transform.load([np.broadcast_to(np.float32(0), found)], wanted).shape == wanted
  except UserError:
    raise  # It knows better what does not fit.
  except (ValueError, AssertionError, IndexError):
    return False
