"""Reading and writing safetensors, lazily and tensor by tensor, through the tables of names.

Strict both ways: every key of the checkpoint is used and every parameter of the model is filled, and all
that does not fit is reported together, with shapes, before any number is read.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from internvl_jax.errors import UserError
from internvl_jax.hf.families import Row
from internvl_jax.trees import LAYER_RANGE

SHARD_BYTES = 5 * 2**30
"""Largest file of a sharded checkpoint."""

INDEX = "model.safetensors.index.json"


class Checkpoint:
  """The tensors of a checkpoint folder: names and shapes at once, numbers one at a time."""

  def __init__(self, folder: str | Path):
    """Opens all safetensors files of the folder.

    Raises:
      UserError: no weights, only pickled weights, a damaged file, or a file that the index names and that is
        not there.
    """
    self.folder = Path(folder)
    self._handles: dict[str, Any] = {}
    self.shapes: dict[str, tuple[int, ...]] = {}
    for path in self._files():
      try:
        # The handle maps the file into memory: pages are read when a tensor is.
        handle = safe_open(path, framework="np")
        for key in handle.keys():
          self.shapes[key] = tuple(handle.get_slice(key).get_shape())
          self._handles[key] = handle
      except SafetensorError as error:
        raise UserError(f"{path}: damaged or truncated safetensors file ({error})") from None

  def _files(self) -> list[Path]:
    index = self.folder / INDEX
    if index.exists():
      names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
      files = [self.folder / name for name in names]
    else:
      files = sorted(self.folder.glob("*.safetensors"))
    for path in files:
      if not path.is_file():
        raise UserError(f"{path}: no such file, but {INDEX} names it")
    if not files:
      pickles = [p.name for p in self.folder.glob("*.bin")] + [p.name for p in self.folder.glob("*.pth")]
      found = f"found {', '.join(pickles)}, which are pickles and are never read" if pickles else "found none"
      raise UserError(f"{self.folder}: no *.safetensors weights ({found})")
    return files

  def __getitem__(self, key: str) -> np.ndarray:
    return self._handles[key].get_tensor(key)


def load(
  checkpoint: Checkpoint,
  table: Sequence[Row],
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  place: Callable[[str], jax.sharding.Sharding],
) -> dict[str, jax.Array]:
  """Fills a model's parameters from a checkpoint, each shard straight to its device.

  No more than one tensor of the checkpoint is held beside the shard being filled.

  Args:
    checkpoint: the source.
    table: its names.
    shapes: shape and dtype of every parameter; numbers are cast to the dtype.
    place: the sharding of the parameter at a path.

  Raises:
    UserError: one line for each missing, left-over or mis-shaped tensor.
  """
  plan = _match(checkpoint.shapes, table, shapes)

  def fill(path: str) -> jax.Array:
    shape, dtype = shapes[path].shape, shapes[path].dtype
    row, keys = plan[path]
    stacked = LAYER_RANGE.search(path) is not None

    def shard(index: Any) -> np.ndarray:
      if not stacked:
        return np.ascontiguousarray(row.transform.load(checkpoint[keys[0]], shape)[index], dtype)
      layers = keys[index[0]]
      inner = [row.transform.load(checkpoint[key], shape[1:])[index[1:]] for key in layers[:1]]
      out = np.empty((len(layers), *inner[0].shape), dtype)
      for i, key in enumerate(layers):
        out[i] = row.transform.load(checkpoint[key], shape[1:])[index[1:]]
      return out

    return jax.make_array_from_callback(shape, place(path), shard)

  return {path: fill(path) for path in shapes}


def _match(
  found: Mapping[str, tuple[int, ...]], table: Sequence[Row], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, tuple[Row, list[str]]]:
  """Pairs every parameter with its row and keys (one a layer), or reports all that does not fit."""
  plan, problems, used = {}, [], set()
  for path, shape in shapes.items():
    row, keys = checkpoint_keys(path, table)
    plan[path] = row, keys
    inner = shape.shape[1:] if LAYER_RANGE.search(path) else shape.shape
    for key in keys:
      used.add(key)
      if key not in found:
        problems.append(f"missing: {key} (wanted for {path} {inner})")
      elif not _fits(found[key], row, inner):
        expected = row.transform.save(np.broadcast_to(np.int8(0), inner)).shape
        problems.append(f"mis-shaped: {key} is {found[key]}, expected {expected} for {path}")
  problems += [
    f"left over: {key} {found[key]} fits no parameter of the model" for key in sorted(set(found) - used)
  ]
  if problems:
    raise UserError(
      "\n".join(["the checkpoint does not fit the model that its config.json describes:", *problems])
    )
  return plan


def _fits(found: tuple[int, ...], row: Row, wanted: tuple[int, ...]) -> bool:
  # A broadcast zero has the shape without the memory. The position embedding is resized, hence `load`.
  try:
    return row.transform.load(np.broadcast_to(np.float32(0), found), wanted).shape == wanted
  except (ValueError, AssertionError, IndexError):
    return False


def checkpoint_keys(path: str, table: Sequence[Row]) -> tuple[Row, list[str]]:
  """The table's row for a parameter, and its keys in the checkpoint: one, or one for each layer of a stack."""
  span = LAYER_RANGE.search(path)
  template = LAYER_RANGE.sub(".layers.{i}.", path)
  row = next((row for row in table if row.ours == template), None)
  if row is None:
    raise AssertionError(f"no row of the table of names is for {path}")
  if span is None:
    return row, [row.theirs]
  return row, [row.theirs.replace("{i}", str(i)) for i in range(int(span[1]), int(span[2]))]


def tensors(
  params: Mapping[str, jax.Array], table: Sequence[Row], dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
  """A model's parameters as the checkpoint's tensors, one at a time, cast to `dtype`."""
  for path, value in params.items():
    row, keys = checkpoint_keys(path, table)
    for i, key in enumerate(keys):
      layer = value[i] if LAYER_RANGE.search(path) else value
      yield key, np.ascontiguousarray(row.transform.save(np.asarray(layer)), dtype)


def save(
  folder: str | Path,
  params: Mapping[str, jax.Array],
  table: Sequence[Row],
  *,
  dtype: np.dtype,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes safetensors: one file, or numbered files and an index when the tensors exceed `shard_bytes`.

  Files are written under temporary names and renamed at the end, so that a broken run leaves no half model.
  """
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  shards: list[list[str]] = []
  pending: dict[str, np.ndarray] = {}
  size = total = 0

  def flush() -> None:
    save_file(pending, folder / f"shard-{len(shards)}.tmp", metadata={"format": "pt"})
    shards.append(list(pending))
    pending.clear()

  for key, tensor in tensors(params, table, dtype):
    if pending and size + tensor.nbytes > shard_bytes:
      flush()
      size = 0
    pending[key] = tensor
    size += tensor.nbytes
    total += tensor.nbytes
  flush()
  _publish(folder, shards, total)


def _publish(folder: Path, shards: list[list[str]], total: int) -> None:
  """Gives finished shards their final names, removes an older model's files and writes the index."""
  n = len(shards)
  names = ["model.safetensors"] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
  for old in folder.glob("model*.safetensors"):
    old.unlink()
  (folder / INDEX).unlink(missing_ok=True)
  for i, name in enumerate(names):
    (folder / f"shard-{i}.tmp").rename(folder / name)
  if n > 1:
    weight_map = {key: name for keys, name in zip(shards, names, strict=True) for key in keys}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
