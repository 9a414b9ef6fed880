"""Attention by XLA alone, on any platform.

Short rows are computed with all of their scores in memory (`plain`); long ones by blocks, in memory linear in their
length, by flash attention's recurrences (arXiv:2205.14135, arXiv:2307.08691).

Letters: B rows, T queries, S keys, N query heads, K key-value heads, G = N/K, H head width.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from internvl_jax.models.attention.mask import Mask
from internvl_jax.models.attention.sharding import Over, shard_attention

BLOCK = 512
"""The longest block of queries and of keys: the largest temporaries are [B, N, BLOCK, BLOCK] in float32."""

_NEVER = jnp.finfo(jnp.float32).min
"""The score of a key that is hidden."""


def attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  mask: Mask,
  sinks: Float[Array, " N"] | None,
  over: Over,
) -> Float[Array, "B T N H"]:
  """`models.attention.attention`, by blocks where there are more queries than one holds."""
  few = q.shape[1] <= BLOCK
  assert few or mask.parent is None, "blocks of queries know no shared prompts"
  return shard_attention(_plain if few else _by_blocks, q, k, v, mask, sinks, over)


def plain(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  mask: Mask,
  sinks: Float[Array, " N"] | None,
  over: Over,
) -> Float[Array, "B T N H"]:
  """`models.attention.attention` with all scores [B, N, T, S] in memory."""
  return shard_attention(_plain, q, k, v, mask, sinks, over)


def _plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, sinks: jax.Array | None) -> jax.Array:
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  # Heads next to rows make each product a batch of plain matrices; XLA's CPU backend copies otherwise.
  q = (q / math.sqrt(H)).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
  scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32)
  visible = _visible(mask, T, S)
  if visible is not None:
    scores = jnp.where(visible, scores, _NEVER)
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


def _visible(mask: Mask, T: int, S: int) -> jax.Array | None:
  """What a query may see, broadcastable to [B, 1, 1, T, S]; None when it may see everything."""
  visible = None
  if mask.segments is not None:
    assert mask.kv_segments is not None
    visible = mask.segments[:, :, None] == mask.kv_segments[:, None, :]
    if mask.parent is not None:
      visible |= (mask.parent[:, :, None] == mask.kv_segments[:, None, :]) & mask.is_prompt[:, None, :]
    visible = visible[:, None, None]
  if mask.causal:
    order = _in_order(mask, jnp.arange(T) if mask.q_index is None else mask.q_index, jnp.arange(S))
    visible = order[None, None, None] if visible is None else visible & order[None, None, None]
  return visible


def _in_order(mask: Mask, q_index: jax.Array, k_index: jax.Array):
  """Bool [T, S]: the keys that are not later than a query, and in its window."""
  distance = q_index[:, None] - k_index
  return distance >= 0 if mask.reach is None else (distance >= 0) & (distance < mask.reach)


# --- By blocks ----------------------------------------------------------------------------------------------


class _Blocks(NamedTuple):
  """Arrays cut into blocks: of queries I of length TB, of keys J of length SB.

  Attributes:
    q: [I, B, K, G, TB, H], scaled.
    k, v: [J, B, K, SB, H].
    segments: int [I, B, TB]; None: one segment.
    kv_segments: int [J, B, SB].
    q_index: int [I, TB].
    k_index: int [J, SB]; S and more is padding.
    num_keys: S.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  segments: jax.Array | None
  kv_segments: jax.Array | None
  q_index: jax.Array
  k_index: jax.Array
  num_keys: int


def _block(length: int) -> int:
  """The length of a block, so that padding the last one costs next to nothing: 1,025 patches are 3 of 344."""
  return 8 * math.ceil(length / math.ceil(length / BLOCK) / 8)


