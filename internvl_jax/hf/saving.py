"""Writing safetensors, tensor by tensor, through the tables of names: to a folder, or file by file to a bucket."""

import itertools
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from internvl_jax.hf.files import INDEX
from internvl_jax.hf.weights import names_of, shapes_of
from internvl_jax.models.checkpoint_names import Row
from internvl_jax.outputs import write_json
from internvl_jax.storage.paths import AnyPath, BucketPath, path_of, put

SHARD_BYTES = 5 * 2**30
"""Largest file of a sharded checkpoint."""


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
    shapes = (transform.shapes or shapes_of(transform.save))(tuple(value.shape[names.lead :]))
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
  an older model are gone; the index comes last. This machine needs space for one of them.

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
    for pending in _split_by_bytes(items, shard_bytes):
      write_file(pending, folder / f"shard-{len(shards)}.tmp")
      shards.append(list(pending))
      total += sum(tensor.nbytes for tensor in pending.values())
  except BaseException:
    for i in range(len(shards)):
      (folder / f"shard-{i}.tmp").unlink()
    raise
  _publish(folder, shards, total)


def _split_by_bytes(
  items: Iterable[tuple[str, np.ndarray]], file_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
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
  for name, pending in itertools.zip_longest(names, _split_by_bytes(items, file_bytes)):
    with tempfile.TemporaryDirectory() as local:
      write_file(pending, Path(local) / name)
      put(Path(local) / name, folder / name)
    shards.append(list(pending))
    total += sum(tensor.nbytes for tensor in pending.values())
  _write_index(folder, shards, total)


def write_file(tensors: dict[str, np.ndarray], path: Path) -> None:
  """Writes a safetensors file, complete or not at all, that whoever may read the folder's other files may read, too.

  Raises:
    OSError: for example, the disk is full.
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
  """Writes the index: which tensor is in which file, where there are several."""
  if len(shards) > 1:
    named = zip(shards, _file_names(len(shards)), strict=True)
    weight_map = {key: name for keys, name in named for key in keys}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)
