"""Attention on TPUs by the splash kernels of JAX's Pallas.

No score ever leaves the chip, and blocks of scores that a mask hides whole are skipped.

Letters: B rows, T queries, S keys, N query heads, K key-value heads, H head width.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from internvl_jax.models.attention import head_axes
from internvl_jax.parallel.rules import ACTIVATIONS, constrain, fit, mesh_in_scope, spec

_BLOCKS = (512, 384, 256, 128)
"""Queries and keys of a block, the preferred first; multiples of the 128 lanes of a TPU's vector unit."""

_WASTE = 1 / 8
"""Padding up to this share of a row is worth a larger block: 1025 patches become three blocks of 384."""

_PADDING = -1
"""Segment of what fills the last block: padded queries see padded keys, for each query must see some key."""


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  q_segments: jax.Array | None,
  kv_segments: jax.Array | None,
  causal: bool,
  window: jax.Array | int | None,
  windows: tuple[int, ...],
  sinks: jax.Array | None,
  over: Literal["rows", "tiles"],
  interpret: bool = False,
) -> jax.Array:
  """`models.attention.attention` of q [B, T, N, H], k and v [B, S, K, H].

  A kernel is made for one window: where `window` is an array, `windows` are the values that it may have.

  Raises:
    ValueError: an array as the window without its values.
  """
  T, S = q.shape[1], k.shape[1]
  mesh = mesh_in_scope()
  # Held by token until here, as in `models.attention`, so that what travels is of the compute dtype.
  q, k, v = (constrain(x, over, "tokens", "heads", None) for x in (q, k, v))
  queries = () if mesh is None else _query_axes(q, k, over, mesh)
  shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in queries)
  block_q, block_kv = _block(T, shards), _block(S)
  q, q_segments = _pad(q, q_segments, block_q * shards)
  (k, kv_segments), (v, _) = _pad(k, kv_segments, block_kv), _pad(v, None, block_kv)
  if q_segments is None and kv_segments is not None:
    q_segments = jnp.zeros(q.shape[:2], jnp.int32)
  if kv_segments is None and q_segments is not None:
    kv_segments = jnp.zeros(k.shape[:2], jnp.int32)
  choices, index = _choices(window if causal else None, windows)
  made = [
    _kernel(q.shape[1], k.shape[1], causal, choice, shards, block_q, block_kv, interpret)
    for choice in choices
  ]
  arrays = ((q / math.sqrt(q.shape[-1])).astype(q.dtype), k, v, q_segments, kv_segments, sinks, index)
  attend = _on_device if mesh is None else functools.partial(_spread, mesh, queries, over)
  return attend(made, *arrays)[:, :T]


def _choices(
  window: jax.Array | int | None, windows: tuple[int, ...]
) -> tuple[tuple[int | None, ...], jax.Array | None]:
  """The windows to make kernels for, and which of them it is, if that is not known."""
  if window is None or isinstance(window, int):
    return (window,), None
  if not windows:
    raise ValueError("splash attention needs the values that a window may have: use backend 'xla'")
  return windows, jnp.searchsorted(jnp.array(windows), window)


def _block(length: int, shards: int = 1) -> int:
  """The largest block whose padding of so many tokens on each of the shards is small."""

  def padded(block: int) -> int:
    return math.ceil(length / (block * shards)) * block * shards

  return next((block for block in _BLOCKS if padded(block) <= (1 + _WASTE) * length), _BLOCKS[-1])


def _pad(x: jax.Array, segments: jax.Array | None, multiple: int) -> tuple[jax.Array, jax.Array | None]:
  """Fills x [B, T, ...] and its segments [B, T] up to a multiple; makes segments where padding needs them."""
  pad = -x.shape[1] % multiple
  if pad:
    segments = jnp.zeros(x.shape[:2], jnp.int32) if segments is None else segments
    segments = jnp.pad(segments, ((0, 0), (0, pad)), constant_values=_PADDING)
    x = jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0)))
  return x, segments


@functools.lru_cache
def _kernel(
  T: int, S: int, causal: bool, window: int | None, shards: int, block_q: int, block_kv: int, interpret: bool
) -> kernels.SplashAttentionKernel:
  """The kernel of a mask, the same for all heads, for queries split over so many shards."""
  if not causal:
    mask: masks.Mask = masks.FullMask((T, S))
  elif window is None or window >= S:
    mask = masks.CausalMask((T, S), shard_count=shards)
  else:
    mask = masks.LocalMask((T, S), window_size=(window - 1, 0), offset=0, shard_count=shards)
  sizes = kernels.BlockSizes(
    block_q=block_q,
    block_kv=block_kv,
    block_q_dkv=block_q,
    block_kv_dkv=block_kv,
    block_q_dq=block_q,
    block_kv_dq=block_kv,
  )
  # Outside of what is being traced: the blocks of a long row's mask take seconds to list, so they are kept.
  with jax.ensure_compile_time_eval():
    return kernels.make_splash_mha(
      masks.MultiHeadMask([mask]),
      block_sizes=sizes,
      head_shards=1,
      q_seq_shards=shards,
      interpret=interpret,
    )


def _query_axes(q: jax.Array, k: jax.Array, over: str, mesh: AbstractMesh) -> tuple[str, ...]:
  """Mesh axes that queries are split over, beside heads."""
  (B, T, N, _), K = q.shape, k.shape[2]
  rows = fit(ACTIVATIONS[over], B, mesh)
  heads, _ = head_axes(N, K, rows, mesh)
  return fit(ACTIVATIONS["tokens"], T, mesh, used=(*rows, *heads))


def _spread(mesh, queries, over, made, q, k, v, q_segments, kv_segments, sinks, index) -> jax.Array:
  """`_on_device` on the devices of a mesh: heads and queries are split as in `models.attention`."""
  B, _, N, _ = q.shape
  rows = fit(ACTIVATIONS[over], B, mesh)
  heads, repeats = head_axes(N, k.shape[2], rows, mesh)
  k, v = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (k, v))
  places = NamedSharding(mesh, PartitionSpec(None, *spec(queries)))
  spread_q, spread_kv = spec(rows, queries, heads), spec(rows, None, heads)
  return jax.shard_map(
    _on_device,
    # A kernel holds the list of its blocks, of which each device gets those of its queries.
    in_specs=(
      [kernel.manual_sharding_spec(places) for kernel in made],
      *(spread_q, spread_kv, spread_kv),
      *(spec(rows, queries), spec(rows), spec(heads), spec()),
    ),
    out_specs=spread_q,
    check_vma=False,
  )(made, q, k, v, q_segments, kv_segments, sinks, index)


def _on_device(made, q, k, v, q_segments, kv_segments, sinks, index) -> jax.Array:
  """Attention by the kernel `made[index]`, row by row."""
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))

  def by(kernel):
    def row(q, k, v, q_segments, kv_segments):
      segments = None if q_segments is None else kernels.SegmentIds(q_segments, kv_segments)
      return kernel(q, k, v, segments, sinks)

    return jax.vmap(row)

  rows = (q, k, v, q_segments, kv_segments)
  if index is None:
    return by(made[0])(*rows).swapaxes(1, 2)
  return jax.lax.switch(index, [by(kernel) for kernel in made], *rows).swapaxes(1, 2)
