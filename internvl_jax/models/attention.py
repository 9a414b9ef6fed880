"""Attention: one signature, several backends.

Letters: B rows, T queries, S keys, N query heads, K key-value heads, G = N/K, H head width.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from internvl_jax.parallel.rules import ACTIVATIONS, MeshAxes, constrain, fit, mesh_in_scope, spec

QUERY_BLOCK = 512
"""Queries handled at once by the blockwise backend: its largest temporary is [B, N, QUERY_BLOCK, S]."""


BACKENDS = ("auto", "xla", "splash", "splash_interpret")
"""Names of backends. "auto" is "xla" to `attention`, and to `backend_for` what a platform does best;
"splash_interpret" is for tests: what "splash" computes, where there is no TPU."""


def backend_for(name: str, platform: str) -> str:
  """The backend that a run's setting means on a platform: "auto" takes what is made for it."""
  if name != "auto":
    return name
  return "splash" if platform == "tpu" else "xla"


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  kv_segment_ids: jax.Array | None = None,
  q_index: jax.Array | None = None,
  causal: bool,
  window: jax.Array | int | None = None,
  windows: tuple[int, ...] = (),
  sinks: jax.Array | None = None,
  over: Literal["rows", "tiles"] = "rows",
  backend: str = "auto",
) -> jax.Array:
  """Scaled dot-product attention with grouped heads; softmax in float32.

  A query sees the keys of its own segment and, when causal, those whose index along S is not above its own.
  A query that sees no key (padding) gets the mean of the values: finite, and never read.

  Args:
    q: [B, T, N, H]. k, v: [B, S, K, H] with N a multiple of K.
    segment_ids: int [B, T], the queries' segments; None is one segment.
    kv_segment_ids: int [B, S], the keys' segments; None takes `segment_ids`.
    q_index: int [T], the queries' index along S; None is 0..T-1. Only read when causal.
    causal: hide later keys.
    window: a query sees its own key and the window - 1 before it; None sees all. Only read when causal.
    windows: the values, rising, that `window` may have, where it is an array.
    sinks: [N] learned scores of a key without a value, one a head, that takes its share of the softmax
      (arXiv:2309.17453; gpt-oss).
    over: what B counts, which says how they are spread over a mesh (`parallel.rules.ACTIVATIONS`).
    backend: one of `BACKENDS`.

  Returns:
    [B, T, N, H] in the dtype of q.

  Raises:
    ValueError: an unknown backend, or one that cannot do what is asked.
  """
  if backend not in BACKENDS:
    raise ValueError(f"unknown attention backend {backend!r}: use one of {', '.join(BACKENDS)}")
  if kv_segment_ids is None:
    kv_segment_ids = segment_ids
  if backend.startswith("splash"):
    if q_index is not None:
      raise ValueError("splash attention takes queries from index 0 on: use backend 'xla' with a cache")
    # Imported late: others do not wait for Pallas.
    from internvl_jax.models import splash

    return splash.attention(
      *(q, k, v),
      q_segments=segment_ids,
      kv_segments=kv_segment_ids,
      causal=causal,
      window=window,
      windows=windows,
      sinks=sinks,
      over=over,
      interpret=backend == "splash_interpret",
    )
  arrays = (q, k, v, segment_ids, kv_segment_ids, q_index, window, sinks)
  if mesh_in_scope() is not None:
    return _spread(*arrays, causal, over)
  return _on_device(*arrays, causal)


def attention_over_shared(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  shared: jax.Array | None,
  segment_ids: jax.Array | None,
  **options,
) -> jax.Array:
  """`attention` over rows of which two segments may have their beginning in common.

  Segment 2p then stands behind segment 2p - 1, from p = 1, and sees besides itself those of its tokens that are
  shared. Equal segments are all that kernels can tell, so there are two attentions, one where what is shared belongs to
  the first segment and one where it belongs to the second; of the latter, the second segment's queries are taken.

  Args:
    q, k, v: see `attention`.
    shared: bool [B, T]; None for rows without any.
    segment_ids: int [B, T].
    **options: of `attention`. A window would count along the row, where what is shared is too far off.
  """
  apart = attention(q, k, v, segment_ids=segment_ids, **options)
  if shared is None:
    return apart
  assert segment_ids is not None
  together = attention(q, k, v, segment_ids=jnp.where(shared, segment_ids + 1, segment_ids), **options)
  is_second = (segment_ids > 0) & (segment_ids % 2 == 0)
  return jnp.where(is_second[..., None, None], together, apart)


