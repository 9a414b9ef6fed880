"""Feed-forwards of experts: how tokens reach them, and Qwen3-MoE's.

A router gives every token k of E experts and a weight for each. Pairs of token and expert are sorted by expert,
each expert multiplies its own run of rows, and each token sums what comes back. No expert is ever full: all
tokens reach all experts they chose, so a token's numbers do not depend on who else is in the batch.

Letters: B rows, T tokens, M tokens of all rows, D width, E experts, F width of one expert; k experts a token.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh
from jaxtyping import Array, Bool, Float, Int, Num

from internvl_jax.models.base_weights import expert_kernels
from internvl_jax.models.grouped_matmul import grouped_matmul
from internvl_jax.models.kernels import Kernels
from internvl_jax.models.layers import Linear, make_param
from internvl_jax.parallel.mesh import DATA_AXES, FSDP_OUTER
from internvl_jax.parallel.rules import (
  ACTIVATIONS,
  MeshAxes,
  Names,
  all_gather,
  dividing_axes,
  mesh_in_scope,
  spec,
  weight_entries,
  without,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
  """Qwen3-MoE's feed-forward.

  Attributes:
    num_experts, top_k, intermediate_size: E, k, F.
    normalize_top_k: a token's k weights are made to sum to one.
  """

  num_experts: int
  top_k: int
  intermediate_size: int
  normalize_top_k: bool

  def build(self, hidden_size: int, rngs: nnx.Rngs) -> nnx.Module:
    return MoE(self, hidden_size, rngs)


class MoE(nnx.Module):
  """A softmax router over SwiGLU experts."""

  def __init__(self, config: MoEConfig, hidden_size: int, rngs: nnx.Rngs):
    self.top_k, self.normalize = config.top_k, config.normalize_top_k
    self.gate = Linear(hidden_size, config.num_experts, bias=False, axes=("embed", None), rngs=rngs)
    self.experts = SwiGLUExperts(config, hidden_size, rngs)

  def __call__(
    self, x: Float[Array, "B T D"], *, valid: Bool[Array, "B T"] | None, kernels: Kernels | None = None
  ) -> tuple[Float[Array, "B T D"], dict[str, jax.Array]]:
    """Maps x [B, T, D]; `valid` bool [B, T] names the tokens that the second result counts, None all.

    `kernels` names how experts multiply; None is XLA's way.

    Returns:
      The outputs [B, T, D] and `router_statistics`.
    """
    # In float32: rounded scores would choose other experts.
    probs = jax.nn.softmax(self.gate(x.astype(jnp.float32)), axis=-1)
    weights, chosen = jax.lax.top_k(probs, self.top_k)
    if self.normalize:
      weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return self.experts(x, chosen, weights, (kernels or Kernels()).experts), router_statistics(
      probs, chosen, valid
    )


class SwiGLUExperts(nnx.Module):
  """E feed-forwards of the kind of `decoder.DecoderMLP`, stacked."""

  AXES: ClassVar[dict[str, Names]] = {
    "gate_proj": ("expert", "embed", "mlp"),
    "up_proj": ("expert", "embed", "mlp"),
    "down_proj": ("expert", "mlp", "embed"),
  }

  def __init__(self, config: MoEConfig, hidden_size: int, rngs: nnx.Rngs):
    E, D, F = config.num_experts, hidden_size, config.intermediate_size
    self.gate_proj = make_param(fresh_experts(rngs, (E, D, F)), self.AXES["gate_proj"])
    self.up_proj = make_param(fresh_experts(rngs, (E, D, F)), self.AXES["up_proj"])
    self.down_proj = make_param(fresh_experts(rngs, (E, F, D)), self.AXES["down_proj"])

  def __call__(
    self,
    x: Float[Array, "B T D"],
    chosen: Int[Array, "B T k"],
    weights: Float[Array, "B T k"],
    backend: str = "xla",
  ) -> Float[Array, "B T D"]:
    """Maps x [B, T, D] by the experts `chosen` [B, T, k], summed with `weights` [B, T, k]."""
    product = functools.partial(grouped_matmul, backend=backend)

    stored, axes, restore = expert_kernels(self, x.dtype)

    def apply(stored: Mapping[str, jax.Array], rows: jax.Array, ids: jax.Array, sizes: jax.Array):
      del ids
      kernels = restore(stored)
      gate = product(rows, kernels["gate_proj"], sizes)
      up = product(rows, kernels["up_proj"], sizes)
      return product(jax.nn.silu(gate) * up, kernels["down_proj"], sizes)

    return dispatch_to_experts(x, chosen, weights, kernels=stored, axes=axes, apply=apply)


def fresh_experts(rngs: nnx.Rngs, shape: tuple[int, int, int]) -> Float[Array, "E D F"]:
  """Kernels [E, width in, width out] with the standard deviation of `layers.Linear`."""
  return jax.random.normal(rngs.params(), shape) / math.sqrt(shape[1])


Experts = Callable[[Mapping[str, jax.Array], jax.Array, jax.Array, jax.Array], jax.Array]
"""Function (kernels [E, ...], rows [M*k, D] sorted by expert, their experts int [M*k], rows of each expert int [E]) ->
[M*k, D]."""


def dispatch_to_experts(
  x: Float[Array, "B T D"],
  chosen: Int[Array, "B T k"],
  weights: Float[Array, "B T k"],
  *,
  kernels: Mapping[str, jax.Array],
  axes: Mapping[str, Names],
  apply: Experts,
) -> Float[Array, "B T D"]:
  """Sends tokens to their experts and sums what comes back.

  On a mesh, the devices that share the experts all-gather each other's tokens, compute what their own experts
  say of all of them, and sum the parts into the tokens' places. Since a token chooses about as many experts as
  there are such devices, sending each token only where it is wanted would hardly send less; and shapes depend
  on nobody's choice, so that no expert can be full.

  Args:
    x: [B, T, D].
    chosen: int [B, T, k], the experts of each token.
    weights: [B, T, k], what their outputs count.
    kernels: the experts' parameters [E, ...], as they are stored (`base_weights.expert_kernels`).
    axes: their logical axes.
    apply: what the experts compute.

  Returns:
    [B, T, D] in the dtype of x.
  """
  mesh = mesh_in_scope()
  if mesh is None:
    return _by_expert(x, chosen, weights, kernels, apply=apply)
  return _on_mesh(mesh, x, chosen, weights, kernels, axes=axes, apply=apply)


def _on_mesh(
  mesh: AbstractMesh,
  x: jax.Array,
  chosen: jax.Array,
  weights: jax.Array,
  kernels: Mapping[str, jax.Array],
  *,
  axes: Mapping[str, Names],
  apply: Experts,
) -> jax.Array:
  """`dispatch_to_experts` on several devices."""
  rows = dividing_axes(ACTIVATIONS["rows"], x.shape[0], mesh)
  tokens = dividing_axes(ACTIVATIONS["tokens"], x.shape[1], mesh)
  stored = {name: weight_entries(axes[name], kernel.shape, mesh) for name, kernel in kernels.items()}
  experts = next(iter(stored.values()))[0]
  mlp = [set(stored[name][i]) for name in stored for i, axis in enumerate(axes[name]) if axis == "mlp"]
  # The devices of the data axes have tokens of their own.
  sharing = without(mesh.axis_names, DATA_AXES)
  inner = tuple(axis for axis in sharing if all(axis in entry for entry in mlp))
  partial = (*experts, *inner)

  def local(
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    kernels: Mapping[str, jax.Array],
    expert_part: jax.Array,
    inner_part: jax.Array,
  ):
    kernels = {name: _all_gather(kernel, stored[name], keep=partial) for name, kernel in kernels.items()}
    for name in axes:
      # What is added to the sum over the feed-forward's width is added once: a bias.
      if "mlp" not in axes[name] and kernels[name].ndim == 2:
        kernels[name] = jnp.where(inner_part[0] == 0, kernels[name], 0)
    shared = [axis for axis in partial if axis in tokens]
    for axis in shared:
      x, chosen, weights = (jax.lax.all_gather(a, axis, axis=1, tiled=True) for a in (x, chosen, weights))
    part = expert_part[0] if experts else None
    y = _by_expert(x, chosen, weights, kernels, apply=apply, part=part)
    for axis in reversed(shared):
      y = jax.lax.psum_scatter(y, axis, scatter_dimension=1, tiled=True)
    others = tuple(axis for axis in partial if axis not in tokens)
    return jax.lax.psum(y, others) if others else y

  parts = [jnp.arange(math.prod(mesh.shape[axis] for axis in group)) for group in (experts, inner)]
  spread = spec(rows, tokens, ())
  return jax.shard_map(
    local,
    in_specs=(
      *[spread] * 3,
      {name: spec(*entries) for name, entries in stored.items()},
      spec(experts),
      spec(inner),
    ),
    out_specs=spread,
    check_vma=False,
  )(x, chosen, weights, dict(kernels), *parts)


def _all_gather(kernel: jax.Array, stored: Sequence[MeshAxes], *, keep: MeshAxes) -> jax.Array:
  """A kernel's pieces on the other devices, but those along the axes to keep."""
  # Over the groups of `fsdp` first, as `Product.used` does.
  for i in sorted(range(len(stored)), key=lambda i: FSDP_OUTER not in stored[i]):
    others = without(stored[i], keep)
    if others:
      kernel = all_gather(kernel, others, axis=i)
  return kernel


