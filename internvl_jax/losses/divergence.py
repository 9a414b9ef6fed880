"""The Kullback-Leibler divergence of next-token distributions from a teacher's, plain and by chunks of the vocabulary.

Both distributions are softmaxes of products of hidden states with an output embedding; neither's logits are ever there
whole. See `vocab_parallel` for how tokens and kernels are sharded.

Letters: R rows, S tokens, E width, V vocabulary; on a device: M tokens, n chunks of C entries.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from internvl_jax.losses.vocab_parallel import all_gathered, logits_of, over_vocabulary
from internvl_jax.parallel.rules import MeshAxes


def token_divergences(
  logits: Float[Array, "*tokens V"], teacher: Float[Array, "*tokens V"]
) -> Float[Array, "*tokens"]:
  """KL(softmax(teacher) || softmax(logits)) of logits [..., V] in float32."""
  ours, theirs = jax.nn.log_softmax(logits), jax.nn.log_softmax(teacher)
  return jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)


def linear_token_divergences(
  hidden: Float[Array, "R S E"],
  kernel: Float[Array, "E V"],
  teacher_hidden: Float[Array, "R S E"],
  teacher_kernel: Float[Array, "E V"],
) -> Float[Array, "R S"]:
  """KL(softmax(teacher_hidden @ teacher_kernel) || softmax(hidden @ kernel)), on a mesh or without one.

  Nothing is differentiated with respect to the teacher's.

  Args:
    hidden: [R, S, E] in the compute dtype.
    kernel: [E, V], cast to the dtype of `hidden`.
    teacher_hidden: [R, S, E] in the compute dtype.
    teacher_kernel: [E, V], sharded as `kernel`, which it may be itself.

  Returns:
    float32 [R, S], sharded like the tokens.
  """
  teacher_hidden, teacher_kernel = jax.lax.stop_gradient((teacher_hidden, teacher_kernel))
  return over_vocabulary(_chunked, hidden, (kernel, teacher_kernel), teacher_hidden)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(
  gathered: MeshAxes,
  vocab: MeshAxes,
  x: jax.Array,
  chunks: tuple[jax.Array, jax.Array],
  entries: jax.Array,
  teacher_x: jax.Array,
) -> jax.Array:
  """Divergences [M] of tokens x [M, E] by kernels [n, pieces of E, C], ours and the teacher's, of entries [n, C].

  Args:
    gathered: axes of the mesh that hold pieces of E.
    vocab: those that share tokens and split the vocabulary.
    x, chunks, entries, teacher_x: see above.
  """
  return _divergences(gathered, vocab, (x, teacher_x), chunks, entries)[0]


def _divergences(
  gathered: MeshAxes,
  vocab: MeshAxes,
  tokens: tuple[jax.Array, jax.Array],
  kernels: tuple[jax.Array, jax.Array],
  entries: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The divergences [M], and the logarithms of both softmaxes' denominators [2, M].

  With logits s of ours and t of the teacher's, whose probabilities are p, the divergence is the mean of t - s by p, less the
  difference of those logarithms. That difference is also -log of the mean of exp(s - t) by p, which keeps the digits of
  small divergences; it is taken where no |t - s| is above 1.
  """

  def add(carry: tuple[jax.Array, ...], chunk: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], None]:
    tops, sums, means, farthest = carry
    logits = _both_logits(gathered, tokens, chunk[:2], chunk[2])
    new_tops = jnp.maximum(tops, jnp.max(logits, axis=-1))
    terms = jnp.exp(logits - new_tops[..., None])
    old = jnp.exp(tops - new_tops)
    sums = sums * old + jnp.sum(terms, axis=-1)
    difference = logits[1] - logits[0]
    both = jnp.stack([difference, jnp.expm1(jnp.clip(-difference, -1.0, 1.0))])
    means = means * old[1] + jnp.sum(terms[1] * both, axis=-1)
    return (new_tops, sums, means, jnp.maximum(farthest, jnp.max(jnp.abs(difference), axis=-1))), None

  zero = jnp.zeros((2, tokens[0].shape[0]), jnp.float32)
  start = (jnp.full_like(zero, jnp.finfo(jnp.float32).min), zero, zero, zero[0])
  (tops, sums, means, farthest), _ = jax.lax.scan(add, start, (*kernels, entries))
  if vocab:
    highest, farthest = jax.lax.pmax((tops, farthest), vocab)
    rescale = jnp.exp(tops - highest)
    sums, means = jax.lax.psum((sums * rescale, means * rescale[1]), vocab)
    tops = highest
  log_sums = tops + jnp.log(sums)
  difference, excess = means / sums[1]
  return difference + jnp.where(farthest > 1, log_sums[0] - log_sums[1], jnp.log1p(excess)), log_sums


def _both_logits(
  gathered: MeshAxes, tokens: tuple[jax.Array, ...], pieces: tuple[jax.Array, ...], entries: jax.Array
) -> jax.Array:
  """Scores [2, M, C] in float32: ours and the teacher's."""
  both = zip(tokens, pieces, strict=True)
  return jnp.stack([logits_of(gathered, x, piece, entries) for x, piece in both])


def _chunked_forward(
  gathered: MeshAxes, vocab: MeshAxes, x: Any, chunks: tuple[Any, Any], entries: Any, teacher_x: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
  tokens, kernels = (x.value, teacher_x.value), (chunks[0].value, chunks[1].value)
  found, log_sums = _divergences(gathered, vocab, tokens, kernels, entries.value)
  # An empty tuple says that the kernel trains: only the structure of what is kept is static.
  return found, (tokens, kernels, entries.value, log_sums, () if chunks[0].perturbed else None)


def _chunked_backward(
  gathered: MeshAxes, vocab: MeshAxes, saved: tuple[Any, ...], g: jax.Array
) -> tuple[Any, ...]:
  # By our logits, the divergence's gradient is our probabilities less the teacher's.
  tokens, kernels, entries, log_sums, needs_kernel = saved
  x, weights = tokens[0], jax.lax.psum(g, vocab) if vocab else g

  def add(dx: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array | None]:
    piece, entries = chunk[0], chunk[2]
    ours, theirs = jnp.exp(_both_logits(gathered, tokens, chunk[:2], entries) - log_sums[..., None])
    d_logits = ((ours - theirs) * weights[:, None]).astype(x.dtype)
    dx += jnp.dot(
      d_logits,
      all_gathered(gathered, piece, x.dtype).T,
      preferred_element_type=jnp.float32,
    )
    if needs_kernel is None:
      return dx, None
    d_piece = jnp.dot(x.T, d_logits, preferred_element_type=jnp.float32)
    if gathered:
      d_piece = jax.lax.psum_scatter(d_piece, gathered, scatter_dimension=0, tiled=True)
    return dx, d_piece.astype(piece.dtype)

  dx, d_chunks = jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), (*kernels, entries))
  return dx.astype(x.dtype), (d_chunks, None), None, None


_chunked.defvjp(_chunked_forward, _chunked_backward, symbolic_zeros=True)
