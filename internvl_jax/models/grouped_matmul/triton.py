"""Grouped matmul on NVIDIA cards by Triton kernels, written in Pallas: forward and both gradients.

Rows are cut into slots, tiles of one group's rows that begin where the group does, so that no tile has rows of two
groups. How many slots a group has is known on the device only; the grid has as many as any sizes can need, and those
that are not needed end at once. The gradient of a group's matrix sums over as many tiles as the group has rows for.

Letters: M rows, K width in, N width out, G groups, S slots.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
  """What one program computes, and by how many threads.

  Attributes:
    rows, inner, out: lengths of its block along M, along the other width of the rows, and along the width out.
    warps: groups of 32 threads.
    stages: steps whose operands lie in shared memory at once, one in use and the others on their way.
  """

  rows: int
  inner: int
  out: int
  warps: int
  stages: int


_BY_ROW = {
  2: Tile(rows=128, inner=64, out=128, warps=8, stages=3),
  4: Tile(rows=64, inner=32, out=64, warps=4, stages=3),
}
"""Tiles of a product [rows, out] that is summed over `inner`, by bytes of a number."""

_BY_MATRIX = {
  2: Tile(rows=64, inner=128, out=128, warps=8, stages=3),
  4: Tile(rows=32, inner=64, out=64, warps=4, stages=3),
}
"""Tiles of a matrix's gradient [inner, out] that is summed over `rows`, by bytes of a number."""

# Chosen by reasoning and by what the compiler says of them, not timed. For two bytes: each number that is loaded is used
# 128 times; 8 warps hold the float32 sums in 64 registers a thread, of 96 in all on a Hopper and 173 at most on an A100,
# and none spills to memory; steps of 64 fill the 128 bytes of a line. Three stages take 96 KiB of shared memory on
# Hopper and Blackwell, of 227, so that two programs run at once, and 64 KiB on cards before and on those for desks,
# whose smallest have 99. Four bytes in full precision are multiplied without tensor cores, by operands in registers:
# smaller.

_LEAST = 16
"""The shortest side of a block that tensor cores multiply."""

_BAND = 8
"""Slots whose programs run side by side for each tile of the width out: those of one group share its matrix, and come
back to their rows while these are in the L2 cache."""


def product(
  rows: Float[Array, "M K"],
  matrices: Float[Array, "G K N"],
  sizes: Int[Array, " G"],
  *,
  interpret: bool = False,
) -> Float[Array, "M N"]:
  """`grouped_matmul` by kernels for GPUs; rows after the last group are zeros.

  Sums are float32. Float32 operands are multiplied as `jax_default_matmul_precision` says: "highest" in full, and
  rounded to TF32 where nothing is said.
  """
  assert rows.dtype == matrices.dtype, (rows.dtype, matrices.dtype)
  return _product(rows, matrices, sizes.astype(jnp.int32), interpret)


interpreted = functools.partial(product, interpret=True)
"""`product` by Pallas' interpreter."""


def _plain(rows: jax.Array, matrices: jax.Array, sizes: jax.Array, interpret: bool) -> jax.Array:
  return _by_row(rows, matrices, sizes, interpret, transposed=False)


def _forward(rows: jax.Array, matrices: jax.Array, sizes: jax.Array, interpret: bool):
  return _plain(rows, matrices, sizes, interpret), (rows, matrices, sizes)


def _backward(interpret: bool, saved: Any, g: jax.Array):
  rows, matrices, sizes = saved
  by_row = _by_row(g, matrices, sizes, interpret, transposed=True)
  return by_row, _by_matrix(rows, g, sizes, interpret), None


_product = jax.custom_vjp(_plain, nondiff_argnums=(3,))
_product.defvjp(_forward, _backward)


# --- Each row's product with its group's matrix -------------------------------------------------------------


class Slots(NamedTuple):
  """Tiles of rows, int32 [S] each: its group, G for rows after the last; its first row; the row where its group ends.

  A slot that is not needed begins where its group ends.
  """

  group: jax.Array
  first: jax.Array
  end: jax.Array


