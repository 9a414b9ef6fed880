"""Arrays that are sharded over several hosts, gathered into the memory of each of them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped


def fetch(array: Shaped[Array, "..."], cell: tuple[int, ...] = ()) -> Shaped[np.ndarray, "..."]:
  """An array, or what is at `cell` of its first axes, in this host's memory; a call that all processes make.

  Only that part is all-gathered on the devices, for as long as this takes.
  """
  if not array.is_fully_addressable:
    assert isinstance(array.sharding, NamedSharding)
    everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())
    array = _replicate(len(cell), everywhere)(array, *(np.int32(i) for i in cell))
    return np.asarray(array)
  return np.asarray(array[cell] if cell else array)


def fetch_rows(array: Shaped[Array, "A R ..."]) -> Shaped[np.ndarray, "A rows ..."]:
  """This process's rows of an array that is sharded along its second axis alone, in this host's memory."""
  pieces = {shard.index[1].start or 0: shard.data for shard in array.addressable_shards}
  return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)], axis=1)


@functools.cache
def _replicate(depth: int, everywhere: NamedSharding) -> Callable[..., jax.Array]:
  """A program that copies a part to every device; the part's place is an argument, so layers share it."""

  def part(array: jax.Array, *cell: jax.Array) -> jax.Array:
    assert len(cell) == depth
    for i in cell:
      array = jax.lax.dynamic_index_in_dim(array, i, keepdims=False)
    return array

  return jax.jit(part, out_shardings=everywhere)


@dataclasses.dataclass(frozen=True, eq=False)
class Gathered:
  """A parameter whose shards are on several hosts, all-gathered a layer at a time when it is read.

  All processes read the same layers in the same order, whatever they do with them.
  """

  array: jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    return self.array.shape

  def __getitem__(self, cell: tuple[int, ...]) -> np.ndarray:
    return fetch(self.array, cell)

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    del copy
    whole = fetch(self.array)
    return whole if dtype is None else whole.astype(dtype)


def gathered(params: Mapping[str, jax.Array]) -> dict[str, Any]:
  """Parameters by path that this process can read, wherever their shards are."""
  return {path: value if value.is_fully_addressable else Gathered(value) for path, value in params.items()}