def _cut(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> _Blocks:
  (_, T, N, H), (_, S, K, _) = q.shape, k.shape
  index = jnp.arange(T) if mask.q_index is None else mask.q_index

  def ids(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else _split(x)

  return _Blocks(
    q=_split(q / math.sqrt(H)).reshape(-1, *q.shape[:1], _block(T), K, N // K, H).transpose(0, 1, 3, 4, 2, 5),
    k=_split(k).swapaxes(2, 3),
    v=_split(v).swapaxes(2, 3),
    segments=ids(mask.rising().segments),
    kv_segments=ids(mask.rising().kv_segments),
    q_index=_split(index[None])[:, 0],
    k_index=jnp.arange(math.ceil(S / _block(S)) * _block(S)).reshape(-1, _block(S)),
    num_keys=S,
  )


def _split(x: jax.Array) -> jax.Array:
  """Cuts x [B, L, ...] into blocks [blocks, B, block, ...], the last one filled up with zeros."""
  B, L, *rest = x.shape
  block = _block(L)
  x = jnp.pad(x, [(0, 0), (0, -L % block), *[(0, 0)] * len(rest)])
  return x.reshape(B, -1, block, *rest).swapaxes(0, 1)


def _by_query(x: jax.Array, like: jax.Array) -> jax.Array:
  """Cuts x [B, T, N, ...] as the queries [I, B, K, G, TB, H] are."""
  I, B, K, G, TB, _ = like.shape
  return jnp.moveaxis(_split(x).reshape(I, B, TB, K, G, *x.shape[3:]), 2, 4)


def _join(x: jax.Array, length: int) -> jax.Array:
  """From blocks [blocks, B, K, G, block, H] to [B, length, K*G, H]."""
  blocks, B, K, G, block, H = x.shape
  return x.transpose(1, 0, 4, 2, 3, 5).reshape(B, blocks * block, K * G, H)[:, :length]


def _pairs(mask: Mask, T: int, S: int) -> np.ndarray:
  """Pairs [P, 2] of a block of queries and one of keys, without those that lengths alone say are hidden."""
  TB, SB = _block(T), _block(S)
  window = mask.reach if isinstance(mask.reach, int) else S
  ordered = mask.causal and mask.q_index is None

  def hidden(i: int, j: int) -> bool:
    return j * SB >= (i + 1) * TB or i * TB - (j + 1) * SB + 1 >= window

  every = itertools.product(range(math.ceil(T / TB)), range(math.ceil(S / SB)))
  return np.array([pair for pair in every if not (ordered and hidden(*pair))], np.int32)


def _over_pairs(add: Callable[..., Any], carry: Any, cut: _Blocks, mask: Mask):
  """Runs `add(i, j, carry)` over the pairs of blocks of which something may be visible."""
  I, J = len(cut.q_index), len(cut.k_index)
  pairs = _pairs(mask, I * cut.q_index.shape[1], J * cut.k_index.shape[1])
  alive = _alive(cut, mask)

  def body(carry: Any, pair: Any):
    i, j = pair
    if alive is None:
      return add(i, j, carry), None
    return jax.lax.cond(alive[i, j], functools.partial(add, i, j), lambda carry: carry, carry), None

  return jax.lax.scan(body, carry, pairs)[0]


def _alive(cut: _Blocks, mask: Mask) -> jax.Array | None:
  """Bool [I, J]: the pairs of blocks of which something may be visible, as far as only the data tell."""
  alive = None
  if cut.segments is not None and cut.kv_segments is not None:
    q, k = cut.segments[:, None], cut.kv_segments[None]
    meet = (jnp.min(q, -1) <= jnp.max(k, -1)) & (jnp.min(k, -1) <= jnp.max(q, -1))
    alive = jnp.any(meet, axis=-1)
  if mask.causal and (mask.q_index is not None or mask.window is not None):
    q, k = cut.q_index[:, None], cut.k_index[None]
    order = jnp.max(q, -1) >= jnp.min(k, -1)
    if mask.reach is not None:
      order &= jnp.min(q, -1) - jnp.max(k, -1) < mask.reach
    alive = order if alive is None else alive & order
  return alive


def _scores(cut: _Blocks, mask: Mask, i: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Scores of two blocks [B, K, G, TB, SB], and which of them are visible, broadcastable to that."""
  scores = jnp.einsum("BKGTH,BKSH->BKGTS", cut.q[i], cut.k[j], preferred_element_type=jnp.float32)
  visible = (cut.k_index[j] < cut.num_keys)[None, None, None, None]
  if cut.segments is not None and cut.kv_segments is not None:
    visible &= (cut.segments[i][:, :, None] == cut.kv_segments[j][:, None, :])[:, None, None]
  if mask.causal:
    visible &= _in_order(mask, cut.q_index[i], cut.k_index[j])[None, None, None]
  return jnp.where(visible, scores, _NEVER), visible


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _by_blocks(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, sinks: jax.Array | None) -> jax.Array:
  return _forward(q, k, v, mask, sinks)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, sinks: jax.Array | None):
  """The outputs [B, T, N, H], and what the way back needs: the inputs, the outputs and the log of each sum."""
  cut = _cut(q, k, v, mask)
  shape = cut.q.shape[:-1]
  top, total = jnp.full(shape, _NEVER), jnp.zeros(shape)
  if sinks is not None:
    # A key without a value, seen before all others.
    top = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(*shape[2:4], 1), shape)
    total = jnp.ones(shape)

  def add(i: jax.Array, j: jax.Array, carry: Any):
    top, total, out = (leaf[i] for leaf in carry)
    scores, visible = _scores(cut, mask, i, j)
    higher = jnp.maximum(top, jnp.max(scores, axis=-1))
    weights = jnp.where(visible, jnp.exp(scores - higher[..., None]), 0.0)
    shrink = jnp.exp(top - higher)
    out = shrink[..., None] * out + _product("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), cut.v[j])
    new = higher, shrink * total + jnp.sum(weights, axis=-1), out
    return tuple(leaf.at[i].set(value) for leaf, value in zip(carry, new, strict=True))

  top, total, out = _over_pairs(add, (top, total, jnp.zeros(cut.q.shape)), cut, mask)
  total = jnp.where(total > 0, total, 1.0)
  out = _join((out / total[..., None]).astype(q.dtype), q.shape[1])
  return out, (q, k, v, mask, sinks, out, top + jnp.log(total))


def _backward(saved: Any, g: jax.Array):
  q, k, v, mask, sinks, out, log_total = saved
  cut = _cut(q, k, v, mask)
  g_cut = _by_query(g, cut.q)
  # What the gradients of a query's weights have in common (arXiv:2307.08691, section 2.3.2).
  inner = _by_query(jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1), cut.q)

  def add(i: jax.Array, j: jax.Array, carry: Any):
    dq, dk, dv = carry
    scores, visible = _scores(cut, mask, i, j)
    weights = jnp.where(visible, jnp.exp(scores - log_total[i][..., None]), 0.0)
    dv = dv.at[j].add(_product("BKGTS,BKGTH->BKSH", weights.astype(v.dtype), g_cut[i]))
    by_weight = _product("BKGTH,BKSH->BKGTS", g_cut[i], cut.v[j])
    by_score = (weights * (by_weight - inner[i][..., None])).astype(q.dtype)
    dq = dq.at[i].add(_product("BKGTS,BKSH->BKGTH", by_score, cut.k[j]))
    dk = dk.at[j].add(_product("BKGTS,BKGTH->BKSH", by_score, cut.q[i]))
    return dq, dk, dv

  start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (cut.q, cut.k, cut.v))
  dq, dk, dv = _over_pairs(add, start, cut, mask)
  dsinks = None
  if sinks is not None:
    share = jnp.exp(sinks.astype(jnp.float32).reshape(*log_total.shape[2:4], 1) - log_total)
    dsinks = -jnp.sum(share * inner, axis=(0, 1, 4)).reshape(-1).astype(sinks.dtype)
  dq = _join(dq / math.sqrt(q.shape[-1]), q.shape[1]).astype(q.dtype)
  dk, dv = (_join(x[:, :, :, None], k.shape[1]).astype(k.dtype) for x in (dk, dv))
  return dq, dk, dv, None, dsinks


_by_blocks.defvjp(_forward, _backward)