def count_slots(rows: int, groups: int, height: int) -> int:
  """How many tiles of `height` rows any sizes of the groups can need, in whole bands.

  Rows after the last group are a group more. Each group has at most height - 1 rows too few for whole tiles.
  """
  most = min(rows, (rows + (groups + 1) * (height - 1)) // height)
  return -(-most // _BAND) * _BAND


def cut(sizes: Int[Array, " G"], rows: int, height: int) -> Slots:
  """Cuts rows into tiles of one group each.

  Args:
    sizes: int32 [G], rows of each group.
    rows: M.
    height: rows of a tile.
  """
  sizes = jnp.append(sizes, rows - jnp.sum(sizes))
  tiles = (sizes + height - 1) // height
  tiles_before, ends = jnp.cumsum(tiles) - tiles, jnp.cumsum(sizes)
  slot = jnp.arange(count_slots(rows, len(sizes) - 1, height), dtype=jnp.int32)
  group = jnp.searchsorted(jnp.cumsum(tiles), slot, side="right", method="compare_all").astype(jnp.int32)
  group = jnp.minimum(group, len(sizes) - 1)
  end = ends[group]
  first = (ends - sizes)[group] + (slot - tiles_before[group]) * height
  return Slots(group, jnp.minimum(first, end), end)


def _by_row(
  rows: jax.Array, matrices: jax.Array, sizes: jax.Array, interpret: bool, *, transposed: bool
) -> jax.Array:
  """[M, N]: each row's product with its group's matrix [K, N], or with its transpose where that is [N, K]."""
  M, K = rows.shape
  G, N = matrices.shape[0], matrices.shape[1 if transposed else 2]
  tile = _BY_ROW[rows.dtype.itemsize]
  tile = dataclasses.replace(
    tile,
    # Tiles that few groups fill would be computed for nothing.
    rows=_side(tile.rows, M // G),
    inner=_side(tile.inner, K),
    out=_side(tile.out, N),
  )
  slots = cut(sizes, M, tile.rows)
  out = jax.ShapeDtypeStruct((M, N), rows.dtype)
  return pl.pallas_call(
    functools.partial(_by_row_kernel, tile=tile, transposed=transposed),
    out_shape=out,
    grid=(_BAND, pl.cdiv(N, tile.out), len(slots.group) // _BAND),
    compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
    cost_estimate=_cost(M * K * N, rows, matrices, out),
    interpret=interpret,
    name="grouped_matmul",
  )(*slots, rows, matrices)


def _by_row_kernel(
  group_ref: Any,
  first_ref: Any,
  end_ref: Any,
  rows_ref: Any,
  matrices_ref: Any,
  out_ref: Any,
  *,
  tile: Tile,
  transposed: bool,
):
  K, N = rows_ref.shape[1], out_ref.shape[1]
  slot = pl.program_id(2) * _BAND + pl.program_id(0)
  group, first, end = group_ref[slot], first_ref[slot], end_ref[slot]
  rows, columns = pl.ds(first, tile.rows), pl.ds(pl.program_id(1) * tile.out, tile.out)
  row_mask, column_mask = _below(rows, end), _inside(columns, N)

  def step(i: jax.Array, total: jax.Array):
    inner = pl.ds(i * tile.inner, tile.inner)
    inner_mask = _inside(inner, K)
    a = _load(rows_ref.at[rows, inner], row_mask, inner_mask)
    if transposed:
      b = _load(matrices_ref.at[group, columns, inner], column_mask, inner_mask)
    else:
      b = _load(matrices_ref.at[group, inner, columns], inner_mask, column_mask)
    return total + _dot(a, b, over=(1, 1 if transposed else 0))

  @pl.when(first < end)
  def _():
    # Rows after the last group have no matrix: zeros. (A choice of two constants is one that Pallas gets wrong.)
    steps = (group < matrices_ref.shape[0]).astype(jnp.int32) * pl.cdiv(K, tile.inner)
    total = jax.lax.fori_loop(0, steps, step, jnp.zeros((tile.rows, tile.out), jnp.float32))
    mask = _both(row_mask, column_mask)
    plgpu.store(out_ref.at[rows, columns], total.astype(out_ref.dtype), mask=mask)


# --- Each matrix's gradient ---------------------------------------------------------------------------------


def _by_matrix(rows: jax.Array, cotangents: jax.Array, sizes: jax.Array, interpret: bool) -> jax.Array:
  """[G, K, N]: of each group, the sum over its rows of a row [K] times its cotangent [N]."""
  (M, K), N, G = rows.shape, cotangents.shape[1], len(sizes)
  tile = _BY_MATRIX[rows.dtype.itemsize]
  tile = dataclasses.replace(
    tile, rows=_side(tile.rows, M // G), inner=_side(tile.inner, K), out=_side(tile.out, N)
  )
  ends, out = jnp.cumsum(sizes), jax.ShapeDtypeStruct((G, K, N), rows.dtype)
  return pl.pallas_call(
    functools.partial(_by_matrix_kernel, tile=tile),
    out_shape=out,
    grid=(pl.cdiv(N, tile.out), pl.cdiv(K, tile.inner), G),
    compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
    cost_estimate=_cost(M * K * N, rows, cotangents, out),
    interpret=interpret,
    name="grouped_matmul_dw",
  )(ends - sizes, ends, rows, cotangents)


def _by_matrix_kernel(
  start_ref: Any, end_ref: Any, rows_ref: Any, cotangents_ref: Any, out_ref: Any, *, tile: Tile
):
  group = pl.program_id(2)
  start, end = start_ref[group], end_ref[group]
  inner, columns = (
    pl.ds(pl.program_id(1) * tile.inner, tile.inner),
    pl.ds(pl.program_id(0) * tile.out, tile.out),
  )
  inner_mask, column_mask = _inside(inner, rows_ref.shape[1]), _inside(columns, cotangents_ref.shape[1])

  def step(i: jax.Array, total: jax.Array):
    rows = pl.ds(start + i * tile.rows, tile.rows)
    row_mask = _below(rows, end)
    a = _load(rows_ref.at[rows, inner], row_mask, inner_mask)
    b = _load(cotangents_ref.at[rows, columns], row_mask, column_mask)
    return total + _dot(a, b, over=(0, 0))

  steps = jax.lax.div(end - start + tile.rows - 1, tile.rows)
  total = jax.lax.fori_loop(0, steps, step, jnp.zeros((tile.inner, tile.out), jnp.float32))
  mask = _both(inner_mask, column_mask)
  plgpu.store(out_ref.at[group, inner, columns], total.astype(out_ref.dtype), mask=mask)


# --- Parts of both ------------------------------------------------------------------------------------------


def _side(most: int, length: int) -> int:
  """The side of a block along an axis of that length: a power of two, as Triton asks."""
  return min(most, max(_LEAST, pl.next_power_of_2(max(1, length))))


def _below(indices: Any, end: jax.Array | int) -> jax.Array:
  """Bool [size]: the indices before the end."""
  return indices.start + jnp.arange(indices.size) < end


def _inside(indices: Any, length: int) -> jax.Array | None:
  """`_below`, or None where blocks fill the axis: masks that hide nothing would be computed in every step."""
  return None if length % indices.size == 0 else _below(indices, length)


def _both(first: jax.Array | None, second: jax.Array | None) -> jax.Array | None:
  """The mask [A, B] of masks [A] and [B], of which None hides nothing."""
  masks = [
    m
    for m in (None if first is None else first[:, None], None if second is None else second[None])
    if m is not None
  ]
  return functools.reduce(jnp.logical_and, masks) if masks else None


def _load(ref: Any, first: jax.Array | None, second: jax.Array | None) -> jax.Array:
  """A block, with zeros where a mask along one of its axes is False."""
  mask = _both(first, second)
  return plgpu.load(ref, mask=mask, other=None if mask is None else 0.0)


def _dot(a: jax.Array, b: jax.Array, *, over: tuple[int, int]) -> jax.Array:
  """The product of two blocks in float32, summed over these axes."""
  dimensions = (((over[0],), (over[1],)), ((), ()))
  return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _cost(products: int, *arrays: jax.Array | jax.ShapeDtypeStruct) -> pl.CostEstimate:
  """What readers of the program cannot see in it: every row meets one matrix; each array is moved once."""
  moved = sum(array.size * array.dtype.itemsize for array in arrays)
  return pl.CostEstimate(flops=2 * products, bytes_accessed=moved, transcendentals=0)
