"""Feed-forwards of experts: how tokens reach them, and Qwen3-MoE's.

A router gives every token k of E experts and a weight for each. Pairs of token and expert are sorted by expert,
each expert multiplies its own run of rows, and each token sums what comes back. No expert is ever full: all
tokens reach all experts they chose, so a token's numbers do not depend on who else is in the batch.

Letters: B rows, T tokens, M tokens of all rows, D width, E experts, F width of one expert; k experts a token.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from internvl_jax.models.layers import Linear, make_param


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

  def __call__(self, x: jax.Array, *, valid: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Maps x [B, T, D]; `valid` bool [B, T] names the tokens that the second result counts, None all.

    Returns:
      The outputs [B, T, D] and `router_statistics`.
    """
    # In float32: rounded scores would choose other experts.
    probs = jax.nn.softmax(self.gate(x.astype(jnp.float32)), axis=-1)
    weights, chosen = jax.lax.top_k(probs, self.top_k)
    if self.normalize:
      weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return self.experts(x, chosen, weights), router_statistics(probs, chosen, valid)


class SwiGLUExperts(nnx.Module):
  """E feed-forwards of the kind of `decoder.DecoderMLP`, stacked."""

  def __init__(self, config: MoEConfig, hidden_size: int, rngs: nnx.Rngs):
    E, D, F = config.num_experts, hidden_size, config.intermediate_size
    self.gate_proj = make_param(fresh_experts(rngs, (E, D, F)), ("expert", "embed", "mlp"))
    self.up_proj = make_param(fresh_experts(rngs, (E, D, F)), ("expert", "embed", "mlp"))
    self.down_proj = make_param(fresh_experts(rngs, (E, F, D)), ("expert", "mlp", "embed"))

  def __call__(self, x: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
    """Maps x [B, T, D] by the experts `chosen` [B, T, k], summed with `weights` [B, T, k]."""

    def apply(rows, ids, sizes):
      del ids
      gate = jax.lax.ragged_dot(rows, self.gate_proj[...].astype(x.dtype), sizes)
      up = jax.lax.ragged_dot(rows, self.up_proj[...].astype(x.dtype), sizes)
      return jax.lax.ragged_dot(jax.nn.silu(gate) * up, self.down_proj[...].astype(x.dtype), sizes)

    return grouped(x, chosen, weights, num_experts=self.gate_proj.shape[0], apply=apply)


def fresh_experts(rngs: nnx.Rngs, shape: tuple[int, int, int]) -> jax.Array:
  """Kernels [E, width in, width out] with the standard deviation of `layers.Linear`."""
  return jax.random.normal(rngs.params(), shape) / math.sqrt(shape[1])


def grouped(
  x: jax.Array,
  chosen: jax.Array,
  weights: jax.Array,
  *,
  num_experts: int,
  apply: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
  """Sends tokens to their experts and sums what comes back.

  Rows move by permutations and their inverses only, forward and backward: scatter-adds are slow on
  accelerators, and on GPUs they add in no fixed order.

  Args:
    x: [..., D].
    chosen: int [..., k], the experts of each token.
    weights: [..., k], what their outputs count.
    num_experts: E.
    apply: the experts: function (rows [M*k, D] sorted by expert, experts of the rows int [M*k], rows of each
      expert int [E]) -> [M*k, D].

  Returns:
    [..., D] in the dtype of x.
  """
  D = x.shape[-1]
  ids = chosen.reshape(-1)
  order = jnp.argsort(ids)
  inverse = jnp.argsort(order)
  rows = _take(x.reshape(-1, D), order, inverse)
  sorted_ids = ids.at[order].get(mode="promise_in_bounds")
  out = apply(rows, sorted_ids, jnp.bincount(ids, length=num_experts))
  out = _take(out, inverse, order).reshape(*weights.shape, D)
  return jnp.sum(out * weights.astype(out.dtype)[..., None], axis=-2)


@jax.custom_vjp
def _take(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
  """`order` [M*k] applied to the rows of x [M, D], each repeated k times; `inverse` undoes it."""
  repeats = order.shape[0] // x.shape[0]
  return x.at[order // repeats].get(mode="promise_in_bounds")


def _take_forward(x, order, inverse):
  # An array without elements tells how many rows x has: only shapes are static.
  return _take(x, order, inverse), (inverse, jnp.zeros((x.shape[0], 0)))


def _take_backward(saved, g):
  inverse, rows = saved
  g = g.at[inverse].get(mode="promise_in_bounds")
  return jnp.sum(g.reshape(rows.shape[0], -1, g.shape[-1]), axis=1), None, None


_take.defvjp(_take_forward, _take_backward)


def router_statistics(probs: jax.Array, chosen: jax.Array, valid: jax.Array | None) -> dict[str, jax.Array]:
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


def load_balancing_loss(load: jax.Array, prob: jax.Array, tokens: jax.Array, *, shards: int) -> jax.Array:
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

  def mean(value):
    value = jnp.sum(value.reshape(L, shards, R // shards, E), axis=(0, 2))
    return value / jnp.maximum(total, 1.0)[:, None]

  return E * jnp.mean(jnp.sum(mean(load) * mean(prob), axis=-1))
