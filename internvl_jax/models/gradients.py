"""Products and sums whose gradients are written out, for two reasons of XLA's CPU backend.

Automatic differentiation of `x @ w` over [rows, tokens, width] contracts two leading axes, for which the
backend first writes transposed copies; and it sums a bias's gradient over rows one column at a time. Here
gradients are plain 2-D products, sums included (a product with a row of ones). The numbers are the same, and
other backends lose nothing. On a mesh, rows and tokens are sharded over different devices, so that nothing is
reshaped to 2-D there.

What does not train gets no gradient: which operands need one is known when the backward pass is traced.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from internvl_jax.parallel.rules import Product, mesh_in_scope


def _rows(x: jax.Array) -> jax.Array:
  return x.reshape(-1, x.shape[-1])


def _column_sums(x: jax.Array) -> jax.Array:
  """Sums of [..., D] over all but the last axis, in float32."""
  if mesh_in_scope() is not None:
    return jnp.sum(x, axis=tuple(range(x.ndim - 1)), dtype=jnp.float32)
  x = _rows(x)
  return jnp.dot(jnp.ones((1, x.shape[0]), x.dtype), x, preferred_element_type=jnp.float32)[0]


PRODUCT = "product"
"""What results of `matmul` are called where rematerialization chooses what to keep: it cannot look inside."""


def matmul(x: Float[Array, "*rows D"], w: Float[Array, "D F"], product: Product) -> Float[Array, "*rows F"]:
  """`x @ w` of x [..., D] and w [D, F], sharded over the mesh in scope as `product` says."""
  return checkpoint_name(_matmul(x, w, product), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: jax.Array, w: jax.Array, product: Product):
  y = product.inputs(x, w.shape) @ product.used(w)
  return product.outputs(y, w.shape)


def _matmul_forward(x: Any, w: Any, product: Product):
  needed = (x.value if w.perturbed else None, w.value if x.perturbed else None)
  return _matmul(x.value, w.value, product), needed


def _matmul_backward(product: Product, needed: Any, g: Any):
  x, w = needed
  if type(g) is jax.custom_derivatives.SymbolicZero:
    return None, None
  if mesh_in_scope() is not None:
    return _sharded_gradients(product, x, w, g)
  # The barrier keeps XLA from fusing what makes `g` into both products, where it would be transposed.
  shape, g = g.shape[:-1], jax.lax.optimization_barrier(_rows(g))
  dx = None if w is None else (g @ w.T).reshape(*shape, -1)
  return dx, None if x is None else weight_gradient(x, g, product)


def _sharded_gradients(product: Product, x: Any, w: Any, g: jax.Array):
  """The gradients of `matmul` on a mesh; that of w is summed where it is stored."""
  if x is None and w is None:
    return None, None
  w_shape = w.shape if x is None else (x.shape[-1], g.shape[-1])
  g = product.outputs(g, w_shape)
  dx = None if w is None else product.inputs(g @ product.used(w).T, w_shape)
  return dx, None if x is None else weight_gradient(x, g, product)


def weight_gradient(
  x: Float[Array, "*rows D"], g: Float[Array, "*rows F"], product: Product
) -> Float[Array, "D F"]:
  """The gradient [D, F] of w in `matmul`, from x [..., D] and the gradient g [..., F] of what it returned."""
  if mesh_in_scope() is None:
    return _rows(x).T @ _rows(g)
  x = product.inputs(x, (x.shape[-1], g.shape[-1]))
  return product.gradient(jnp.einsum("...d,...f->df", x, g))


_matmul.defvjp(_matmul_forward, _matmul_backward, symbolic_zeros=True)


@jax.custom_vjp
def scale(x: Float[Array, "*rows D"], w: Float[Array, " D"]) -> Float[Array, "*rows D"]:
  """`x * w` of x [..., D] and w [D]."""
  return x * w


def _scale_forward(x: Any, w: Any):
  needed = (x.value if w.perturbed else None, w.value if x.perturbed else None)
  return x.value * w.value, needed


def _scale_backward(needed: Any, g: Any):
  x, w = needed
  if type(g) is jax.custom_derivatives.SymbolicZero:
    return None, None
  dw = None if x is None else _column_sums(g * x).astype(x.dtype)
  return (None if w is None else g * w), dw


scale.defvjp(_scale_forward, _scale_backward, symbolic_zeros=True)


@jax.custom_vjp
def shift(x: Float[Array, "*rows D"], b: Float[Array, " D"]) -> Float[Array, "*rows D"]:
  """`x + b` of x [..., D] and b [D]."""
  return x + b


def _shift_forward(x: Any, b: Any):
  # An empty tuple says "needed": only the structure of what is kept is static.
  return x.value + b.value, (() if x.perturbed else None, () if b.perturbed else None)


def _shift_backward(needed: Any, g: Any):
  for_x, for_b = needed
  if type(g) is jax.custom_derivatives.SymbolicZero:
    return None, None
  db = None if for_b is None else _column_sums(g).astype(g.dtype)
  return (None if for_x is None else g), db


shift.defvjp(_shift_forward, _shift_backward, symbolic_zeros=True)
