"""InternVL3.5-Flash: a router that gives some tiles a quarter of the image tokens (arXiv:2508.18265, section 2.4).

    ViT tokens -> mlp1                    P tokens of a tile, as in every InternVL
               -> mlp2                    Q = P / 4 tokens of the same tile: it is compressed
               -> pooling -> gating       the probability that a tile may be compressed

Names and order of the layers are the published checkpoints'. Their dropout, of 0.1 in mlp2 and gating, is left out.

Letters: I tiles, P patches of a tile, C ViT width, N heads, H head width, D language model width.
"""

import dataclasses
from collections.abc import Collection, Mapping

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


def fill_projector(params: Mapping[str, jax.Array], fresh: Collection[str]) -> dict[str, jax.Array]:
  """`params` with a drawn `mlp2` made of `mlp1`, so that a compressed tile's features are means of its usual ones.

  A token of a compressed tile stands for two by two usual ones. Its features are the mean of what mlp1 makes of the mean of
  the upper two and of that of the lower two; equal if their patches have the same mean and variance, since one
  normalization spans all four. A linear layer between the GELUs is one since gelu(x) - gelu(-x) = x.

  Args:
    params: by path.
    fresh: paths of those that are drawn.
  """
  own = [path for path in params if path.startswith("mlp2.")]
  if not own or not set(own) <= set(fresh):
    return dict(params)
  mlp1 = {path: value for path, value in params.items() if path.startswith("mlp1.")}
  make = jax.jit(_compressing, out_shardings={path: params[path].sharding for path in own})
  made = make(mlp1)
  return {**params, **{path: made[path].astype(params[path].dtype) for path in own}}


def _compressing(mlp1: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """mlp2's parameters from those of mlp1, in float32."""
  mlp1 = {path.removeprefix("mlp1."): value.astype(jnp.float32) for path, value in mlp1.items()}
  first, second = mlp1["linear_1.kernel"], mlp1["linear_2.kernel"]
  D, C = first.shape[1], first.shape[0] // 4

  def spread(values: jax.Array) -> jax.Array:
    """From the patches of one usual token [4 C, ...] to those of two by two, in the order of pixel_shuffle: [16 C, ...]."""
    values = values.reshape(1, 2, 1, 2, C, *values.shape[1:])
    return jnp.broadcast_to(values, (2, 2, 2, 2, *values.shape[4:])).reshape(16 * C, *values.shape[5:])

  upper = (jnp.arange(16 * C) < 8 * C)[:, None]
  halved = spread(first) / 2
  return {
    "mlp2.layer_norm.scale": spread(mlp1["layer_norm.scale"]),
    "mlp2.layer_norm.bias": spread(mlp1["layer_norm.bias"]),
    "mlp2.linear_1.kernel": jnp.concatenate(
      [jnp.where(upper, halved, 0), jnp.where(upper, 0, halved)], axis=1
    ),
    "mlp2.linear_1.bias": jnp.tile(mlp1["linear_1.bias"], 2),
    "mlp2.linear_2.kernel": jnp.tile(jnp.concatenate([second, -second], axis=1) / 2, (2, 1)),
    "mlp2.linear_2.bias": jnp.concatenate([mlp1["linear_2.bias"], -mlp1["linear_2.bias"]]),
    "mlp2.linear_3.kernel": jnp.concatenate([jnp.eye(D), -jnp.eye(D)]),
    "mlp2.linear_3.bias": jnp.zeros(D, jnp.float32),
  }
