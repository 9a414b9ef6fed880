"""Attention on TPUs by the splash kernels of JAX's Pallas.

No score ever leaves the chip, and blocks of scores that a mask hides whole are skipped.

Letters: B rows, T queries, S keys, N query heads, K key-value heads, H head width.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from internvl_jax.models.attention.mask import Mask
from internvl_jax.models.attention.sharding import Layout, Over, by_token
from internvl_jax.parallel.rules import mesh_in_scope, spec

_BLOCKS = (512, 384, 256, 128)
"""Queries and keys of a block, the preferred first; multiples of the 128 lanes of a TPU's vector unit."""

_WASTE = 1 / 8
"""Padding up to this share of a row is worth a larger block: 1025 patches become three blocks of 384."""

_PADDING = -1
"""Segment of what fills the last block: padded queries see padded keys, for each query must see some key."""


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
  T, S = q.shape[1], k.shape[1]
  mesh = mesh_in_scope()
  q, k, v = (by_token(x, over) for x in (q, k, v))
  layout = None if mesh is None else Layout.of(q, k, over, mesh)
  shards = 1 if mesh is None or layout is None else math.prod(mesh.shape[axis] for axis in layout.queries)
  block_q, block_kv = _block(T, shards), _block(S)
  q, q_segments = _pad(q, mask.segments, block_q * shards)
  (k, kv_segments), (v, _) = _pad(k, mask.kv_segments, block_kv), _pad(v, None, block_kv)
  if q_segments is None and kv_segments is not None:
    q_segments = jnp.zeros(q.shape[:2], jnp.int32)
  if kv_segments is None and q_segments is not None:
    kv_segments = jnp.zeros(k.shape[:2], jnp.int32)
  made = [
    _kernel(
      (q.shape[1], k.shape[1]),
      (block_q, block_kv),
      causal=mask.causal,
      window=window,
      shards=shards,
      interpret=interpret,
    )
    for window in (mask.windows if mask.causal else ()) or (None,)
  ]
  # A kernel is made for one window.
  index = None if mask.window is None else jnp.searchsorted(jnp.array(mask.windows), mask.window)
  scaled = (q / math.sqrt(q.shape[-1])).astype(q.dtype)
  arrays = (scaled, k, v, (q_segments, kv_segments), sinks, index)
  attend = _on_device if mesh is None or layout is None else functools.partial(_sharded, mesh, layout)
  return attend(made, *arrays)[:, :T]


interpreted = functools.partial(attention, interpret=True)
"""`attention` by Pallas' interpreter."""


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
  lengths: tuple[int, int],
  blocks: tuple[int, int],
  *,
  causal: bool,
  window: int | None,
  shards: int,
  interpret: bool,
) -> kernels.SplashAttentionKernel:
  """The kernel of a mask, the same for all heads, for queries split over so many shards.

  Args:
    lengths: queries and keys of a row.
    blocks: queries and keys of a block.
    causal, window: see `Mask`.
    shards: of the queries.
    interpret: by Pallas' interpreter.
  """
  (T, S), (block_q, block_kv) = lengths, blocks
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


def _sharded(
  mesh: AbstractMesh, layout: Layout, made: Any, q: jax.Array, k: jax.Array, v: jax.Array, *others: Any
) -> jax.Array:
  """`_on_device` on the devices of a mesh."""
  segments = (spec(layout.rows, layout.queries), spec(layout.rows))
  places = NamedSharding(mesh, PartitionSpec(None, *spec(layout.queries)))
  return jax.shard_map(
    _on_device,
    # A kernel holds the list of its blocks, of which each device gets those of its queries.
    in_specs=(
      [kernel.manual_sharding_spec(places) for kernel in made],
      *(layout.q_spec, layout.kv_spec, layout.kv_spec),
      *(segments, spec(layout.heads), spec()),
    ),
    out_specs=layout.q_spec,
    check_vma=False,
  )(made, q, layout.repeat(k), layout.repeat(v), *others)


def _on_device(
  made: Any,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segments: Any,
  sinks: jax.Array | None,
  index: jax.Array | None,
) -> jax.Array:
  """Attention by the kernel `made[index]`, row by row; segments are those of the queries and of the keys."""
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))

  def by(kernel: Any):
    def row(q: jax.Array, k: jax.Array, v: jax.Array, q_segments: Any, kv_segments: Any):
      segments = None if q_segments is None else kernels.SegmentIds(q_segments, kv_segments)
      return kernel(q, k, v, segments, sinks)

    return jax.vmap(row)

  rows = (q, k, v, *segments)
  if index is None:
    return by(made[0])(*rows).swapaxes(1, 2)
  return jax.lax.switch(index, [by(kernel) for kernel in made], *rows).swapaxes(1, 2)
