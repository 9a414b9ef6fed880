"""Weighted cross-entropy of the next token, plain and chunked.

Letters: M tokens, E width, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.losses import vocab_parallel
from internvl_jax.parallel.rules import mesh_in_scope

CHUNK = 1024
"""Tokens whose logits exist at a time in `chunked_linear_cross_entropy`."""


def cross_entropy(
  logits: Float[Array, "*tokens V"], targets: Int[Array, "*tokens"], weights: Float[Array, "*tokens"]
) -> Float[Array, ""]:
  """Weighted sum of -log softmax(logits)[target], in float32.

  Args:
    logits: [..., V] float32.
    targets: int [...]; IGNORE_INDEX adds nothing.
    weights: float32 [...], already normalized.
  """
  return jnp.sum(token_losses(logits, targets) * weights)


def token_losses(
  logits: Float[Array, "*tokens V"], targets: Int[Array, "*tokens"]
) -> Float[Array, "*tokens"]:
  """-log softmax(logits)[target] of logits [..., V] in float32; 0 at IGNORE_INDEX."""
  picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
  nll = jax.nn.logsumexp(logits, axis=-1) - picked
  return jnp.where(targets != IGNORE_INDEX, nll, 0.0)


def chunked_linear_cross_entropy(
  hidden: Float[Array, "*tokens E"],
  kernel: Float[Array, "E V"],
  targets: Int[Array, "*tokens"],
  weights: Float[Array, "*tokens"],
) -> Float[Array, ""]:
  """`cross_entropy(hidden @ kernel, targets, weights)` with the logits of CHUNK tokens in memory at a time.

  Gradients are computed on the way forward, since the loss is a sum: each chunk's logits are built once,
  not once more in the backward pass (as in Liger's fused linear cross-entropy, arXiv:2410.10989). A kernel
  that does not train costs no gradient.

  Args:
    hidden: [M, E] in the compute dtype; on a mesh [R, S, E].
    kernel: [E, V], cast to the dtype of `hidden`.
    targets: int [M] or [R, S]; IGNORE_INDEX adds nothing.
    weights: float32 [M] or [R, S], already normalized.
  """
  if mesh_in_scope() is not None:
    return jnp.sum(vocab_parallel.linear_token_losses(hidden, kernel, targets) * weights)
  hidden, targets, weights = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), weights.reshape(-1)
  M = hidden.shape[0]
  chunks = -(-M // CHUNK) if M > CHUNK else 1
  size = -(-M // chunks)
  pad = chunks * size - M
  hidden = jnp.pad(hidden, ((0, pad), (0, 0)))
  targets = jnp.pad(targets, (0, pad), constant_values=IGNORE_INDEX)
  weights = jnp.pad(weights, (0, pad))
  return _fused(
    hidden.reshape(chunks, size, -1), kernel, targets.reshape(chunks, size), weights.reshape(chunks, size)
  )


_Residuals = tuple[jax.Array, jax.Array | None]


@jax.custom_vjp
def _fused(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
  def add(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
    x, t, w = chunk
    return total + cross_entropy(_logits(x, kernel), t, w), None

  return jax.lax.scan(add, jnp.float32(0), (hidden, targets, weights))[0]


def _logits(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return jnp.dot(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


def _fused_forward(hidden: Any, kernel: Any, targets: Any, weights: Any) -> tuple[jax.Array, _Residuals]:
  needs_kernel = kernel.perturbed
  hidden, kernel, targets, weights = hidden.value, kernel.value, targets.value, weights.value

  def add(carry: Any, chunk: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
    total, d_kernel = carry
    x, t, w = chunk
    loss, d_logits = jax.value_and_grad(cross_entropy)(_logits(x, kernel), t, w)
    d_logits = d_logits.astype(x.dtype)
    if needs_kernel:
      d_kernel = d_kernel + jnp.dot(x.T, d_logits, preferred_element_type=jnp.float32)
    return (total + loss, d_kernel), jnp.dot(d_logits, kernel.astype(x.dtype).T)

  zero = jnp.zeros(kernel.shape, jnp.float32) if needs_kernel else None
  (total, d_kernel), d_hidden = jax.lax.scan(add, (jnp.float32(0), zero), (hidden, targets, weights))
  return total, (d_hidden, None if d_kernel is None else d_kernel.astype(kernel.dtype))


def _fused_backward(residuals: _Residuals, g: jax.Array) -> tuple[jax.Array | None, ...]:
  d_hidden, d_kernel = residuals

  def scale(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else (x * g).astype(x.dtype)

  return scale(d_hidden), scale(d_kernel), None, None


_fused.defvjp(_fused_forward, _fused_backward, symbolic_zeros=True)
