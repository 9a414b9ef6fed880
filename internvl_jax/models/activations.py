"""The nonlinearities of feed-forwards, and a table of the ways to differentiate them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from internvl_jax.models.kernels import Backend, find


class Activations(NamedTuple):
  """Functions of one backend.

  Attributes:
    gelu: exact GELU of x (arXiv:1606.08415), x of any shape.
    swiglu: `silu(gate) * up` (arXiv:2002.05202) of two arrays of one shape.
  """

  gelu: Callable[[jax.Array], jax.Array]
  swiglu: Callable[[jax.Array, jax.Array], jax.Array]


BACKENDS: tuple[Backend, ...] = (
  Backend(
    name="from_inputs",
    function="internvl_jax.models.activations:FROM_INPUTS",
    platforms=("cpu",),
    reason="gradients are computed from the inputs; what automatic differentiation keeps instead is written and read",
  ),
  Backend(
    name="xla",
    function="internvl_jax.models.activations:AUTOMATIC",
    platforms=("tpu", "gpu", "cpu"),
    reason="automatic differentiation, of which accelerators' compilers fuse what they need into products",
  ),
)
"""Ways to compute activations, the preferred first."""


def activations(backend: str) -> Activations:
  """The functions of a row of `BACKENDS`."""
  found: Any = find(BACKENDS, backend).load()
  return found


AUTOMATIC = Activations(
  gelu=lambda x: jax.nn.gelu(x, approximate=False), swiglu=lambda gate, up: jax.nn.silu(gate) * up
)
"""By automatic differentiation."""


# --- By gradients that keep nothing but the inputs ------------------------------------------------------------


@jax.custom_vjp
def _gelu(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
  y = x.astype(jnp.float32)
  return (y * _normal_cdf(y)).astype(x.dtype)


def _normal_cdf(x: jax.Array) -> jax.Array:
  """The standard normal distribution function."""
  return 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  return _gelu(x), x


def _gelu_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
  y = x.astype(jnp.float32)
  density = jnp.exp(-0.5 * y * y) * (2 * jnp.pi) ** -0.5
  return ((g.astype(jnp.float32) * (_normal_cdf(y) + y * density)).astype(x.dtype),)


_gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def _swiglu(gate: Float[Array, "*any"], up: Float[Array, "*any"]) -> Float[Array, "*any"]:
  x = gate.astype(jnp.float32)
  return (x * jax.nn.sigmoid(x) * up.astype(jnp.float32)).astype(gate.dtype)


def _swiglu_forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _swiglu(gate, up), (gate, up)


def _swiglu_backward(inputs: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
  gate, up = inputs
  x, y, g = (a.astype(jnp.float32) for a in (gate, up, g))
  s = jax.nn.sigmoid(x)
  return (g * y * s * (1 + x * (1 - s))).astype(gate.dtype), (g * x * s).astype(up.dtype)


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)

FROM_INPUTS = Activations(gelu=_gelu, swiglu=_swiglu)
"""By gradients written out."""
