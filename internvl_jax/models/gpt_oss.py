"""The feed-forward of gpt-oss: experts with biases and a clamped, shifted SwiGLU.

What else is its own, attention sinks and windows, are switches of `decoder.DecoderConfig`.

Letters: B rows, T tokens, M tokens of all rows, D width, E experts, F width of one expert; k experts a token.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from internvl_jax.models.base_weights import expert_kernels
from internvl_jax.models.grouped_matmul import grouped_matmul
from internvl_jax.models.kernels import Kernels
from internvl_jax.models.layers import Linear, make_param
from internvl_jax.models.moe import dispatch_to_experts, fresh_experts, router_statistics
from internvl_jax.parallel.rules import Names


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptOssMLPConfig:
  """The feed-forward of gpt-oss.

  Attributes:
    num_experts, top_k, intermediate_size: E, k, F.
    limit: what gate and up are clamped to.
    alpha: the gate is gate * sigmoid(alpha * gate).
  """

  num_experts: int
  top_k: int
  intermediate_size: int
  limit: float = 7.0
  alpha: float = 1.702

  def build(self, hidden_size: int, rngs: nnx.Rngs) -> nnx.Module:
    return GptOssMLP(self, hidden_size, rngs)


class GptOssMLP(nnx.Module):
  """A router whose k best scores share a softmax, over `GptOssExperts`."""

  def __init__(self, config: GptOssMLPConfig, hidden_size: int, rngs: nnx.Rngs):
    self.top_k = config.top_k
    self.router = Linear(hidden_size, config.num_experts, bias=True, axes=("embed", None), rngs=rngs)
    self.experts = GptOssExperts(config, hidden_size, rngs)

  def __call__(
    self, x: Float[Array, "B T D"], *, valid: Bool[Array, "B T"] | None, kernels: Kernels | None = None
  ) -> tuple[Float[Array, "B T D"], dict[str, jax.Array]]:
    """Maps x [B, T, D]; `valid` bool [B, T] names the tokens that the second result counts, None all.

    `kernels` names how experts multiply; None is XLA's way.

    Returns:
      The outputs [B, T, D] and `moe.router_statistics`.
    """
    # In float32: rounded scores would choose other experts.
    scores = self.router(x.astype(jnp.float32))
    best, chosen = jax.lax.top_k(scores, self.top_k)
    y = self.experts(x, chosen, jax.nn.softmax(best, axis=-1), (kernels or Kernels()).experts)
    return y, router_statistics(jax.nn.softmax(scores, axis=-1), chosen, valid)


class GptOssExperts(nnx.Module):
  """E gated feed-forwards, stacked; gate and up are one projection, its columns taken in turns."""

  AXES: ClassVar[dict[str, Names]] = {
    "gate_up_proj": ("expert", "embed", "mlp"),
    "gate_up_proj_bias": ("expert", "mlp"),
    "down_proj": ("expert", "mlp", "embed"),
    "down_proj_bias": ("expert", "embed"),
  }

  def __init__(self, config: GptOssMLPConfig, hidden_size: int, rngs: nnx.Rngs):
    E, D, F = config.num_experts, hidden_size, config.intermediate_size
    self.limit, self.alpha = config.limit, config.alpha
    self.gate_up_proj = make_param(fresh_experts(rngs, (E, D, 2 * F)), self.AXES["gate_up_proj"])
    self.gate_up_proj_bias = make_param(jnp.zeros((E, 2 * F)), self.AXES["gate_up_proj_bias"])
    self.down_proj = make_param(fresh_experts(rngs, (E, F, D)), self.AXES["down_proj"])
    self.down_proj_bias = make_param(jnp.zeros((E, D)), self.AXES["down_proj_bias"])

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
      kernels = restore(stored)
      y = product(rows, kernels["gate_up_proj"], sizes)
      y = self._activate(y + _biases(kernels["gate_up_proj_bias"], ids))
      y = product(y, kernels["down_proj"], sizes)
      return y + _biases(kernels["down_proj_bias"], ids)

    return dispatch_to_experts(x, chosen, weights, kernels=stored, axes=axes, apply=apply)

  def _activate(self, y: jax.Array) -> jax.Array:
    """From gates and ups in turns [..., 2F] to [..., F]. A gate has no lower limit."""
    gate, up = jnp.minimum(y[..., ::2], self.limit), jnp.clip(y[..., 1::2], -self.limit, self.limit)
    return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)


@jax.custom_vjp
def _biases(bias: jax.Array, ids: jax.Array) -> jax.Array:
  """The bias of each row's expert: rows `ids` [M*k] of bias [E, F]."""
  return bias.at[ids].get(mode="promise_in_bounds")


def _biases_forward(bias: jax.Array, ids: jax.Array):
  return _biases(bias, ids), (bias, ids)


def _biases_backward(saved: Any, g: jax.Array):
  # A product with zeros and ones: the gradient of a gather would be a scatter-add (see `moe.grouped`).
  bias, ids = saved
  members = jax.nn.one_hot(ids, bias.shape[0], dtype=g.dtype)
  return jnp.dot(members.T, g, preferred_element_type=jnp.float32).astype(bias.dtype), None


_biases.defvjp(_biases_forward, _biases_backward)
