"""Flash attention (arXiv:2205.14135, arXiv:2307.08691) for CPUs: every product is of two matrices that fit the cache.

Work goes row by row, key-value head by key-value head and block of queries by block of queries, all query heads of a
key-value head together. A block meets the keys from the first to the last block of them of which it may see something,
which is read from the data where segments are packed: what lies outside is never computed. Weights are not kept for the
backward pass, which computes them again. Numbers are float32 inside, which CPUs multiply faster than bfloat16.

Letters: B rows, T queries, S keys, N query heads, K key-value heads, G = N/K, H head width; I blocks of TB queries,
J blocks of SB keys.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from internvl_jax.models.attention.mask import Mask
from internvl_jax.models.attention.sharding import Over, shard_attention

ONE_CORE, CORES = (256, 64), (1024, 256)
"""Queries of a block, over all heads of a group, and keys of a block, for one core and for several: the fastest of 64 to 2048
queries and 64 to 512 keys (AMD EPYC 9004, 512 and 2,048 tokens, 8 and 2 heads of 64). XLA lets several cores work on a
product of the larger blocks, and on none of the smaller ones."""

SCORES = 2**17
"""Scores of a block of queries that sees all keys: 512 KiB, half of a core's second-level cache."""

MOST_KEYS = 2048
"""The most keys of a block where all are seen."""

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
  """`models.attention.attention` of q [B, T, N, H], k and v [B, S, K, H]."""
  return shard_attention(_by_blocks, q, k, v, mask, sinks, over)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shape:
  """Lengths, and how they are cut; letters as above."""

  B: int
  T: int
  S: int
  K: int
  G: int
  H: int
  TB: int
  SB: int

  @classmethod
  def of(cls, q: jax.Array, k: jax.Array, mask: Mask) -> "_Shape":
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    some = mask.causal or mask.segments is not None
    most_queries, most_keys = CORES if _cores() > 1 else ONE_CORE
    keys = _even(S, most_keys if some else MOST_KEYS)
    queries = _even(T, max(32, (most_queries if some else SCORES // keys) * K // N))
    return cls(B=B, T=T, S=S, K=K, G=N // K, H=H, TB=queries, SB=keys)

  @property
  def query_blocks(self) -> int:
    """I."""
    return -(-self.T // self.TB)

  @property
  def key_blocks(self) -> int:
    """J."""
    return -(-self.S // self.SB)

  def by_query(self, x: jax.Array) -> jax.Array:
    """Cuts x [B, T, N, ...] into [B, K, I, G*TB, ...] in float32."""
    x = _cut(x.astype(jnp.float32), self.TB).reshape(
      self.B, self.query_blocks, self.TB, self.K, self.G, *x.shape[3:]
    )
    return jnp.moveaxis(x, (3, 4), (1, 3)).reshape(
      self.B, self.K, self.query_blocks, self.G * self.TB, *x.shape[5:]
    )

  def by_key(self, x: jax.Array) -> jax.Array:
    """Cuts x [B, S, K, H] into [B, K, J, SB, H] in float32."""
    return jnp.moveaxis(_cut(x.astype(jnp.float32), self.SB), 3, 1)

  def join_queries(self, x: jax.Array) -> jax.Array:
    """From [B, K, I, G*TB, H] to [B, T, N, H]."""
    x = x.reshape(self.B, self.K, self.query_blocks, self.G, self.TB, self.H).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(self.B, self.query_blocks * self.TB, -1, self.H)[:, : self.T]

  def join_keys(self, x: jax.Array) -> jax.Array:
    """From [B, K, J, SB, H] to [B, S, K, H]."""
    return x.transpose(0, 2, 3, 1, 4).reshape(self.B, -1, self.K, self.H)[:, : self.S]


def _cores() -> int:
  """Cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _even(length: int, most: int) -> int:
  """The length of blocks of at most about `most`, so that padding the last one costs next to nothing."""
  blocks = -(-length // most)
  return length if blocks == 1 else 8 * -(-length // (8 * blocks))


def _cut(x: jax.Array, block: int, mode: str = "constant") -> jax.Array:
  """Cuts x [B, L, ...] into [B, blocks, block, ...], the last one filled up with zeros, or as `mode` says."""
  pad = [(0, 0), (0, -x.shape[1] % block), *[(0, 0)] * (x.ndim - 2)]
  x = jnp.pad(x, pad, mode=mode)
  return x.reshape(x.shape[0], -1, block, *x.shape[2:])


# --- What the mask says -------------------------------------------------------------------------------------


class _Tokens(NamedTuple):
  """What is known of queries or keys, cut into blocks.

  Attributes:
    place: int [1, blocks, block], along the keys.
    segment: int [B, blocks, block], rising; None: one segment.
    prompt: int [B, blocks, block]: of queries the segment whose prompt they see, of keys that whose prompt they are; no
      number stands for none on both sides. None: no prompt is shared.
  """

  place: jax.Array
  segment: jax.Array | None
  prompt: jax.Array | None


_SEES_NONE, _SHARES_NONE = -1, -2


def _tokens(mask: Mask, shape: _Shape) -> tuple[_Tokens, _Tokens]:
  """Queries and keys; those that fill the last block are like the one before them, but for keys' places."""
  queries, keys = (functools.partial(_cut, block=block, mode="edge") for block in (shape.TB, shape.SB))
  index = jnp.arange(shape.T) if mask.q_index is None else mask.q_index
  segment = kv_segment = prompt = kv_prompt = None
  rising = mask.rising()
  if rising.segments is not None and rising.kv_segments is not None:
    segment, kv_segment = queries(rising.segments), keys(rising.kv_segments)
  if mask.parent is not None and mask.kv_parent is not None:
    prompt = queries(jnp.where(mask.answer_number > 0, mask.parent, _SEES_NONE))
    kv_prompt = keys(jnp.where(mask.is_prompt, mask.kv_parent, _SHARES_NONE))
  places = jnp.arange(shape.key_blocks * shape.SB).reshape(1, shape.key_blocks, shape.SB)
  return _Tokens(queries(index[None]), segment, prompt), _Tokens(places, kv_segment, kv_prompt)


def _spans(q: _Tokens, k: _Tokens, mask: Mask, shape: _Shape) -> tuple[jax.Array, jax.Array]:
  """Int [B, I] twice: the first block of keys of which a block of queries may see something, and the one after the last."""
  some = jnp.ones((shape.B, shape.query_blocks, shape.key_blocks), bool)
  if q.segment is not None and k.segment is not None:
    meet = _meet(q.segment, k.segment)
    if q.prompt is not None and k.prompt is not None:
      meet |= _meet(q.prompt, k.prompt)
    some &= meet
  if mask.causal:
    low, high = jnp.min(q.place, -1)[..., None], jnp.max(q.place, -1)[..., None]
    some &= high >= k.place[:, None, :, 0]
    if mask.reach is not None:
      some &= low - k.place[:, None, :, -1] < mask.reach
  block = jnp.arange(shape.key_blocks)
  last = jnp.max(jnp.where(some, block + 1, 0), axis=-1)
  return jnp.minimum(jnp.min(jnp.where(some, block, shape.key_blocks), axis=-1), last), last


def _meet(q: jax.Array, k: jax.Array) -> jax.Array:
  """Bool [B, I, J]: the blocks whose ranges of numbers of 0 and more overlap."""

  def low(x: jax.Array) -> jax.Array:
    return jnp.min(x, axis=-1, where=x >= 0, initial=jnp.iinfo(jnp.int32).max)

  q_low, q_high, k_low, k_high = low(q), jnp.max(q, -1), low(k), jnp.max(k, -1)
  return (q_low[..., None] <= k_high[:, None]) & (k_low[:, None] <= q_high[..., None])


def _visible(q: _Tokens, k: _Tokens, mask: Mask, shape: _Shape) -> jax.Array | None:
  """Bool [TB, SB]: the keys of a block that the queries of one see, both [block]; None where they see all."""
  visible = []
  if q.segment is not None and k.segment is not None:
    visible.append(q.segment[:, None] == k.segment)
    if q.prompt is not None and k.prompt is not None:
      visible[0] |= q.prompt[:, None] == k.prompt
  if mask.causal:
    distance = q.place[:, None] - k.place
    visible.append(distance >= 0 if mask.reach is None else (distance >= 0) & (distance < mask.reach))
  elif shape.S % shape.SB:
    visible.append((k.place < shape.S)[None])
  return functools.reduce(jnp.logical_and, visible) if visible else None


# --- Row by row, head by head, block by block ---------------------------------------------------------------


class _Head(NamedTuple):
  """A key-value head of a row, cut into blocks.

  Attributes:
    q: [I, G*TB, H], scaled. k, v: [J, SB, H].
    queries, keys: what the mask asks, without the axis of rows.
    first, last: int [I]; see `_spans`.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  queries: _Tokens
  keys: _Tokens
  first: jax.Array
  last: jax.Array


def _map_heads(
  function: Callable[..., Any], shape: _Shape, qkv: tuple[jax.Array, ...], mask: Mask, *others: jax.Array
) -> Any:
  """Maps `function(_Head, *others)` over rows and key-value heads, one after the other; results are [B, K, ...].

  Args:
    function: what to map.
    shape: how arrays are cut.
    qkv: q [B, T, N, H], k and v [B, S, K, H].
    mask: which keys a query sees.
    *others: more arrays [B, K, ...] to map over.
  """
  q, k, v = qkv
  heads = (shape.by_query(q.astype(jnp.float32) / math.sqrt(shape.H)), shape.by_key(k), shape.by_key(v))
  queries, keys = _tokens(mask, shape)
  known = (queries, keys, *_spans(queries, keys, mask, shape))
  known = jax.tree.map(lambda x: jnp.broadcast_to(x, (shape.B, *x.shape[1:])), known)

  def of_row(inputs: Any) -> Any:
    known, of_heads = inputs
    return jax.lax.map(lambda x: function(_Head(*x[:3], *known), *x[3:]), of_heads)

  return jax.lax.map(of_row, (known, (*heads, *others)))


_dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  """A [m, n] @ b [n, p]."""
  return _dot(a, b, (((1,), (0,)), ((), ())))


def _by_rows(a: jax.Array, b: jax.Array) -> jax.Array:
  """A [m, n] @ b [p, n].T, without a transposed copy."""
  return _dot(a, b, (((1,), (1,)), ((), ())))


def _by_columns(a: jax.Array, b: jax.Array) -> jax.Array:
  """A [n, m].T @ b [n, p], without a transposed copy."""
  return _dot(a, b, (((0,), (0,)), ((), ())))


def _scores(head: _Head, mask: Mask, shape: _Shape, i: Any, j: Any) -> jax.Array:
  """Scores [G*TB, SB] of two blocks."""
  scores = _by_rows(head.q[i], head.k[j])
  queries, keys = (jax.tree.map(lambda x, n=n: x[n], of) for of, n in ((head.queries, i), (head.keys, j)))
  visible = _visible(queries, keys, mask, shape)
  if visible is None:
    return scores
  scores = jnp.where(visible, scores.reshape(shape.G, *visible.shape), _NEVER)
  return scores.reshape(-1, shape.SB)


@jax.custom_vjp
def _by_blocks(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, sinks: jax.Array | None) -> jax.Array:
  return _forward(q, k, v, mask, sinks)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, sinks: jax.Array | None):
  """The outputs [B, T, N, H], and what the way back needs: the inputs, the outputs and the log of each sum."""
  shape = _Shape.of(q, k, mask)
  function = functools.partial(_head_outputs, mask, shape)
  others = () if sinks is None else (_by_head(sinks, shape),)
  out, log_total = _map_heads(function, shape, (q, k, v), mask, *others)
  out = shape.join_queries(out).astype(q.dtype)
  return out, (q, k, v, mask, sinks, out, log_total)


def _by_head(sinks: jax.Array, shape: _Shape) -> jax.Array:
  """Sinks [N] as [B, K, G*TB], one a query."""
  sinks = jnp.repeat(sinks.astype(jnp.float32), shape.TB).reshape(shape.K, -1)
  return jnp.broadcast_to(sinks, (shape.B, *sinks.shape))


def _head_outputs(mask: Mask, shape: _Shape, head: _Head, sinks: jax.Array | None = None) -> Any:
  """Outputs [I, G*TB, H] of a head, and the logs of its sums [I, G*TB]."""

  def of_block(i: jax.Array) -> tuple[jax.Array, jax.Array]:
    def add(j: Any, carry: Any) -> Any:
      top, total, out = carry
      scores = _scores(head, mask, shape, i, j)
      higher = jnp.maximum(top, jnp.max(scores, axis=-1))
      # Of hidden keys 0, also before a query has seen any.
      weights = jnp.where(scores > _NEVER, jnp.exp(scores - higher[:, None]), 0.0)
      shrink = jnp.exp(top - higher)
      out = out * shrink[:, None] + _product(weights, head.v[j])
      return higher, total * shrink + jnp.sum(weights, axis=-1), out

    zero = jnp.zeros(head.q.shape[1:])
    # A sink is a key without a value, seen before all others.
    start = (zero[:, 0] + _NEVER, zero[:, 0], zero) if sinks is None else (sinks, zero[:, 0] + 1, zero)
    top, total, out = _over_keys(add, start, head, i)
    total = jnp.where(total > 0, total, 1.0)
    return out / total[:, None], top + jnp.log(total)

  return jax.lax.map(of_block, jnp.arange(shape.query_blocks))


def _over_keys(add: Callable[[Any, Any], Any], carry: Any, head: _Head, i: Any) -> Any:
  """Runs `add(j, carry)` over the blocks of keys that block i of queries meets."""
  if len(head.k) == 1:
    return add(0, carry)
  return jax.lax.fori_loop(head.first[i], head.last[i], add, carry)


def _backward(saved: Any, g: jax.Array):
  q, k, v, mask, sinks, out, log_total = saved
  shape = _Shape.of(q, k, mask)
  # What the gradients of a query's weights have in common (arXiv:2307.08691, section 2.3.2).
  inner = shape.by_query(jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1))
  function = functools.partial(_head_gradients, mask, shape)
  dq, dk, dv = _map_heads(function, shape, (q, k, v), mask, shape.by_query(g), inner, log_total)
  dsinks = None
  if sinks is not None:
    share = jnp.exp(_by_head(sinks, shape)[:, :, None] - log_total) * inner
    share = share.reshape(shape.B, shape.K, shape.query_blocks, shape.G, shape.TB)
    dsinks = -jnp.sum(share, axis=(0, 2, 4)).reshape(-1).astype(sinks.dtype)
  dq = (shape.join_queries(dq) / math.sqrt(shape.H)).astype(q.dtype)
  return dq, shape.join_keys(dk).astype(k.dtype), shape.join_keys(dv).astype(v.dtype), None, dsinks


def _head_gradients(
  mask: Mask, shape: _Shape, head: _Head, g: jax.Array, inner: jax.Array, log_total: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of a head's q [I, G*TB, H], which is the scaled one, and of its k and v [J, SB, H]."""

  def of_block(kv: Any, i: jax.Array) -> Any:
    def add(j: Any, carry: Any) -> Any:
      dq, dk, dv = carry
      scores = _scores(head, mask, shape, i, j)
      weights = jnp.where(scores > _NEVER, jnp.exp(scores - log_total[i][:, None]), 0.0)
      dv = dv.at[j].add(_by_columns(weights, g[i]))
      by_score = weights * (_by_rows(g[i], head.v[j]) - inner[i][:, None])
      dq = dq + _product(by_score, head.k[j])
      return dq, dk.at[j].add(_by_columns(by_score, head.q[i])), dv

    dq, *kv = _over_keys(add, (jnp.zeros(head.q.shape[1:]), *kv), head, i)
    return tuple(kv), dq

  start = (jnp.zeros(head.k.shape), jnp.zeros(head.v.shape))
  (dk, dv), dq = jax.lax.scan(of_block, start, jnp.arange(shape.query_blocks))
  return dq, dk, dv


_by_blocks.defvjp(_forward, _backward)
