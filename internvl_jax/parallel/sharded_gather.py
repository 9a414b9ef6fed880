"""Lookups of rows: token embeddings in a table, and image features in their shard's pool.

Left to the compiler, both would all-gather what is looked up in, or add up the results of all devices.

Letters: R rows, S tokens, V vocabulary, E width, D data shards, Q features of a shard's pool.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from internvl_jax.parallel.rules import ACTIVATIONS, dividing_axes, mesh_in_scope, spec, stored_over


def embed(table: Float[Array, "V E"], ids: Int[Array, "R S"], *, dtype: jnp.dtype) -> Float[Array, "R S E"]:
  """Rows `ids` [R, S] of a table [V, E], as [R, S, E] in that dtype.

  Each device looks up the tokens of all devices in its slice of the table's width; then slices of the width
  are exchanged for slices of the tokens. So activations travel, which are smaller than the table.
  """
  mesh = mesh_in_scope()
  if mesh is None:
    return jnp.take(table, ids, axis=0).astype(dtype)
  width = stored_over("table", table.shape[1], mesh)
  rows = dividing_axes(ACTIVATIONS["rows"], ids.shape[0], mesh)
  tokens = dividing_axes(ACTIVATIONS["tokens"], ids.shape[1], mesh)
  axis_of = {**dict.fromkeys(rows, 0), **dict.fromkeys(tokens, 1)}

  def local(table: jax.Array, ids: jax.Array) -> jax.Array:
    for name in width:
      if name in axis_of:
        ids = jax.lax.all_gather(ids, name, axis=axis_of[name], tiled=True)
    x = jnp.take(table, ids, axis=0).astype(dtype)
    # In reverse, so that each exchange undoes the outermost gathering of ids, and joins neighboring slices.
    for name in reversed(width):
      if name in axis_of:
        x = jax.lax.all_to_all(x, name, split_axis=axis_of[name], concat_axis=2, tiled=True)
      else:
        x = jax.lax.all_gather(x, name, axis=2, tiled=True)
    return x

  return jax.shard_map(
    local,
    in_specs=(spec(None, width), spec(rows, tokens)),
    out_specs=spec(rows, tokens, None),
    check_vma=False,
  )(table, ids)


def take_features(features: Float[Array, "D Q E"], index: Int[Array, "R S"]) -> Float[Array, "R S E"]:
  """Entries `index` [R, S] of the shards' pools of features [D, Q, E], as [R, S, E].

  Rows belong to shards in blocks of R/D, so that no feature crosses shards. Indexes outside are clipped.
  """
  mesh = mesh_in_scope()
  if mesh is None:
    return _take(features, index)
  rows = dividing_axes(ACTIVATIONS["rows"], features.shape[0], mesh)
  pool = dividing_axes(ACTIVATIONS["tokens"], features.shape[1], mesh)
  tokens = dividing_axes(ACTIVATIONS["tokens"], index.shape[1], mesh)

  def local(features: jax.Array, index: jax.Array) -> jax.Array:
    if pool:
      features = jax.lax.all_gather(features, pool, axis=1, tiled=True)
    return _take(features, index)

  return jax.shard_map(
    local,
    in_specs=(spec(rows, pool, None), spec(rows, tokens)),
    out_specs=spec(rows, tokens, None),
    check_vma=False,
  )(features, index)


def _take(features: jax.Array, index: jax.Array) -> jax.Array:
  shards, (R, S) = features.shape[0], index.shape
  flat = index.reshape(shards, R // shards * S)
  placed = jax.vmap(lambda pool, i: jnp.take(pool, i, axis=0, mode="clip"))(features, flat)
  return placed.reshape(R, S, features.shape[-1])
