"""How attention is sharded over a mesh.

Heads are split over as many axes as divide them, for which tokens and heads change places by an all-to-all
(arXiv:2309.14509). Over the rest, queries stay where their tokens are, and keys and values are all-gathered.

Letters: B rows, T queries, S keys, N query heads, K key-value heads, H head width.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jaxtyping import Array, Float

from internvl_jax.models.attention.mask import Mask
from internvl_jax.parallel.rules import ACTIVATIONS, MeshAxes, constrain, dividing_axes, mesh_in_scope, spec

Over = Literal["rows", "tiles"]
"""What B counts, which says how it is sharded (`parallel.rules.ACTIVATIONS`)."""

OnDevice = Callable[[jax.Array, jax.Array, jax.Array, Mask, jax.Array | None], jax.Array]
"""Attention on one device: function (q, k, v, mask, sinks) -> [B, T, N, H]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """Mesh axes of attention's arrays.

  Attributes:
    rows, queries, heads: the axes that split B, T and N.
    repeats: how often keys and values are repeated so that they split as the heads do.
  """

  rows: MeshAxes
  queries: MeshAxes
  heads: MeshAxes
  repeats: int

  @classmethod
  def of(
    cls, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], over: Over, mesh: AbstractMesh
  ) -> "Layout":
    """The layout of q [B, T, N, H] and k [B, S, K, H] on a mesh."""
    (B, T, N, _), K = q.shape, k.shape[2]
    rows = dividing_axes(ACTIVATIONS[over], B, mesh)
    heads, repeats = _head_axes(N, K, rows, mesh)
    queries = dividing_axes(ACTIVATIONS["tokens"], T, mesh, used=(*rows, *heads))
    return cls(rows=rows, queries=queries, heads=heads, repeats=repeats)

  def repeat(self, x: Float[Array, "B S K H"]) -> Float[Array, "B S repeated H"]:
    """Keys or values [B, S, K, H], each head as often as it is needed."""
    return jnp.repeat(x, self.repeats, axis=2) if self.repeats > 1 else x

  @property
  def q_spec(self) -> jax.sharding.PartitionSpec:
    """Of queries and outputs."""
    return spec(self.rows, self.queries, self.heads)

  @property
  def kv_spec(self) -> jax.sharding.PartitionSpec:
    """Of keys and values, all of whose tokens each device gets."""
    return spec(self.rows, None, self.heads)


def _head_axes(N: int, K: int, used: MeshAxes, mesh: AbstractMesh) -> tuple[MeshAxes, int]:
  """Mesh axes that split the heads, and how often keys and values are repeated so that they split alike."""
  axes = dividing_axes(ACTIVATIONS["attention_heads"], N, mesh, used)
  while N % math.lcm(K, math.prod(mesh.shape[axis] for axis in axes)):
    axes = axes[:-1]
  return axes, math.lcm(K, math.prod(mesh.shape[axis] for axis in axes)) // K


def by_token(x: Float[Array, "B L N H"], over: Over, *, cached: bool = False) -> Float[Array, "B L N H"]:
  """Holds q, k or v where its tokens are, so that it travels in the compute dtype; a cache's tokens lie together.

  What makes it would else be computed after the exchange, which is then of float32.
  """
  return constrain(x, over, None if cached else "tokens", "heads", None)


def shard_attention(
  attend: OnDevice,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  mask: Mask,
  sinks: Float[Array, " N"] | None,
  over: Over,
) -> Float[Array, "B T N H"]:
  """`attend` on every device of the mesh in scope, which has some heads of some rows and all keys; or here."""
  mesh = mesh_in_scope()
  if mesh is None:
    return attend(q, k, v, mask, sinks)
  layout = Layout.of(q, k, over, mesh)
  cached = mask.q_index is not None
  q = by_token(q, over)
  k, v = (layout.repeat(by_token(x, over, cached=cached)) for x in (k, v))
  if mask.causal and layout.queries and not cached:
    mask = dataclasses.replace(mask, q_index=jnp.arange(q.shape[1]))
  return jax.shard_map(
    attend,
    in_specs=(
      *(layout.q_spec, layout.kv_spec, layout.kv_spec),
      mask.specs(layout.rows, layout.queries),
      None if sinks is None else spec(layout.heads),
    ),
    out_specs=layout.q_spec,
    check_vma=False,
  )(q, k, v, mask, sinks)