def _by_expert(
  x: jax.Array,
  chosen: jax.Array,
  weights: jax.Array,
  kernels: Mapping[str, jax.Array],
  *,
  apply: Experts,
  part: jax.Array | None = None,
) -> jax.Array:
  """`grouped` on one device, which has all experts, or this part of them.

  Rows move by permutations and their inverses only, forward and backward: scatter-adds are slow on
  accelerators, and on GPUs they add in no fixed order.
  """
  D = x.shape[-1]
  num_experts = len(next(iter(kernels.values())))
  ids = chosen.reshape(-1)
  if part is not None:
    # What other devices' experts are to compute comes last, after the rows that are computed here.
    ids = ids - part * num_experts
    ids = jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts)
  order = jnp.argsort(ids)
  inverse = jnp.argsort(order)
  rows = _take(x.reshape(-1, D), order, inverse)
  sorted_ids = ids.at[order].get(mode="promise_in_bounds")
  sizes = jnp.bincount(ids, length=num_experts + 1)[:num_experts]
  if part is None:
    out = apply(kernels, rows, sorted_ids, sizes)
  else:
    # What rows without an expert hold is left open; masked before and after, they add nothing to any gradient.
    mine = (sorted_ids < num_experts)[:, None]
    out = apply(kernels, jnp.where(mine, rows, 0), jnp.minimum(sorted_ids, num_experts - 1), sizes)
    out = jnp.where(mine, out, 0)
  out = _take(out, inverse, order).reshape(*weights.shape, D)
  return jnp.sum(out * weights.astype(out.dtype)[..., None], axis=-2)


