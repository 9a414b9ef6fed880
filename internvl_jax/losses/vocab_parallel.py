"""The losses of tokens by a chunked linear cross-entropy, on a mesh.

Tokens stay on the devices that they are sharded over, and chunks go along the vocabulary: what of the kernel a
chunk needs is all-gathered right before its product, and its gradient summed into the stored pieces right after,
so that no device ever holds the kernel or its gradient whole. Devices of the `vocab` axes share their tokens
and split the vocabulary.

Letters: R rows, S tokens, E width, V vocabulary; on a device: M tokens, n chunks of C entries.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.parallel.rules import ACTIVATIONS, MeshAxes, dividing_axes, mesh_in_scope, spec, stored_over

CHUNK_LOGITS = 2**25
"""Logits that exist at a time on a device (128 MiB); chunks are as wide as that allows."""

_LANES = 128
"""What widths of chunks are a multiple of: the lanes of a TPU's vector unit."""


def linear_token_losses(
  hidden: Float[Array, "R S E"], kernel: Float[Array, "E V"], targets: Int[Array, "R S"]
) -> Float[Array, "R S"]:
  """-log softmax(hidden @ kernel)[target] of hidden [R, S, E] and kernel [E, V], on a mesh or without one.

  Args:
    hidden: [R, S, E] in the compute dtype.
    kernel: [E, V], cast to the dtype of `hidden`.
    targets: int [R, S].

  Returns:
    float32 [R, S], sharded like the tokens; 0 at IGNORE_INDEX.
  """
  return over_vocabulary(_chunked, hidden, kernel, targets)


def over_vocabulary(
  compute: Callable[..., Any], hidden: Float[Array, "R S E"], kernel: Any, *tokens: Any
) -> Any:
  """What is computed of every token from its logits, chunk by chunk, on a mesh or without one.

  Args:
    compute: function (axes that hold pieces of E, axes that split the vocabulary, x [M, E], chunks [n, pieces of E, C],
      entries [n, C], arrays of `tokens` [M, ...]) -> arrays [M, ...] in any structure; see `_chunked`.
    hidden: [R, S, E] in the compute dtype.
    kernel: [E, V], or several in a tuple, sharded alike, whose chunks are one, too.
    tokens: what else is known of each token, arrays [R, S, ...].

  Returns:
    what `compute` does, [R, S, ...], sharded like the tokens.
  """
  mesh, V = mesh_in_scope(), jax.tree.leaves(kernel)[0].shape[1]
  if mesh is None:
    return _local(hidden, kernel, jnp.arange(1), *tokens, compute=compute, split=_Split(V))
  R, S, E = hidden.shape
  rows, places = dividing_axes(ACTIVATIONS["rows"], R, mesh), dividing_axes(ACTIVATIONS["tokens"], S, mesh)
  width = stored_over("table", E, mesh)
  vocab = tuple(axis for axis in ACTIVATIONS["vocab"] if axis in places and axis in width)
  gathered = tuple(axis for axis in width if axis not in vocab)
  parts = math.prod(mesh.shape[axis] for axis in vocab)
  over = spec(rows, places)
  return jax.shard_map(
    functools.partial(_local, compute=compute, split=_Split(V, gathered, vocab, parts)),
    in_specs=(spec(rows, places, ()), spec(width, ()), spec(vocab), *[over] * len(tokens)),
    out_specs=over,
    check_vma=False,
  )(hidden, kernel, jnp.arange(parts), *tokens)


class _Split(NamedTuple):
  """How the kernel [E, V] is sharded.

  Attributes:
    vocabulary: V.
    gathered: axes of the mesh that shard E, and are all-gathered.
    vocab: those that share tokens and shard the vocabulary.
    parts: devices of the latter.
  """

  vocabulary: int
  gathered: MeshAxes = ()
  vocab: MeshAxes = ()
  parts: int = 1


