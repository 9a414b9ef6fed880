"""Flash attention for NVIDIA cards: what is around the kernels of `triton_kernels`, whose letters these are."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from internvl_jax.models.attention import triton_kernels as kernels
from internvl_jax.models.attention.mask import Mask
from internvl_jax.models.attention.sharding import Over, shard_attention
from internvl_jax.models.attention.triton_kernels import Shape, Spans, Tokens


def attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  mask: Mask,
  sinks: Float[Array, " N"] | None,
  over: Over,
  *,
  interpret: bool = False,
) -> Float[Array, "B T N H"]:
  """`models.attention.attention` of q [B, T, N, H], k and v [B, S, K, H]."""
  return shard_attention(functools.partial(_on_device, interpret), q, k, v, mask, sinks, over)


interpreted = functools.partial(attention, interpret=True)
"""`attention` by Pallas' interpreter."""


class _Tiling(NamedTuple):
  """How a kernel is cut.

  Attributes:
    TB, SB: queries and keys of a block.
    warps: of a program.
    stages: how many blocks of the other side are on their way or in use.
  """

  TB: int
  SB: int
  warps: int
  stages: int


class _Tilings(NamedTuple):
  forward: _Tiling
  q: _Tiling
  kv: _Tiling


# By element size and head width: found by compiling for compute capability 8.0, 8.9, 9.0 and 10.0, as the largest whose
# programs keep all in registers and in the 99 KiB of shared memory that the smallest of these cards have (but for the
# ViT of 6B on cards before Hopper, whose programs spill some). 64 rows and more in the first operand let Hopper's cards
# use their widest products.
_TILINGS: dict[tuple[int, int], _Tilings] = {
  (2, 64): _Tilings(_Tiling(128, 64, 8, 3), _Tiling(128, 64, 8, 2), _Tiling(64, 128, 8, 2)),
  (2, 128): _Tilings(_Tiling(128, 64, 8, 2), _Tiling(64, 64, 4, 2), _Tiling(64, 64, 8, 2)),
  (4, 64): _Tilings(_Tiling(64, 32, 4, 2), _Tiling(32, 32, 4, 2), _Tiling(32, 32, 4, 2)),
  (4, 128): _Tilings(_Tiling(32, 16, 4, 2), _Tiling(32, 32, 8, 2), _Tiling(32, 32, 8, 2)),
}


# What one kernel writes of whole blocks, the others read by theirs.
assert all(x.forward.TB % side.TB == 0 for x in _TILINGS.values() for side in (x.q, x.kv))


def _tilings(dtype: jnp.dtype, H: int) -> _Tilings:
  return _TILINGS[4 if dtype == jnp.float32 else 2, 64 if H <= 64 else 128]


# --- What the mask says -------------------------------------------------------------------------------------


class _Known(NamedTuple):
  """What the kernels are told of the mask.

  Attributes:
    q, k: of queries and keys, filled up to whole blocks.
    window: int32 [1], or None.
  """

  q: Tokens
  k: Tokens
  window: jax.Array | None


# Numbers of segments that no token has: what fills the last block, and who sees no other's prompt.
_NO_QUERY, _NO_KEY, _SEES_NONE, _SHARES_NONE = -1, -2, -3, -4


def _known(mask: Mask, T: int, S: int) -> _Known:
  """The mask as int32 arrays for T queries and S keys, whole blocks of any tiling."""

  def fill(x: Any, length: int, value: int):
    pad = [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])]
    return jnp.pad(x.astype(jnp.int32), pad, constant_values=value)

  segment = kv_segment = q_prompt = kv_prompt = index = None
  if mask.segments is not None and mask.kv_segments is not None:
    rising = mask.rising()
    segment, kv_segment = fill(rising.segments, T, _NO_QUERY), fill(rising.kv_segments, S, _NO_KEY)
  if mask.parent is not None and mask.kv_parent is not None:
    q_prompt = fill(jnp.where(mask.answer_number > 0, mask.parent, _SEES_NONE), T, _SEES_NONE)
    kv_prompt = fill(jnp.where(mask.is_prompt, mask.kv_parent, _SHARES_NONE), S, _SHARES_NONE)
  if mask.q_index is not None:
    index = fill(mask.q_index, T, 0)
  window = None if mask.reach is None else jnp.asarray(mask.reach, jnp.int32).reshape(1)
  return _Known(Tokens(segment, q_prompt, index), Tokens(kv_segment, kv_prompt, None), window)


