"""Grouped matmul on TPUs by JAX's Pallas kernels, which visit the tiles of rows that a group has and no others.

(The TPU compiler's own `ragged_dot` is left alone there: for some widths it ends the process in a failed check.)

Letters: M rows, K width in, N width out, G groups.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int

_ROWS = (256, 128)
"""Rows of a tile, the preferred first; a tile at the border of two groups is computed for both."""

_WIDTHS = (1024, 896, 768, 640, 512)
"""Widths of a tile: the one is taken that fills whole tiles best."""


def product(
  rows: Float[Array, "M K"],
  matrices: Float[Array, "G K N"],
  sizes: Int[Array, " G"],
  *,
  interpret: bool = False,
) -> Float[Array, "M N"]:
  """`grouped_matmul` by kernels for TPUs; rows after the last group are zeros."""
  tile = next((size for size in _ROWS if rows.shape[0] % size == 0), _ROWS[-1])
  padded = jnp.pad(rows, ((0, -rows.shape[0] % tile), (0, 0)))
  out = _product(padded, matrices, sizes.astype(jnp.int32), tile, interpret)
  return out[: rows.shape[0]]


interpreted = functools.partial(product, interpret=True)
"""`product` by Pallas' interpreter."""


def _plain(rows: jax.Array, matrices: jax.Array, sizes: jax.Array, tile: int, interpret: bool) -> jax.Array:
  return _by_row(rows, matrices, sizes, tile, interpret, transposed=False)


def _forward(rows: jax.Array, matrices: jax.Array, sizes: jax.Array, tile: int, interpret: bool):
  return _plain(rows, matrices, sizes, tile, interpret), (rows, matrices, sizes)


def _backward(tile: int, interpret: bool, saved: Any, g: jax.Array):
  rows, matrices, sizes = saved
  by_row = _by_row(g, matrices, sizes, tile, interpret, transposed=True)
  tiling = (tile, _width(rows.shape[1]), _width(g.shape[1]))
  by_matrix = tgmm(rows.T, g, sizes, matrices.dtype, tiling, interpret=interpret)
  return by_row, by_matrix, None


_product = jax.custom_vjp(_plain, nondiff_argnums=(3, 4))
_product.defvjp(_forward, _backward)


def _by_row(
  rows: jax.Array, matrices: jax.Array, sizes: jax.Array, tile: int, interpret: bool, *, transposed: bool
) -> jax.Array:
  """Each row's product with its group's matrix, or with that transposed; zeros after the last group."""
  width = matrices.shape[1 if transposed else 2]
  tiling = (tile, _width(rows.shape[1]), _width(width))
  out = gmm(rows, matrices, sizes, rows.dtype, tiling, transpose_rhs=transposed, interpret=interpret)
  # The kernel leaves them as it found them in memory.
  belongs = jnp.arange(rows.shape[0]) < jnp.sum(sizes)
  return jnp.where(belongs[:, None], out, 0)


def _width(size: int) -> int:
  """The width of a tile along an axis of that size: whole, or in as little waste as can be."""
  if size <= _WIDTHS[0]:
    return size
  return min(_WIDTHS, key=lambda width: -(-size // width) * width)