@jax.custom_vjp
def _take(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
  """`order` [M*k] applied to the rows of x [M, D], each repeated k times; `inverse` undoes it."""
  repeats = order.shape[0] // x.shape[0]
  return x.at[order // repeats].get(mode="promise_in_bounds")


def _take_forward(x: jax.Array, order: jax.Array, inverse: jax.Array):
  # An array without elements tells how many rows x has: only shapes are static.
  return _take(x, order, inverse), (inverse, jnp.zeros((x.shape[0], 0)))


def _take_backward(saved: Any, g: jax.Array):
  inverse, rows = saved
  g = g.at[inverse].get(mode="promise_in_bounds")
  return jnp.sum(g.reshape(rows.shape[0], -1, g.shape[-1]), axis=1), None, None


_take.defvjp(_take_forward, _take_backward)


def router_statistics(
  probs: Float[Array, "B T E"], chosen: Int[Array, "B T k"], valid: Bool[Array, "B T"] | None
) -> dict[str, Float[Array, "B E"]]:
  """What `load_balancing_loss` needs to know of a layer, for each row.

  Args:
    probs: float32 [B, T, E], the softmax of all the router's scores.
    chosen: int [B, T, k].
    valid: bool [B, T], the tokens that count; None counts all.

  Returns:
    router_load: float32 [B, E], how often the row's tokens chose each expert.
    router_prob: float32 [B, E], the sum of their probabilities.
  """
  load = jnp.sum(jax.nn.one_hot(chosen, probs.shape[-1], dtype=jnp.float32), axis=-2)
  if valid is not None:
    load, probs = (jnp.where(valid[..., None], value, 0.0) for value in (load, probs))
  return {"router_load": jnp.sum(load, axis=1), "router_prob": jnp.sum(probs, axis=1)}


def load_balancing_loss(
  load: Float[Array, "L R E"], prob: Float[Array, "L R E"], tokens: Num[Array, " R"], *, shards: int
) -> Float[Array, ""]:
  """The auxiliary loss of Switch Transformer (arXiv:2101.03961, equations 4 to 6), as Hugging Face computes it.

  E times the sum over experts of the share of tokens that chose it and its mean probability, both over the
  tokens of all layers together. With k choices a token, shares sum to k: an even load costs k. Gradients
  reach the router through its probabilities.

  Args:
    load, prob: float32 [L, R, E], the `router_statistics` of L layers.
    tokens: [R], how many tokens of each row were counted.
    shards: data shards, each with R/shards consecutive rows. Each balances its own tokens, and the loss is
      the mean of theirs, as on the devices of a data-parallel run. A shard without tokens counts as 0.
  """
  L, R, E = load.shape
  total = L * jnp.sum(tokens.reshape(shards, R // shards), axis=1, dtype=jnp.float32)

  def mean(value: jax.Array):
    value = jnp.sum(value.reshape(L, shards, R // shards, E), axis=(0, 2))
    return value / jnp.maximum(total, 1.0)[:, None]

  return E * jnp.mean(jnp.sum(mean(load) * mean(prob), axis=-1))
