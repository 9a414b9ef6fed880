"""The chunked linear cross-entropy on a mesh.

Tokens stay on the devices that they are spread over, and chunks go along the vocabulary: what of the kernel a
chunk needs is collected right before its product, and its gradient summed into the stored pieces right after,
so that no device ever holds the kernel or its gradient whole. Devices of the `vocab` axes share their tokens
and split the vocabulary.

Letters: R rows, S tokens, E width, V vocabulary; on a device: M tokens, n chunks of C entries.
"""

import functools
import math

import jax
import jax.numpy as jnp

from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.parallel.rules import ACTIVATIONS, WEIGHTS, MeshAxes, fit, mesh_in_scope, spec

CHUNK_LOGITS = 2**25
"""Logits that exist at a time on a device (128 MiB); chunks are as wide as that allows."""

_LANES = 128
"""What widths of chunks are a multiple of: the lanes of a TPU's vector unit."""


def linear_cross_entropy(
  hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
  """`lm.cross_entropy(hidden @ kernel, targets, weights)` of hidden [R, S, E] and kernel [E, V] on a mesh."""
  mesh = mesh_in_scope()
  assert mesh is not None
  (R, S, E), V = hidden.shape, kernel.shape[1]
  rows, tokens = fit(ACTIVATIONS["rows"], R, mesh), fit(ACTIVATIONS["tokens"], S, mesh)
  width = fit(WEIGHTS["table"], E, mesh)
  vocab = tuple(axis for axis in ACTIVATIONS["vocab"] if axis in tokens and axis in width)
  parts = math.prod(mesh.shape[axis] for axis in vocab)
  devices = math.prod(mesh.shape[axis] for axis in (*rows, *tokens))
  chunk = _chunk_width(R * S * parts // devices, math.ceil(V / parts))
  padded = math.ceil(V / (parts * chunk)) * parts * chunk

  def local(hidden, kernel, targets, weights, part):
    if vocab:
      hidden, targets, weights = (
        jax.lax.all_gather(x, vocab, axis=1, tiled=True) for x in (hidden, targets, weights)
      )
    kernel = jnp.pad(kernel, ((0, 0), (0, padded - V)))
    if vocab:
      kernel = jax.lax.all_to_all(kernel, vocab, split_axis=1, concat_axis=0, tiled=True)
    chunks = kernel.reshape(kernel.shape[0], -1, chunk).swapaxes(0, 1)
    # Entries of the vocabulary by chunk; -1, which is no target, where it is padded.
    entries = part[0] * (padded // parts) + jnp.arange(padded // parts).reshape(-1, chunk)
    entries = jnp.where(entries < V, entries, -1)
    collected = tuple(axis for axis in width if axis not in vocab)
    flat = (hidden.reshape(-1, E), chunks, entries, targets.reshape(-1), weights.reshape(-1))
    return _on_device(collected, vocab, *flat)[None]

  totals = jax.shard_map(
    local,
    in_specs=(spec(rows, tokens, ()), spec(width, ()), spec(rows, tokens), spec(rows, tokens), spec(vocab)),
    out_specs=spec((*rows, *tokens)),
    check_vma=False,
  )(hidden, kernel, targets, weights, jnp.arange(parts))
  return jnp.sum(totals)


def _chunk_width(tokens: int, vocabulary: int) -> int:
  """The least width, in whole lanes, of as few chunks as CHUNK_LOGITS allows."""
  chunks = math.ceil(vocabulary * tokens / CHUNK_LOGITS)
  return math.ceil(vocabulary / chunks / _LANES) * _LANES


def _on_device(collected: MeshAxes, vocab: MeshAxes, *arrays: jax.Array) -> jax.Array:
  """The device's share of the weighted sum over tokens x [M, E], with kernels [n, pieces of E, C] of entries [n, C].

  Devices that share tokens all have their sum, so that each gives an equal part of it.

  Args:
    collected: axes of the mesh that hold pieces of E.
    vocab: those that share tokens and split the vocabulary.
    arrays: x, kernels, entries, targets [M], weights [M].
  """
  return _chunked(collected, vocab, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(collected, vocab, x, chunks, entries, targets, weights):
  return _share(collected, vocab, x, chunks, entries, targets, weights)[0]


def _share(collected, vocab, x, chunks, entries, targets, weights):
  """The share, and the logarithm of each token's softmax denominator [M]."""

  def add(carry, chunk):
    top, scaled, picked = carry
    logits = _logits(collected, x, *chunk)
    new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
    scaled = scaled * jnp.exp(top - new_top) + jnp.sum(jnp.exp(logits - new_top[:, None]), axis=-1)
    picked += jnp.sum(jnp.where(chunk[1] == targets[:, None], logits, 0.0), axis=-1)
    return (new_top, scaled, picked), None

  zero = jnp.zeros(x.shape[0], jnp.float32)
  start = (jnp.full_like(zero, jnp.finfo(jnp.float32).min), zero, zero)
  (top, scaled, picked), _ = jax.lax.scan(add, start, (chunks, entries))
  if vocab:
    highest = jax.lax.pmax(top, vocab)
    scaled = jax.lax.psum(scaled * jnp.exp(top - highest), vocab)
    top, picked = highest, jax.lax.psum(picked, vocab)
  log_sum = top + jnp.log(scaled)
  total = jnp.sum(jnp.where(targets != IGNORE_INDEX, (log_sum - picked) * weights, 0.0))
  return total / (jax.lax.psum(1, vocab) if vocab else 1), log_sum


def _logits(collected, x, piece, entries):
  """Scores [M, C] in float32."""
  logits = jnp.dot(x, _collect(collected, piece, x.dtype), preferred_element_type=jnp.float32)
  return jnp.where(entries >= 0, logits, jnp.finfo(jnp.float32).min)


def _collect(collected: MeshAxes, piece: jax.Array, dtype: jnp.dtype) -> jax.Array:
  piece = piece.astype(dtype)
  return jax.lax.all_gather(piece, collected, axis=0, tiled=True) if collected else piece


def _chunked_forward(collected, vocab, x, chunks, entries, targets, weights):
  arrays = [operand.value for operand in (x, chunks, entries, targets, weights)]
  total, log_sum = _share(collected, vocab, *arrays)
  # An empty tuple says that the kernel trains: only the structure of what is kept is static.
  return total, (*arrays, log_sum, () if chunks.perturbed else None)


def _chunked_backward(collected, vocab, saved, g):
  # The gradient of all shares together, of which each device has the part of its own logits.
  x, chunks, entries, targets, weights, log_sum, needs_kernel = saved
  weights = jnp.where(targets != IGNORE_INDEX, weights * g, 0.0)

  def add(dx, chunk):
    piece, entries = chunk
    probs = jnp.exp(_logits(collected, x, piece, entries) - log_sum[:, None])
    d_logits = ((probs - (entries == targets[:, None])) * weights[:, None]).astype(x.dtype)
    dx += jnp.dot(d_logits, _collect(collected, piece, x.dtype).T, preferred_element_type=jnp.float32)
    if needs_kernel is None:
      return dx, None
    d_piece = jnp.dot(x.T, d_logits, preferred_element_type=jnp.float32)
    if collected:
      d_piece = jax.lax.psum_scatter(d_piece, collected, scatter_dimension=0, tiled=True)
    return dx, d_piece.astype(piece.dtype)

  dx, d_chunks = jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), (chunks, entries))
  return dx.astype(x.dtype), d_chunks, None, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward, symbolic_zeros=True)