def _meetings(known: _Known, shape: Shape) -> tuple[jax.Array, jax.Array]:
  """Bool [B or 1, I, J]: the pairs of blocks of which something may be visible, and those of which all is."""
  I, J = -(-shape.T // shape.TB), -(-shape.S // shape.SB)
  first_key = jnp.arange(J) * shape.SB
  last_key = first_key + shape.SB - 1
  some = jnp.ones((1, I, J), bool)
  # The end of the last block is hidden.
  every = some & (last_key < shape.S)
  if known.q.segment is not None:
    (q_low, q_high), (k_low, k_high) = (
      _range(known.q.segment, I, shape.TB),
      _range(known.k.segment, J, shape.SB),
    )
    q_low, q_high, k_low, k_high = q_low[..., None], q_high[..., None], k_low[:, None], k_high[:, None]
    meet = (q_low <= k_high) & (k_low <= q_high)
    every &= (q_low == q_high) & (k_low == k_high) & meet
    if known.q.prompt is not None:
      (q_low, q_high), (k_low, k_high) = (
        _range(known.q.prompt, I, shape.TB),
        _range(known.k.prompt, J, shape.SB),
      )
      meet |= (q_low[..., None] <= k_high[:, None]) & (k_low[:, None] <= q_high[..., None])
    some &= meet
  if shape.causal:
    places = jnp.arange(I * shape.TB) if known.q.index is None else known.q.index[: I * shape.TB]
    places = jnp.where(jnp.arange(I * shape.TB) < shape.T, places, places[shape.T - 1]).reshape(I, shape.TB)
    first, last = (reduce(places, axis=1)[:, None] for reduce in (jnp.min, jnp.max))
    some, every = some & (last >= first_key), every & (first >= last_key)
    if known.window is not None:
      some, every = some & (first - last_key < known.window), every & (last - first_key < known.window)
  return some, every


def _range(ids: jax.Array, blocks: int, size: int) -> tuple[jax.Array, jax.Array]:
  """The lowest and highest number of each block of ids [B, L], those that stand for nothing apart."""
  ids = ids[:, : blocks * size].reshape(ids.shape[0], blocks, size)
  low = jnp.min(jnp.where(ids >= 0, ids, jnp.iinfo(jnp.int32).max), axis=-1)
  return low, jnp.max(ids, axis=-1, where=ids >= 0, initial=-1)


def _spans(some: jax.Array, every: jax.Array) -> Spans:
  """The `Spans` of blocks by rows of [B or 1, blocks, blocks of the other side]."""
  blocks = some.shape[-1]
  place = jnp.arange(blocks, dtype=jnp.int32)
  first = jnp.min(jnp.where(some, place, blocks), axis=-1)
  last = jnp.max(jnp.where(some, place + 1, 0), axis=-1)
  first = jnp.minimum(first, last)
  whole = jnp.min(jnp.where(every, place, blocks), axis=-1)
  # The run of whole blocks that begins there.
  until = jnp.min(jnp.where(~every & (place >= whole[..., None]), place, blocks), axis=-1)
  none = whole == blocks
  return Spans(first, jnp.where(none, first, whole), jnp.where(none, first, until), last)


# --- The kernels' calls -------------------------------------------------------------------------------------


def _on_device(
  interpret: bool, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, sinks: jax.Array | None
) -> jax.Array:
  H, width = q.shape[3], max(16, pl.next_power_of_2(q.shape[3]))
  # Triton's blocks are powers of two wide; zeros add nothing to any product.
  q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - H))) if width > H else x for x in (q, k, v))
  # All lengths of blocks divide this.
  T, S = (-(-x.shape[1] // 128) * 128 for x in (q, k))
  known = _known(mask, T, S)
  how = _How(scale=kernels.LOG2_E / math.sqrt(H), causal=mask.causal, interpret=interpret)
  out: Any = _flash(q, k, v, sinks, known, how)
  return out[..., :H]


class _How(NamedTuple):
  """What does not depend on arrays; see `Shape`."""

  scale: float
  causal: bool
  interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _flash(
  q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, known: _Known, how: _How
) -> jax.Array:
  return _forward(q, k, v, sinks, known, how)[0]


def _shape(q: jax.Array, k: jax.Array, how: _How, tiling: _Tiling) -> Shape:
  (_, T, N, H), (_, S, K, _) = q.shape, k.shape
  return Shape(T=T, S=S, G=N // K, H=H, TB=tiling.TB, SB=tiling.SB, scale=how.scale, causal=how.causal)


def _call(
  kernel: Callable[..., None],
  name: str,
  shape: Shape,
  tiling: _Tiling,
  grid: tuple[int, ...],
  out: Any,
  interpret: bool,
):
  """A kernel that is given whole arrays."""
  return pl.pallas_call(
    functools.partial(kernel, shape=shape),
    grid=grid,
    out_shape=out,
    compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
    interpret=interpret,
    # Plans count operations by this name.
    name=f"{name}_causal" if shape.causal else name,
  )


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, known: _Known, how: _How):
  (B, T, N, _), tiling = q.shape, _tilings(q.dtype, q.shape[3]).forward
  shape = _shape(q, k, how, tiling)
  spans = _spans(*_meetings(known, shape))
  out = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, -(-T // 128) * 128), jnp.float32)
  call = _call(
    kernels.forward, "attention_fwd", shape, tiling, (-(-T // tiling.TB), N, B), out, how.interpret
  )
  out, log = call(q, k, v, None if sinks is None else sinks.astype(jnp.float32), *known, spans)
  return out, (q, k, v, sinks, known, out, log)


def _backward(how: _How, saved: Any, g: jax.Array):
  q, k, v, sinks, known, out, log = saved
  (B, T, N, _), (S, K), tilings = q.shape, k.shape[1:3], _tilings(q.dtype, q.shape[3])
  # What the gradients of a query's weights have in common (arXiv:2307.08691, section 2.3.2).
  inner = jnp.einsum("btnh,btnh->bnt", g, out, preferred_element_type=jnp.float32)
  inner = jnp.pad(inner, ((0, 0), (0, 0), (0, log.shape[2] - T)))
  arrays = (q, k, v, g, log, inner, *known)

  shape = _shape(q, k, how, tilings.q)
  call = _call(
    *(kernels.backward_q, "attention_dq", shape, tilings.q, (-(-T // shape.TB), N, B)),
    *(jax.ShapeDtypeStruct(q.shape, q.dtype), how.interpret),
  )
  dq = call(*arrays, _spans(*_meetings(known, shape)))

  shape = _shape(q, k, how, tilings.kv)
  call = _call(
    *(kernels.backward_kv, "attention_dkv", shape, tilings.kv, (-(-S // shape.SB), K, B)),
    *((jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)), how.interpret),
  )
  dk, dv = call(*arrays, _spans(*(pairs.swapaxes(1, 2) for pairs in _meetings(known, shape))))

  dsinks = None
  if sinks is not None:
    # Behind the last block, no program has written into `log`.
    share = jnp.exp2(sinks.astype(jnp.float32)[:, None] * kernels.LOG2_E - log[..., :T])
    dsinks = -jnp.sum(share * inner[..., :T], axis=(0, 2)).astype(sinks.dtype)
  return dq, dk, dv, dsinks, None


_flash.defvjp(_forward, _backward)
