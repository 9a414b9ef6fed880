"""Reading and writing safetensors, lazily and tensor by tensor, through the tables of names.

Strict both ways: every key of the checkpoint is used and every parameter of the model is filled, and all
that does not fit is reported together, with shapes, before any number is read.
"""

import dataclasses
import itertools
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from internvl_jax.errors import UserError
from internvl_jax.hf import dtypes, files
from internvl_jax.hf.arrangement import reading_sharding
from internvl_jax.hf.files import INDEX
from internvl_jax.hf.pickled import PickledTensors
from internvl_jax.hf.ranges import AHEAD_BYTES, PARTS, RangedTensors, ahead, check_unchanged, read_headers
from internvl_jax.hf.tables import Index, Row
from internvl_jax.outputs import write_json
from internvl_jax.parallel import distributed
from internvl_jax.storage.paths import AnyPath, BucketPath, path_of, put
from internvl_jax.storage.snapshots import Pointer, read_pointer
from internvl_jax.trees import LAYER_RANGE

SHARD_BYTES = 5 * 2**30
"""Largest file of a sharded checkpoint."""

MOST_TENSORS = 100_000
"""Most tensors of a file: the largest published model, of 94 layers and 128 experts, has 37,000 in all."""

TOLD = 40
"""How many tensors that do not fit are told one by one."""

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
    return handle.get_slice(key)[index]


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
  are several hosts, each reads rows that lie together in the files, and the devices exchange what others need: all
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
    return _read_shard(self.checkpoint, self.names, self.leaf, index).reshape(self.shape[len(cell) :])

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    del copy
    whole = _read_shard(self.checkpoint, self.names, self.leaf, (slice(None),) * len(self.shape))
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
    shard = _read_shard(checkpoint, names, leaf, group[0][1])
    arrays += [jax.device_put(shard, device) for device, _ in group]
  return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _read_shard(checkpoint: Checkpoint, names: Names, leaf: jax.ShapeDtypeStruct, index: Any) -> np.ndarray:
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
  found, problems, used = checkpoint.shapes, [], set()
  for path, place in names.items():
    inner = shapes[path].shape[place.lead :]
    transform = place.row.transform
    expected = (transform.shapes or _shapes_of(transform.save))(inner)
    for cell in place.keys.reshape(-1, place.keys.shape[-1]):
      for key, shape in zip(cell, expected, strict=True):
        used.add(key)
        if key not in found:
          problems.append(f"missing: {key} (wanted for {path} {inner})")
        elif found[key] != shape and not _resizes(place.row, found[key], inner):
          problems.append(f"mis-shaped: {key} is {found[key]}, expected {shape} for {path}")
  left = sorted(set(found) - used)
  problems += [
    f"left over: {key[:200]} {found[key]} fits no parameter of the model" for key in left[: TOLD + 1]
  ]
  count = len(problems) + len(left[TOLD + 1 :])
  if count > TOLD:
    problems = [*problems[:TOLD], f"and {count - TOLD} more"]
  if problems:
    raise UserError(
      "\n".join([f"{checkpoint.place}: the checkpoint does not fit the model of its config.json:", *problems])
    )


def _shapes_of(save: Callable) -> Callable[[tuple[int, ...]], list[tuple[int, ...]]]:
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