def _spread(q, k, v, q_segments, kv_segments, q_index, window, sinks, causal, over) -> jax.Array:
  """Attention device by device: each has some heads of some rows, and all keys.

  Heads are split over as many axes of the mesh as divide them, for which tokens and heads change places between
  devices (arXiv:2309.14509). Over the rest, queries stay where their tokens are, and keys and values are
  collected.
  """
  mesh = mesh_in_scope()
  assert mesh is not None
  (B, T, N, _), K = q.shape, k.shape[2]
  rows = fit(ACTIVATIONS[over], B, mesh)
  heads, repeats = head_axes(N, K, rows, mesh)
  queries = fit(ACTIVATIONS["tokens"], T, mesh, used=(*rows, *heads))
  # Held by token until here: what makes them would else be computed after the exchange, which is then of float32.
  q = constrain(q, over, "tokens", "heads", None)
  # Those of a cache lie together.
  k, v = (constrain(x, over, "tokens" if q_index is None else None, "heads", None) for x in (k, v))
  k, v = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (k, v))
  q_index = jnp.arange(T) if q_index is None else q_index
  spread_q, spread_kv = spec(rows, queries, heads), spec(rows, None, heads)
  whole = spec()
  return jax.shard_map(
    functools.partial(_on_device, causal=causal),
    in_specs=(
      *(spread_q, spread_kv, spread_kv),
      *(spec(rows, queries), spec(rows), spec(queries)),
      *(whole, spec(heads)),
    ),
    out_specs=spread_q,
    check_vma=False,
  )(q, k, v, q_segments, kv_segments, q_index, window, sinks)


def head_axes(N: int, K: int, used: MeshAxes, mesh: AbstractMesh) -> tuple[MeshAxes, int]:
  """Mesh axes that split the heads, and how often keys and values are repeated so that they split alike."""
  axes = fit(ACTIVATIONS["attention_heads"], N, mesh, used)
  while N % math.lcm(K, math.prod(mesh.shape[axis] for axis in axes)):
    axes = axes[:-1]
  return axes, math.lcm(K, math.prod(mesh.shape[axis] for axis in axes)) // K


def _on_device(q, k, v, q_segments, kv_segments, q_index, window, sinks, causal) -> jax.Array:
  attend = _attend if q.shape[1] <= QUERY_BLOCK else _blockwise
  return attend(q, k, v, q_segments, kv_segments, q_index, causal, window, sinks)


def _attend(q, k, v, q_segments, kv_segments, q_index, causal, window, sinks) -> jax.Array:
  """Attention with all of its scores in memory."""
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  # Heads next to rows make each product a batch of plain matrices; XLA's CPU backend copies otherwise.
  q = (q / math.sqrt(H)).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
  scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32)
  q_index = jnp.arange(T) if q_index is None else q_index
  mask = _mask(q_segments, kv_segments, q_index, S, causal, window)
  if mask is not None:
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
  weights = _softmax(scores, sinks).astype(v.dtype)
  out = jnp.einsum("BKGTS,BKSH->BKGTH", weights, v)
  return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _softmax(scores: jax.Array, sinks: jax.Array | None) -> jax.Array:
  """Softmax of [B, K, G, T, S] over S, beside a sink [N] where there is one."""
  if sinks is None:
    return jax.nn.softmax(scores, axis=-1)
  sinks = sinks.astype(jnp.float32).reshape(1, *scores.shape[1:3], 1, 1)
  top = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks))
  weights = jnp.exp(scores - top)
  return weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - top))


def _mask(q_segments, kv_segments, q_index, S, causal, window) -> jax.Array | None:
  """What a query may see, broadcastable to [B, 1, 1, T, S]; None when it may see everything."""
  mask = None
  if q_segments is not None:
    mask = (q_segments[:, :, None] == kv_segments[:, None, :])[:, None, None]
  if causal:
    distance = q_index[:, None] - jnp.arange(S)
    order = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    order = order[None, None, None]
    mask = order if mask is None else mask & order
  return mask


def _blockwise(q, k, v, q_segments, kv_segments, q_index, causal, window, sinks) -> jax.Array:
  """Attention by blocks of queries, with scores recomputed in the backward pass: memory linear in T."""
  B, T, N, H = q.shape
  blocks = -(-T // QUERY_BLOCK)
  pad = blocks * QUERY_BLOCK - T

  def split(x, axis):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, pad)
    x = jnp.pad(x, widths)
    shape = (*x.shape[:axis], blocks, QUERY_BLOCK, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)

  index = jnp.arange(T) if q_index is None else q_index
  inputs = (split(q, 1), None if q_segments is None else split(q_segments, 1), split(index, 0))

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def block(_, inputs):
    q_block, segments, index = inputs
    return None, _attend(q_block, k, v, segments, kv_segments, index, causal, window, sinks)

  _, out = jax.lax.scan(block, None, inputs)
  return jnp.moveaxis(out, 0, 1).reshape(B, blocks * QUERY_BLOCK, N, H)[:, :T]
