"""Products and sums whose gradients are written out, for two reasons of XLA's CPU backend.

Automatic differentiation of `x @ w` over [rows, tokens, width] contracts two leading axes, for which the
backend first writes transposed copies; and it sums a bias's gradient over rows one column at a time. Here
gradients are plain 2-D products, sums included (a product with a row of ones). The numbers are the same, and
other backends lose nothing.

What does not train gets no gradient: which operands need one is known when the backward pass is traced.
"""

import jax
import jax.numpy as jnp


def _rows(x: jax.Array) -> jax.Array:
  return x.reshape(-1, x.shape[-1])


def _column_sums(x: jax.Array) -> jax.Array:
  """Sums of [rows, D] over its rows."""
  return jnp.dot(jnp.ones((1, x.shape[0]), x.dtype), x, preferred_element_type=jnp.float32)[0]


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
  """`x @ w` of x [..., D] and w [D, F]."""
  return x @ w


def _matmul_forward(x, w):
  needed = (x.value if w.perturbed else None, w.value if x.perturbed else None)
  return matmul(x.value, w.value), needed


def _matmul_backward(needed, g):
  x, w = needed
  if type(g) is jax.custom_derivatives.SymbolicZero:
    return None, None
  # The barrier keeps XLA from fusing what makes `g` into both products, where it would be transposed.
  shape, g = g.shape[:-1], jax.lax.optimization_barrier(_rows(g))
  dx = None if w is None else (g @ w.T).reshape(*shape, -1)
  dw = None if x is None else _rows(x).T @ g
  return dx, dw


matmul.defvjp(_matmul_forward, _matmul_backward, symbolic_zeros=True)


@jax.custom_vjp
def scale(x: jax.Array, w: jax.Array) -> jax.Array:
  """`x * w` of x [..., D] and w [D]."""
  return x * w


def _scale_forward(x, w):
  needed = (x.value if w.perturbed else None, w.value if x.perturbed else None)
  return x.value * w.value, needed


def _scale_backward(needed, g):
  x, w = needed
  if type(g) is jax.custom_derivatives.SymbolicZero:
    return None, None
  dw = None if x is None else _column_sums(_rows(g * x)).astype(x.dtype)
  return (None if w is None else g * w), dw


scale.defvjp(_scale_forward, _scale_backward, symbolic_zeros=True)


@jax.custom_vjp
def shift(x: jax.Array, b: jax.Array) -> jax.Array:
  """`x + b` of x [..., D] and b [D]."""
  return x + b


def _shift_forward(x, b):
  # An empty tuple says "needed": only the structure of what is kept is static.
  return x.value + b.value, (() if x.perturbed else None, () if b.perturbed else None)


def _shift_backward(needed, g):
  for_x, for_b = needed
  if type(g) is jax.custom_derivatives.SymbolicZero:
    return None, None
  db = None if for_b is None else _column_sums(_rows(g)).astype(g.dtype)
  return (None if for_x is None else g), db


shift.defvjp(_shift_forward, _shift_backward, symbolic_zeros=True)
