"""Reads frozen kernels from a checkpoint straight into the fewer bits that they are stored in (`models.base_weights`).

A host holds a matrix of one layer at a time, and its device that matrix beside what is encoded already. Each shard is
encoded where it is read, in whole blocks, so that no host waits for another; scales, whose codes are of the whole matrix,
are compressed once all have read theirs. The numbers depend on the checkpoint alone, so a run that resumes reads the same.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.hf import weights
from internvl_jax.hf.arrangement import reading_sharding
from internvl_jax.hf.weights import Checkpoint, Names
from internvl_jax.models.base_weights import as_kernels, quantized_kernels
from internvl_jax.models.checkpoint_names import Row
from internvl_jax.models.weight_formats import FORMATS, WeightFormat, format_of, over_lead
from internvl_jax.parallel import distributed

_LOADS = itertools.count()


def load(
  checkpoint: Checkpoint,
  table: Sequence[Row],
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  place: Mapping[str, jax.sharding.Sharding],
  *,
  paths: Set[str],
) -> dict[str, jax.Array]:
  """`weights.load` of a model of which some kernels are quantized; arguments and errors as there."""
  wanted = quantized_kernels({path: leaf for path, leaf in shapes.items() if path in paths})
  kernels = as_kernels(shapes)
  params = weights.load(checkpoint, table, kernels, place, paths=paths & (kernels.keys() - wanted.keys()))
  encoded: dict[str, tuple[jax.Array, jax.Array]] = {}
  for path, parts in wanted.items():
    names = weights.names_of(path, kernels[path].shape, table)
    scales = place[f"{path}.scales"]
    reading = reading_sharding(
      names.row.transform, names.lead, kernels[path].shape, scales, far=bool(checkpoint.pointers)
    )
    encoded[path] = _encode(checkpoint, names, kernels[path].shape, reading, format_of(parts["codes"]))
  if wanted:
    distributed.barrier(f"quantized weights {next(_LOADS)} are in memory", seconds=weights.READ_SECONDS)
  for path, parts in wanted.items():
    codes, scales = encoded.pop(path)
    places = {name: place[f"{path}.{name}"] for name in parts}
    found = _compress(format_of(parts["codes"]).name, codes, scales, places)
    params |= {f"{path}.{name}": value for name, value in found.items()}
  return {path: params[path] for path in shapes if path in paths}


def _encode(
  checkpoint: Checkpoint,
  names: Names,
  shape: tuple[int, ...],
  sharding: jax.sharding.Sharding,
  form: WeightFormat,
) -> tuple[jax.Array, jax.Array]:
  """Codes and scales of a parameter of that shape, sharded like it; blocks are whole in every shard."""
  exact = {checkpoint.types[key] for key in names.keys.flat} == {"BF16"}
  leaf = jax.ShapeDtypeStruct(shape, jnp.bfloat16 if exact else jnp.float32)
  shards = [
    _encode_shard(checkpoint, names, leaf, index, device, form)
    for device, index in sharding.addressable_devices_indices_map(shape).items()
  ]
  D, F = shape[-2:]
  whole = ((*shape[:-2], D // form.packed, F), (*shape[:-2], form.blocks(D), F))
  codes, scales = (
    jax.make_array_from_single_device_arrays(whole[i], sharding, [shard[i] for shard in shards])
    for i in range(2)
  )
  return codes, scales


def _encode_shard(
  checkpoint: Checkpoint,
  names: Names,
  leaf: jax.ShapeDtypeStruct,
  index: Any,
  device: Any,
  form: WeightFormat,
) -> tuple[jax.Array, jax.Array]:
  """Codes and scales of the part of a parameter at `index`, on that device."""
  index = tuple(slice(*part.indices(size)) for part, size in zip(index, leaf.shape, strict=True))
  lead, inner = index[: names.lead], index[names.lead :]
  cells = list(itertools.product(*(range(part.start, part.stop) for part in lead)))
  stacks: Any = None
  for i, cell in enumerate(cells):
    one = tuple(slice(j, j + 1) for j in cell)
    matrix = weights.read_shard(checkpoint, names, leaf, (*one, *inner))
    matrix = jax.device_put(matrix.reshape(matrix.shape[names.lead :]), device)
    if stacks is None:
      stacks = _empty(form.name, len(cells), matrix)
    stacks = _encode_into(form.name, stacks, matrix, np.int32(i))
    jax.block_until_ready(stacks)  # The next matrix takes this one's memory.
  counts = tuple(part.stop - part.start for part in lead)
  codes, scales = (stack.reshape(*counts, *stack.shape[1:]) for stack in stacks)
  return codes, scales


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty(name: str, count: int, matrix: jax.Array) -> tuple[jax.Array, ...]:
  shapes = jax.eval_shape(over_lead(FORMATS[name].encode, matrix.ndim - 2), matrix)
  return tuple(jnp.zeros((count, *leaf.shape), leaf.dtype) for leaf in shapes)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _encode_into(
  name: str, stacks: tuple[jax.Array, ...], matrix: jax.Array, i: jax.Array
) -> tuple[jax.Array, ...]:
  encoded = over_lead(FORMATS[name].encode, matrix.ndim - 2)(matrix)
  return tuple(
    jax.lax.dynamic_update_index_in_dim(stack, part, i, 0)
    for stack, part in zip(stacks, encoded, strict=True)
  )


def _compress(
  name: str, codes: jax.Array, scales: jax.Array, places: Mapping[str, jax.sharding.Sharding]
) -> dict[str, jax.Array]:
  """All parts, each where it is wanted, from codes and scales as they were read."""

  def parts(codes: jax.Array, scales: jax.Array) -> dict[str, jax.Array]:
    return {"codes": codes, **over_lead(FORMATS[name].compress, scales.ndim - 2)(scales)}

  return jax.jit(parts, out_shardings=dict(places))(codes, scales)
