"""Attention: one signature, a mask, and a table of backends.

Letters: B rows, T queries, S keys, N query heads, K key-value heads, G = N/K, H head width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from internvl_jax.models.attention.backends import BACKENDS
from internvl_jax.models.attention.mask import Mask, SharedPrompts
from internvl_jax.models.attention.sharding import Over
from internvl_jax.models.kernels import find

__all__ = ["BACKENDS", "Mask", "SharedPrompts", "attention"]


def attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  mask: Mask,
  *,
  sinks: Float[Array, " N"] | None = None,
  over: Over = "rows",
  backend: str = "xla",
) -> Float[Array, "B T N H"]:
  """Scaled dot-product attention with grouped heads; softmax in float32.

  Args:
    q: [B, T, N, H]. k, v: [B, S, K, H] with N a multiple of K.
    mask: which keys a query sees.
    sinks: [N] learned scores of a key without a value, one a head, that takes its share of the softmax
      (arXiv:2309.17453; gpt-oss).
    over: what B counts, which says how it is sharded over a mesh.
    backend: the name of a row of `BACKENDS`.

  Returns:
    [B, T, N, H] in the dtype of q.

  Raises:
    ValueError: an unknown backend, or one that cannot do what is asked.
  """
  row = find(BACKENDS, backend)
  needs = mask.needs | ({"sinks"} if sinks is not None else set())
  if "shared prompts" in needs - row.takes:
    return _in_turns(q, k, v, mask, sinks=sinks, over=over, backend=backend)
  if missing := needs - row.takes:
    raise ValueError(f"attention backend {backend!r} has no {' and no '.join(sorted(missing))}: use 'xla'")
  return row.load()(q, k, v, mask, sinks, over)


def _in_turns(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, **options: Any) -> jax.Array:
  """Attention to shared prompts where equal segments are all that a kernel can tell.

  Once for each answer: what is shared belongs to the first answer, then to the second, of which the queries are taken,
  and so on.
  """
  out = attention(q, k, v, mask.without_parents(), **options)
  for number in range(1, mask.answers):
    moved = attention(q, k, v, mask.with_prompts_moved(number), **options)
    out = jnp.where((mask.answer_number == number)[..., None, None], moved, out)
  return out
