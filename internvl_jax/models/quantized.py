"""Products of linear layers in int8 or fp8, for speed; what is stored stays as it is.

Both operands are divided by scales, so that their largest values become the largest of the format, rounded, multiplied
and scaled back. Scales are those of the moment (absmax), one for each row of x and one for each column of w: a token's
numbers depend on no other token, and every scale is outside of the sum that it belongs to.

    y  = (x8 . w8) * sx * sw              x8, sx: rows of x over D;      w8, sw: columns of w over D
    dx = (h8 . w8^T) * sh                 h8, sh: rows of g * sw over F
    dw = (x8^T . k8) * sk                 k8, sk: columns of g * sx over the tokens

The scales of what is summed over go into the gradient before it is rounded, so that x and w are rounded once. On a
mesh, w is rounded where it is stored, and its pieces travel in eight bits.

int8 is 127 equal steps (the forward pass of arXiv:2208.07339, without its outliers; the backward pass of SwitchBack,
arXiv:2304.13013). fp8 is e4m3 for values and e5m2 for gradients (arXiv:2209.05433).

Letters: D width in, F width out, M tokens.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Num

from internvl_jax.models.gradients import PRODUCT, weight_gradient
from internvl_jax.models.layers import Linear
from internvl_jax.models.lora import DEFAULT_TARGETS
from internvl_jax.parallel.rules import Product


@dataclasses.dataclass(frozen=True)
class Format:
  """Eight-bit numbers for products.

  Attributes:
    values: the dtype of x and w.
    gradients: the dtype of gradients.
    for_weights: whether the gradient of w is such a product, too, or one in the compute dtype.
    capability: the first compute capability of NVIDIA's cards that has such products.
    tpu: the first generation of TPUs.
  """

  values: jnp.dtype
  gradients: jnp.dtype
  for_weights: bool
  capability: float
  tpu: int

  def matmul(
    self, x: Float[Array, "*rows D"], w: Float[Array, "D F"], product: Product
  ) -> Float[Array, "*rows F"]:
    """`gradients.matmul` in this format: x [..., D], w [D, F] -> [..., F] in the dtype of x."""
    return checkpoint_name(_matmul(x, w, product, self), PRODUCT)


FORMATS = {
  # Rounded to equal steps over all tokens, the gradient of w cost more than bfloat16 does (docs/training.md).
  "int8": Format(jnp.dtype(jnp.int8), jnp.dtype(jnp.int8), for_weights=False, capability=8.0, tpu=5),
  "fp8": Format(
    jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2), for_weights=True, capability=8.9, tpu=7
  ),
}
"""What `runtime.quantize` may say, apart from "none"."""


def quantize(model: nnx.Module, name: str) -> None:
  """Lets a model multiply in the format of that name where most of its work is: in its layers' linear maps.

  They are those that adapters are put beside by default. A router's scores choose experts, the output embedding is
  multiplied within the loss, the projector is little work; these and the adapters stay as they are.
  """
  is_meant = re.compile(rf".*\.({'|'.join(DEFAULT_TARGETS)})")
  for path, module in list(nnx.iter_modules(model)):
    if isinstance(module, Linear) and is_meant.fullmatch(".".join(map(str, path))):
      module.multiply = FORMATS[name].matmul


def has_products(device: Any, name: str) -> bool:
  """Whether a device multiplies in the format of that name; a CPU does in its own way, slowly."""
  form = FORMATS[name]
  if device.platform == "gpu":
    # AMD's cards call it "gfx942".
    capability = re.fullmatch(r"\d+\.\d+", str(device.compute_capability))
    return capability is not None and float(capability[0]) >= form.capability
  if device.platform == "tpu":
    generation = re.search(r"\d+", device.device_kind)
    return generation is not None and int(generation[0]) >= form.tpu
  return True


def rounded(
  x: Float[Array, "*axes"], dtype: jnp.dtype, axes: Sequence[int]
) -> tuple[Num[Array, "*axes"], Float[Array, "..."]]:
  """Rounds x to numbers of an eight-bit format times scales.

  Args:
    x: floating point.
    dtype: of the format.
    axes: those that share a scale, the largest magnitude along them over the format's largest number.

  Returns:
    The numbers, and scales in float32 with these axes of size 1. What is not finite makes its scale so.
  """
  x = x.astype(jnp.float32)
  is_float = jnp.issubdtype(dtype, jnp.floating)
  largest = float((jnp.finfo if is_float else jnp.iinfo)(dtype).max)
  # Not below the smallest normal number: zeros are divided by it, too.
  scale = jnp.maximum(jnp.max(jnp.abs(x), axis=axes, keepdims=True) / largest, jnp.finfo(jnp.float32).tiny)
  x = x / scale
  return (x if is_float else jnp.round(x)).astype(dtype), scale


def _sum(
  a: jax.Array,
  b: jax.Array,
  over: tuple[Sequence[int], Sequence[int]],
  dtype: jnp.dtype,
  *,
  exact: bool = False,
) -> jax.Array:
  """The product of numbers of a format: integers are summed as such, others in float32 and rounded to `dtype`.

  Args:
    a, b: the numbers.
    over: the axes of each that are summed over.
    dtype: the compute dtype.
    exact: in all of float32's bits; Hopper's tensor cores keep fewer otherwise, which gradients suffer from.
  """
  return jax.lax.dot_general(
    a,
    b,
    (over, ((), ())),
    precision=jax.lax.Precision.HIGHEST if exact else None,
    preferred_element_type=jnp.int32 if jnp.issubdtype(a.dtype, jnp.integer) else dtype,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x: jax.Array, w: jax.Array, product: Product, form: Format):
  return _forward(x, w, product, form)[0]


def _forward(x: jax.Array, w: jax.Array, product: Product, form: Format):
  """The product, and what it was made of: numbers and scales of x and of w, the latter as they are stored."""
  x8, sx = rounded(product.inputs(x, w.shape), form.values, [x.ndim - 1])
  w8, sw = rounded(product.stored(w), form.values, [0])
  y = _sum(x8, product.used(w8), ((x.ndim - 1,), (0,)), x.dtype)
  y = (y.astype(jnp.float32) * sx * sw[0]).astype(x.dtype)
  return product.outputs(y, w.shape), (x8, sx), (w8, sw)


def _matmul_forward(x: Any, w: Any, product: Product, form: Format):
  y, x_parts, w_parts = _forward(x.value, w.value, product, form)
  kept = x_parts if form.for_weights else x.value
  return y, (kept if w.perturbed else None, w_parts if x.perturbed else None)


def _matmul_backward(product: Product, form: Format, needed: Any, g: Any):
  x, w = needed
  if type(g) is jax.custom_derivatives.SymbolicZero:
    return None, None
  dx = None if w is None else _input_gradient(g, w, product, form)
  if x is None:
    return dx, None
  return dx, _weight_gradient(x, g, product, form) if form.for_weights else weight_gradient(x, g, product)


def _input_gradient(g: jax.Array, w_parts: tuple[jax.Array, jax.Array], product: Product, form: Format):
  w8, sw = w_parts
  g = product.outputs(g, w8.shape)
  h8, sh = rounded(g.astype(jnp.float32) * sw[0], form.gradients, [g.ndim - 1])
  dx = _sum(h8, product.used(w8), ((g.ndim - 1,), (1,)), g.dtype, exact=True)
  return product.inputs((dx.astype(jnp.float32) * sh).astype(g.dtype), w8.shape)


def _weight_gradient(x_parts: tuple[jax.Array, jax.Array], g: jax.Array, product: Product, form: Format):
  x8, sx = x_parts
  tokens = tuple(range(g.ndim - 1))
  g = product.outputs(g, (x8.shape[-1], g.shape[-1]))
  k8, sk = rounded(g.astype(jnp.float32) * sx, form.gradients, tokens)
  dw = _sum(x8, k8, (tokens, tokens), g.dtype, exact=True)
  return product.gradient((dw.astype(jnp.float32) * sk.reshape(-1)).astype(g.dtype))


_matmul.defvjp(_matmul_forward, _matmul_backward, symbolic_zeros=True)