def _local(
  hidden: jax.Array,
  kernel: Any,
  part: jax.Array,
  *tokens: jax.Array,
  compute: Callable[..., Any],
  split: _Split,
) -> Any:
  """A device's part of `over_vocabulary`; `part` [1] is which of the parts of the vocabulary is its own."""
  vocabulary, gathered, vocab, parts = split
  E, own = hidden.shape[-1], hidden.shape[1]
  if vocab:
    hidden, tokens = (
      jax.tree.map(lambda x: jax.lax.all_gather(x, vocab, axis=1, tiled=True), part)
      for part in (hidden, tokens)
    )
  R, S = hidden.shape[:2]
  chunk = _chunk_width(R * S * len(jax.tree.leaves(kernel)), math.ceil(vocabulary / parts))
  padded = math.ceil(vocabulary / (parts * chunk)) * parts * chunk

  def in_chunks(kernel: jax.Array) -> jax.Array:
    kernel = jnp.pad(kernel, ((0, 0), (0, padded - vocabulary)))
    if vocab:
      kernel = jax.lax.all_to_all(kernel, vocab, split_axis=1, concat_axis=0, tiled=True)
    return kernel.reshape(kernel.shape[0], -1, chunk).swapaxes(0, 1)

  # Entries of the vocabulary by chunk; -1, which is no target, where it is padded.
  entries = part[0] * (padded // parts) + jnp.arange(padded // parts).reshape(-1, chunk)
  entries = jnp.where(entries < vocabulary, entries, -1)
  flat = (x.reshape(R * S, *x.shape[2:]) for x in tokens)
  chunks = jax.tree.map(in_chunks, kernel)
  found = compute(gathered, vocab, hidden.reshape(-1, E), chunks, entries, *flat)

  def own_part(x: jax.Array) -> jax.Array:
    x = x.reshape(R, S, *x.shape[1:])
    return jax.lax.dynamic_slice_in_dim(x, part[0] * own, own, axis=1) if vocab else x

  return jax.tree.map(own_part, found)


def _chunk_width(tokens: int, vocabulary: int) -> int:
  """The least width, in whole lanes, of as few chunks as CHUNK_LOGITS allows."""
  chunks = math.ceil(vocabulary * tokens / CHUNK_LOGITS)
  return math.ceil(vocabulary / chunks / _LANES) * _LANES


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(
  gathered: MeshAxes,
  vocab: MeshAxes,
  x: jax.Array,
  chunks: jax.Array,
  entries: jax.Array,
  targets: jax.Array,
) -> jax.Array:
  """Losses [M] of tokens x [M, E], with kernels [n, pieces of E, C] of entries [n, C] and targets [M].

  Devices that share tokens have their losses all alike; of a loss that several of them use, the gradients are
  summed.

  Args:
    gathered: axes of the mesh that hold pieces of E.
    vocab: those that share tokens and split the vocabulary.
    x, chunks, entries, targets: see above.
  """
  return _losses(gathered, vocab, x, chunks, entries, targets)[0]


def _losses(
  gathered: MeshAxes,
  vocab: MeshAxes,
  x: jax.Array,
  chunks: jax.Array,
  entries: jax.Array,
  targets: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The losses, and the logarithm of each token's softmax denominator [M]."""

  def add(
    carry: tuple[jax.Array, ...], chunk: tuple[jax.Array, jax.Array]
  ) -> tuple[tuple[jax.Array, ...], None]:
    top, scaled, picked = carry
    logits = logits_of(gathered, x, *chunk)
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
  return jnp.where(targets != IGNORE_INDEX, log_sum - picked, 0.0), log_sum


def logits_of(
  gathered: MeshAxes, x: Float[Array, "M E"], piece: Float[Array, "width C"], entries: Int[Array, " C"]
) -> Float[Array, "M C"]:
  """Scores [M, C] in float32, the least there is where the vocabulary is padded."""
  logits = jnp.dot(x, all_gathered(gathered, piece, x.dtype), preferred_element_type=jnp.float32)
  return jnp.where(entries >= 0, logits, jnp.finfo(jnp.float32).min)


def all_gathered(gathered: MeshAxes, piece: Float[Array, "width C"], dtype: jnp.dtype) -> Float[Array, "E C"]:
  """All-gathers a chunk of the kernel [E, C] in that dtype from its pieces along E."""
  piece = piece.astype(dtype)
  return jax.lax.all_gather(piece, gathered, axis=0, tiled=True) if gathered else piece


def _chunked_forward(
  gathered: MeshAxes, vocab: MeshAxes, x: Any, chunks: Any, entries: Any, targets: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
  arrays = [operand.value for operand in (x, chunks, entries, targets)]
  losses, log_sum = _losses(gathered, vocab, *arrays)
  # An empty tuple says that the kernel trains: only the structure of what is kept is static.
  return losses, (*arrays, log_sum, () if chunks.perturbed else None)


def _chunked_backward(
  gathered: MeshAxes, vocab: MeshAxes, saved: tuple[Any, ...], g: jax.Array
) -> tuple[jax.Array | None, ...]:
  # The gradient of all devices' uses together, of which each device has the part of its own logits.
  x, chunks, entries, targets, log_sum, needs_kernel = saved
  weights = jnp.where(targets != IGNORE_INDEX, jax.lax.psum(g, vocab) if vocab else g, 0.0)

  def add(dx: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array | None]:
    piece, entries = chunk
    probs = jnp.exp(logits_of(gathered, x, piece, entries) - log_sum[:, None])
    d_logits = ((probs - (entries == targets[:, None])) * weights[:, None]).astype(x.dtype)
    dx += jnp.dot(d_logits, all_gathered(gathered, piece, x.dtype).T, preferred_element_type=jnp.float32)
    if needs_kernel is None:
      return dx, None
    d_piece = jnp.dot(x.T, d_logits, preferred_element_type=jnp.float32)
    if gathered:
      d_piece = jax.lax.psum_scatter(d_piece, gathered, scatter_dimension=0, tiled=True)
    return dx, d_piece.astype(piece.dtype)

  dx, d_chunks = jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), (chunks, entries))
  return dx.astype(x.dtype), d_chunks, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward, symbolic_zeros=True)