def tensors(
  params: Mapping[str, Any], table: Sequence[Row], dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
  """A model's parameters as the checkpoint's tensors, one layer at a time, cast to `dtype`."""
  for path, value in params.items():
    names = names_of(path, value.shape, table)
    for cell in np.ndindex(*names.keys.shape[:-1]):
      parts = names.row.transform.save(np.asarray(value[cell] if cell else value))
      for key, part in zip(names.keys[cell], parts, strict=True):
        yield key, np.ascontiguousarray(part, dtype)


def tensor_bytes(params: Mapping[str, Any], table: Sequence[Row], dtype: np.dtype) -> Iterator[int]:
  """How many bytes each of `tensors` has, in their order, without a number being read."""
  for path, value in params.items():
    names = names_of(path, value.shape, table)
    transform = names.row.transform
    shapes = (transform.shapes or _shapes_of(transform.save))(tuple(value.shape[names.lead :]))
    for _ in np.ndindex(*names.keys.shape[:-1]):
      yield from (math.prod(shape) * dtype.itemsize for shape in shapes)


def count_files(sizes: Iterable[int], file_bytes: int = SHARD_BYTES) -> int:
  """How many files `save` makes of tensors of these sizes."""
  count, held = 1, 0
  for size in sizes:
    if held and held + size > file_bytes:
      count, held = count + 1, 0
    held += size
  return count


def save(
  folder: str | AnyPath,
  items: Iterable[tuple[str, np.ndarray]],
  *,
  files_in_all: int | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes safetensors: one file, or numbered files and an index when the tensors exceed `shard_bytes`.

  On a disk, files have temporary names until all are written, so that a broken run leaves no half model, nor a full disk
  these. In a bucket, where nothing can be renamed, files are sent one by one under their own names, after those of
  an older model are gone; the index comes last. This machine needs room for one of them.

  Args:
    folder: made if missing.
    items: names and tensors (see `tensors`), of which no more than a file's worth is held at a time.
    files_in_all: how many files there will be (`count_files`); a bucket needs to know.
    shard_bytes: largest file, unless one tensor is larger.
  """
  folder = path_of(folder)
  if isinstance(folder, BucketPath):
    assert files_in_all is not None
    _send(folder, items, files_in_all, shard_bytes)
    return
  folder.mkdir(parents=True, exist_ok=True)
  shards: list[list[str]] = []
  total = 0
  try:
    for pending in _grouped(items, shard_bytes):
      write_file(pending, folder / f"shard-{len(shards)}.tmp")
      shards.append(list(pending))
      total += sum(tensor.nbytes for tensor in pending.values())
  except BaseException:
    for i in range(len(shards)):
      (folder / f"shard-{i}.tmp").unlink()
    raise
  _publish(folder, shards, total)


def _grouped(items: Iterable[tuple[str, np.ndarray]], file_bytes: int) -> Iterator[dict[str, np.ndarray]]:
  """Tensors a file at a time. Each group is emptied when the next one is asked for."""
  pending: dict[str, np.ndarray] = {}
  size = 0
  for key, tensor in items:
    if pending and size + tensor.nbytes > file_bytes:
      yield pending
      pending.clear()
      size = 0
    pending[key] = tensor
    size += tensor.nbytes
  yield pending


def _send(folder: BucketPath, items: Iterable[tuple[str, np.ndarray]], count: int, file_bytes: int) -> None:
  """Writes a model to a bucket, file by file."""
  _remove_older(folder)
  names, shards, total = _file_names(count), [], 0
  for name, pending in itertools.zip_longest(names, _grouped(items, file_bytes)):
    with tempfile.TemporaryDirectory() as local:
      write_file(pending, Path(local) / name)
      put(Path(local) / name, folder / name)
    shards.append(list(pending))
    total += sum(tensor.nbytes for tensor in pending.values())
  _write_index(folder, shards, total)


def write_file(tensors: dict[str, np.ndarray], path: Path) -> None:
  """Writes a safetensors file, complete or not at all, that whoever may read the folder's other files may read, too.

  Raises:
    OSError: the disk is full, say.
  """
  temporary = path.with_name(path.name + ".tmp")
  temporary.touch()
  mode = temporary.stat().st_mode
  try:
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.chmod(mode)  # safetensors makes it the owner's alone.
    temporary.replace(path)
  except SafetensorError as error:
    if not (found := re.search(r"os error (\d+)", str(error))):
      raise
    raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
  finally:
    temporary.unlink(missing_ok=True)


def _publish(folder: Path, shards: list[list[str]], total: int) -> None:
  """Gives finished shards their final names, removes an older model's files and writes the index."""
  _remove_older(folder)
  for i, name in enumerate(_file_names(len(shards))):
    (folder / f"shard-{i}.tmp").rename(folder / name)
  _write_index(folder, shards, total)


def _remove_older(folder: AnyPath) -> None:
  for old in folder.glob("model*.safetensors"):
    old.unlink()
  (folder / INDEX).unlink(missing_ok=True)


def _file_names(count: int) -> list[str]:
  if count == 1:
    return ["model.safetensors"]
  return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _write_index(folder: AnyPath, shards: list[list[str]], total: int) -> None:
  """Says which tensor is in which file, where there are several."""
  if len(shards) > 1:
    named = zip(shards, _file_names(len(shards)), strict=True)
    weight_map = {key: name for keys, name in named for key in keys}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)
