"""InternVL3.5-Flash: a router that gives some tiles a quarter of the image tokens (arXiv:2508.18265, section 2.4).

    ViT tokens -> mlp1                    P tokens of a tile, as in every InternVL
               -> mlp2                    Q = P / 4 tokens of the same tile: it is compressed
               -> pooling -> gating       the probability that a tile may be compressed

Names and order of the layers are the published checkpoints'. Their dropout, of 0.1 in mlp2 and gating, is left out.

Letters: I tiles, P patches of a tile, C ViT width, N heads, H head width, D language model width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from internvl_jax.models.layers import LayerNorm, Linear, make_param

HEADS = 16
"""Heads of the pooling's attention, which no checkpoint states."""

PARTS = ("mlp2", "pooling_before_gating", "gating")
"""The parts that a Flash has beside those of every InternVL."""

UNUSED = tuple(f"pooling_before_gating.{kind}{number}." for kind in ("attn", "norm") for number in (3, 4))
"""What paths of parameters begin with that checkpoints store, and that neither the published code nor this one reads."""

_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashConfig:
  """When a tile is compressed: its probability is above a quantile of the question's, and at least an absolute one.

  Attributes:
    relative_threshold: the quantile, from 0 to 1.
    absolute_threshold: the probability, from 0 to 1.
  """

  relative_threshold: float
  absolute_threshold: float


class CompressingProjector(nnx.Module):
  """LayerNorm and three linear layers with exact GELUs between them: from `d_in` = 16 C to `d_out` = D over 2 D."""

  def __init__(self, d_in: int, d_out: int, *, rngs: nnx.Rngs):
    self.layer_norm = LayerNorm(d_in, eps=_EPSILON, axis="patch")
    self.linear_1 = Linear(d_in, 2 * d_out, bias=True, axes=("patch", "vision"), over="tiles", rngs=rngs)
    self.linear_2 = Linear(2 * d_out, 2 * d_out, bias=True, axes=("vision", "embed"), over="tiles", rngs=rngs)
    self.linear_3 = Linear(2 * d_out, d_out, bias=True, axes=("embed", "vision"), over="tiles", rngs=rngs)

  def __call__(self, x: Float[Array, "I Q wide"]) -> Float[Array, "I Q D"]:
    x = jax.nn.gelu(self.linear_1(self.layer_norm(x)), approximate=False)
    return self.linear_3(jax.nn.gelu(self.linear_2(x), approximate=False))


class PoolingAttention(nnx.Module):
  """Multi-head attention of one query on a tile's tokens, with one projection for queries, keys and values."""

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    self.in_proj = Linear(width, 3 * width, bias=True, axes=("embed", "vision"), over="tiles", rngs=rngs)
    self.out_proj = Linear(width, width, bias=True, axes=("vision", "embed"), over="tiles", rngs=rngs)

  def keys_and_values(
    self, tokens: Float[Array, "I P C"]
  ) -> tuple[Float[Array, "I P N H"], Float[Array, "I P N H"]]:
    """What the query looks at."""
    _, k, v = jnp.split(self.in_proj(tokens), 3, axis=-1)
    heads = (*tokens.shape[:2], HEADS, -1)
    return k.reshape(heads), v.reshape(heads)

  def __call__(
    self, x: Float[Array, "I 1 C"], k: Float[Array, "I P N H"], v: Float[Array, "I P N H"]
  ) -> Float[Array, "I 1 C"]:
    q = jnp.split(self.in_proj(x), 3, axis=-1)[0].reshape(x.shape[0], HEADS, -1) * k.shape[-1] ** -0.5
    scores = jnp.einsum("inh,ipnh->inp", q, k, preferred_element_type=jnp.float32)
    share = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return self.out_proj(jnp.einsum("inp,ipnh->inh", share, v).reshape(x.shape))


class TokenPooling(nnx.Module):
  """A tile as one vector: a learned query that looks at the tile's tokens four times.

  The published code looks by the first attention once and by the second three times. Checkpoints have a third and a fourth,
  which are kept as they are.
  """

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    self.query_token = make_param(jax.random.normal(rngs.params(), (1, width)), (None, None))
    self.attn1, self.attn2, self.attn3, self.attn4 = (PoolingAttention(width, rngs=rngs) for _ in range(4))
    self.norm1, self.norm2, self.norm3, self.norm4 = (LayerNorm(width, eps=_EPSILON) for _ in range(4))

  def __call__(self, tokens: Float[Array, "I P C"]) -> Float[Array, "I 1 C"]:
    query = self.query_token[...].astype(tokens.dtype)
    x = jnp.broadcast_to(query, (tokens.shape[0], *query.shape))
    for attend, norm, times in ((self.attn1, self.norm1, 1), (self.attn2, self.norm2, 3)):
      k, v = attend.keys_and_values(tokens)
      for _ in range(times):
        x = norm(attend(x, k, v))
    return x


class GatingBlock(nnx.Module):
  """x + LayerNorm(linear(GELU(linear(x)))), over four times the width."""

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    self.linear_1 = Linear(width, 4 * width, bias=True, axes=("embed", "vision"), over="tiles", rngs=rngs)
    self.linear_2 = Linear(4 * width, width, bias=True, axes=("vision", "embed"), over="tiles", rngs=rngs)
    self.layer_norm = LayerNorm(width, eps=_EPSILON)

  def __call__(self, x: Float[Array, "I 1 C"]) -> Float[Array, "I 1 C"]:
    return x + self.layer_norm(self.linear_2(jax.nn.gelu(self.linear_1(x), approximate=False)))


class Gate(nnx.Module):
  """LayerNorm and a linear layer to two logits: to compress, and not to."""

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    self.layer_norm = LayerNorm(width, eps=_EPSILON)
    self.linear = Linear(width, 2, bias=True, axes=("embed", None), over="tiles", rngs=rngs)

  def __call__(self, x: Float[Array, "I 1 C"]) -> Float[Array, "I 1 2"]:
    return self.linear(self.layer_norm(x))


class Gating(nnx.Module):
  """Four blocks and the gate."""

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    self.block1, self.block2, self.block3, self.block4 = (GatingBlock(width, rngs=rngs) for _ in range(4))
    self.gate = Gate(width, rngs=rngs)

  def __call__(self, x: Float[Array, "I 1 C"]) -> Float[Array, "I 2"]:
    """Logits [I, 2] in float32 of pooled tiles [I, 1, C]: to compress, and not to."""
    for block in (self.block1, self.block2, self.block3, self.block4):
      x = block(x)
    return self.gate(x)[:, 0].astype(jnp.float32)
