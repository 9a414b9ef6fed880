"""Flash attention for NVIDIA cards: the kernels, by Pallas' Triton route.

Forward as in FlashAttention-2 (arXiv:2307.08691, algorithm 1); backward in two kernels, one that goes through the
keys of a block of queries (dq) and one that goes through the queries of a block of keys (dk, dv), so that nothing is
added up by atomics and the same inputs give the same bits.

A program has one block of queries (or keys) of one head, and a list of the blocks on the other side that it meets:
`Spans`. Blocks that the mask hides whole are not in it, and of those that it leaves whole nothing is compared.

Scores are kept in base 2: exp2 is what the card has.

Letters: B rows, T queries, S keys, N query heads, K key-value heads, G = N/K, H head width, TB and SB the lengths of
blocks of queries and keys, I and J their numbers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LOG2_E = math.log2(math.e)
"""Powers of e are powers of two by this factor in the exponent."""

LOWEST = -1e30
"""Where the running maximum begins: finite, so that a query that sees nothing ends in zeros and not in NaNs."""

HIGHEST = 1e30
"""The log-sum of a query that sees nothing: its weights are zeros on the way back."""


class Spans(NamedTuple):
  """For each block, which blocks of the other side it meets: [B or 1, blocks] int32 each.

  Attributes:
    first, last: it meets those from `first` up to but not with `last`.
    whole, until: of these, those from `whole` up to but not with `until` are visible whole.
  """

  first: Any
  whole: Any
  until: Any
  last: Any


class Tokens(NamedTuple):
  """What the mask knows of each query or key; None where it does not ask.

  Attributes:
    segment: int32 [B, L].
    prompt: int32 [B, L]: of a key, the segment whose following one sees it, too; of a query, the segment of which it
      sees what is shared. Those without one have numbers that nobody else has.
    index: int32 [L], the place along S.
  """

  segment: Any
  prompt: Any
  index: Any


class Shape(NamedTuple):
  """The sizes that a kernel is made for; see the module's letters.

  Attributes:
    H: as the kernels get it: a power of two, at least 16.
    scale: what scores are multiplied by, for weights that are powers of two.
    causal: whether places are compared.
  """

  T: int
  S: int
  G: int
  H: int
  TB: int
  SB: int
  scale: float
  causal: bool


def _dot(a: jax.Array, b: jax.Array):
  # Cards round float32 to TensorFloat-32 in products unless told otherwise.
  return plgpu.dot(a, b, precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)


def _block(
  ref: Any, row: jax.Array | int, start: jax.Array | int, size: int, head: jax.Array | int, length: int
):
  """Loads a block [size, H] of [B, length, heads, H]; zeros beyond its end."""
  mask = _inside(start, size, length)
  return plgpu.load(ref.at[row, pl.ds(start, size), head, :], mask=mask, other=None if mask is None else 0.0)


def _store(
  ref: Any, value: jax.Array, row: jax.Array | int, start: jax.Array | int, head: jax.Array | int, length: int
) -> None:
  size = value.shape[0]
  mask = _inside(start, size, length)
  plgpu.store(ref.at[row, pl.ds(start, size), head, :], value.astype(ref.dtype), mask=mask)


def _inside(start: jax.Array | int, size: int, length: int):
  """Which tokens of a block there are; None where all blocks are whole."""
  return (start + jnp.arange(size) < length)[:, None] if length % size else None


def _tokens(tokens: Tokens, row: jax.Array | int, start: jax.Array | int, size: int) -> Tokens:
  """What the mask knows of a block of tokens."""
  here = pl.ds(start, size)

  def of_row(ref: Any):
    return None if ref is None else ref[row, here]

  index = start + jnp.arange(size) if tokens.index is None else tokens.index[here]
  return Tokens(of_row(tokens.segment), of_row(tokens.prompt), index)


def _visible(q: Tokens, k: Tokens, window: Any, shape: Shape, *, by_key: bool = False):
  """Bool [TB, SB]: which keys of a block the queries of another see; [SB, TB] by key."""
  # Axes are added where they stand in the result.
  of_q, of_k = ((None,), (slice(None), None)) if by_key else ((slice(None), None), (None,))
  visible = (k.index < shape.S)[of_k]
  if q.segment is not None:
    same = q.segment[of_q] == k.segment[of_k]
    if q.prompt is not None:
      same |= q.prompt[of_q] == k.prompt[of_k]
    visible &= same
  if shape.causal:
    distance = q.index[of_q] - k.index[of_k]
    visible &= distance >= 0
    if window is not None:
      visible &= distance < window
  lengths = q.index.shape[0], k.index.shape[0]
  return jnp.broadcast_to(visible, lengths[::-1] if by_key else lengths)


def _over(spans: Spans, row: jax.Array | int, block: jax.Array | int, body: Callable[..., Any], carry: Any):
  """Runs `body(block of the other side, carry, masked)` over those that a block meets: the masked ones, then the others."""
  if spans.first.shape[0] == 1:
    row = 0
  first, whole, until, last = (ref[row, block] for ref in spans)
  before = whole - first

  def masked(n: jax.Array, carry: Any):
    return body(jnp.where(n < before, first + n, until + n - before), carry, True)

  carry = jax.lax.fori_loop(0, before + last - until, masked, carry)
  return jax.lax.fori_loop(whole, until, functools.partial(_unmasked, body), carry)


def _unmasked(body: Callable[..., Any], n: jax.Array, carry: Any):
  return body(n, carry, False)


def forward(
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  sinks_ref: Any,
  q_tokens: Tokens,
  k_tokens: Tokens,
  window_ref: Any,
  spans: Spans,
  out_ref: Any,
  log_ref: Any,
  *,
  shape: Shape,
):
  """Outputs and log-sums (base 2) of a block of queries of one head."""
  # The blocks that meet most come first, where the mask is causal: short ones fill the gaps at the end.
  blocks, head, row = pl.num_programs(0), pl.program_id(1), pl.program_id(2)
  block = blocks - 1 - pl.program_id(0)
  start = block * shape.TB
  q = _block(q_ref, row, start, shape.TB, head, shape.T)
  ours = _tokens(q_tokens, row, start, shape.TB)
  window = None if window_ref is None else window_ref[0]

  def body(j: jax.Array | int, carry: Any, masked: bool):
    top, total, out = carry
    begin = j * shape.SB
    k = _block(k_ref, row, begin, shape.SB, head // shape.G, shape.S)
    scores = _dot(q, k.T) * shape.scale
    visible = None
    if masked:
      visible = _visible(ours, _tokens(k_tokens, row, begin, shape.SB), window, shape)
      scores = jnp.where(visible, scores, LOWEST)
    higher = jnp.maximum(top, jnp.max(scores, axis=1))
    weights = jnp.exp2(scores - higher[:, None])
    if visible is not None:
      weights = jnp.where(visible, weights, 0.0)
    shrink = jnp.exp2(top - higher)
    v = _block(v_ref, row, begin, shape.SB, head // shape.G, shape.S)
    out = out * shrink[:, None] + _dot(weights.astype(v.dtype), v)
    return higher, total * shrink + jnp.sum(weights, axis=1), out

  top, total = jnp.full(shape.TB, LOWEST, jnp.float32), jnp.zeros(shape.TB, jnp.float32)
  if sinks_ref is not None:
    # A key without a value, seen before all others.
    top, total = top * 0.0 + sinks_ref[head] * LOG2_E, total + 1.0
  out = jnp.zeros((shape.TB, shape.H), jnp.float32)
  top, total, out = _over(spans, row, block, body, (top, total, out))
  seen = total > 0
  total = jnp.where(seen, total, 1.0)
  _store(out_ref, out / total[:, None], row, start, head, shape.T)
  log_ref[row, head, pl.ds(start, shape.TB)] = jnp.where(seen, top + jnp.log2(total), HIGHEST)


def backward_q(
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  g_ref: Any,
  log_ref: Any,
  inner_ref: Any,
  q_tokens: Tokens,
  k_tokens: Tokens,
  window_ref: Any,
  spans: Spans,
  dq_ref: Any,
  *,
  shape: Shape,
):
  """The gradient of a block of queries of one head."""
  blocks, head, row = pl.num_programs(0), pl.program_id(1), pl.program_id(2)
  block = blocks - 1 - pl.program_id(0)
  start = block * shape.TB
  q, g = (_block(ref, row, start, shape.TB, head, shape.T) for ref in (q_ref, g_ref))
  here = pl.ds(start, shape.TB)
  log, inner = log_ref[row, head, here], inner_ref[row, head, here]
  ours = _tokens(q_tokens, row, start, shape.TB)
  window = None if window_ref is None else window_ref[0]

  def body(j: jax.Array | int, dq: jax.Array, masked: bool):
    begin = j * shape.SB
    k, v = (_block(ref, row, begin, shape.SB, head // shape.G, shape.S) for ref in (k_ref, v_ref))
    weights = jnp.exp2(_dot(q, k.T) * shape.scale - log[:, None])
    if masked:
      visible = _visible(ours, _tokens(k_tokens, row, begin, shape.SB), window, shape)
      weights = jnp.where(visible, weights, 0.0)
    by_score = weights * (_dot(g, v.T) - inner[:, None])
    return dq + _dot(by_score.astype(k.dtype), k)

  dq = _over(spans, row, block, body, jnp.zeros((shape.TB, shape.H), jnp.float32))
  _store(dq_ref, dq * (shape.scale / LOG2_E), row, start, head, shape.T)


def backward_kv(
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  g_ref: Any,
  log_ref: Any,
  inner_ref: Any,
  q_tokens: Tokens,
  k_tokens: Tokens,
  window_ref: Any,
  spans: Spans,
  dk_ref: Any,
  dv_ref: Any,
  *,
  shape: Shape,
):
  """The gradients of a block of keys and values of one key-value head, summed over the heads that share it."""
  block, kv_head, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
  start = block * shape.SB
  k, v = (_block(ref, row, start, shape.SB, kv_head, shape.S) for ref in (k_ref, v_ref))
  ours = _tokens(k_tokens, row, start, shape.SB)
  window = None if window_ref is None else window_ref[0]

  def of_head(n: jax.Array, carry: Any):
    head = kv_head * shape.G + n

    # Keys come first in all products: they are the longer side of a block, which the card's units want first.
    def body(i: jax.Array | int, carry: Any, masked: bool):
      dk, dv = carry
      begin = i * shape.TB
      there = pl.ds(begin, shape.TB)
      q, g = (_block(ref, row, begin, shape.TB, head, shape.T) for ref in (q_ref, g_ref))
      weights = jnp.exp2(_dot(k, q.T) * shape.scale - log_ref[row, head, there][None])
      if masked:
        theirs = _tokens(q_tokens, row, begin, shape.TB)
        weights = jnp.where(_visible(theirs, ours, window, shape, by_key=True), weights, 0.0)
      dv = dv + _dot(weights.astype(g.dtype), g)
      by_score = weights * (_dot(v, g.T) - inner_ref[row, head, there][None])
      return dk + _dot(by_score.astype(q.dtype), q), dv

    return _over(spans, row, block, body, carry)

  zeros = jnp.zeros((shape.SB, shape.H), jnp.float32)
  dk, dv = jax.lax.fori_loop(0, shape.G, of_head, (zeros, zeros))
  _store(dk_ref, dk * (shape.scale / LOG2_E), row, start, kv_head, shape.S)
  _store(dv_ref, dv, row, start, kv_head, shape.S)
