"""Frozen weights in 4 or 8 bits under adapters (QLoRA, arXiv:2305.14314): stored as parts, restored right before use.

    linear.kernel [D, F]        linear.kernel.codes, linear.kernel.scales, ... (`weight_formats`)
                    quantize ->

A layer's matrices are restored one by one inside the scan over layers, in the compute dtype, and once more in the
backward pass: none is kept for it. On a mesh codes and scales are sharded as the matrix would be, and are all-gathered
before they are restored, so that 4.5 (8) bits a weight travel.

Trainer, step and checkpoints see parameters that do not train, of other dtypes.

Letters: D width in, F width out, E experts.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from internvl_jax.models.gradients import PRODUCT
from internvl_jax.models.layers import Axes, Linear, make_param
from internvl_jax.models.lora import DEFAULT_TARGETS
from internvl_jax.models.weight_formats import FORMATS, Parts, WeightFormat, format_of
from internvl_jax.parallel.rules import Product

_CODES = ".codes"
_PART = re.compile(r"(.*)\.(codes|scales|scale_scales|scale_offset)")


class QuantizedKernel(nnx.Module):
  """A kernel [D, F], or those of experts [E, D, F], in the parts of a format."""

  def __init__(self, kernel: Float[Array, "*lead D F"], axes: Axes, form: WeightFormat):
    """Quantizes a kernel, whose axes have these logical names."""
    parts = form.quantize(kernel)
    groups = (*axes[:-2], None)
    self.name = form.name
    self.codes = make_param(parts["codes"], axes)
    self.scales = make_param(parts["scales"], axes)
    self.scale_scales = make_param(parts["scale_scales"], groups) if "scale_scales" in parts else None
    self.scale_offset = make_param(parts["scale_offset"], groups) if "scale_offset" in parts else None

  @property
  def form(self) -> WeightFormat:
    """How it is stored."""
    return FORMATS[self.name]

  @property
  def parts(self) -> dict[str, jax.Array]:
    """What it is stored as."""
    held = {name: getattr(self, name) for name in ("codes", "scales", "scale_scales", "scale_offset")}
    return {name: param[...] for name, param in held.items() if param is not None}

  def stored(self, name: str) -> dict[str, jax.Array]:
    """Codes and scales of experts [E, ...] under that name; scales in float32."""
    expand = jax.vmap(self.form.expand)
    return {
      f"{name}.codes": self.codes[...],
      f"{name}.scales": expand({part: value for part, value in self.parts.items() if part != "codes"}),
    }

  def __getitem__(self, index: Any) -> jax.Array:
    """The kernel in float32, as that of a `Linear` is read: `kernel[...]`."""
    return self.form.restore(self.parts)[index]

  def matmul(self, x: Float[Array, "*rows D"], product: Product) -> Float[Array, "*rows F"]:
    """`gradients.matmul` with the kernel restored in the dtype of x; only x gets a gradient."""
    return checkpoint_name(_matmul(x, self.parts, product, self.name), PRODUCT)


def _in_use(parts: Parts, product: Product, name: str, dtype: Any) -> jax.Array:
  """The kernel as products use it, restored from all-gathered codes and scales."""
  form = FORMATS[name]
  codes, scales = product.used(parts["codes"]), product.used(form.expand(parts))
  return product.in_use(form.decode(codes, scales, dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x: jax.Array, parts: Parts, product: Product, name: str):
  w = _in_use(parts, product, name, x.dtype)
  shape = FORMATS[name].shape(parts["codes"].shape)
  return product.outputs(product.inputs(x, shape) @ w, shape)


def _matmul_forward(x: Any, parts: Any, product: Product, name: str):
  values = {part: leaf.value for part, leaf in parts.items()}
  return _matmul(x.value, values, product, name), values if x.perturbed else None


def _matmul_backward(product: Product, name: str, parts: Any, g: Any):
  if parts is None or type(g) is jax.custom_derivatives.SymbolicZero:
    return None, None
  # Without the barrier, XLA would find that the forward pass has restored the kernel, and keep it until here.
  parts, g = jax.lax.optimization_barrier((parts, g))
  shape = FORMATS[name].shape(parts["codes"].shape)
  g = product.outputs(g, shape)
  return product.inputs(g @ _in_use(parts, product, name, g.dtype).T, shape), None


_matmul.defvjp(_matmul_forward, _matmul_backward, symbolic_zeros=True)


def quantize_layer(layer: nnx.Module, name: str) -> None:
  """Stores a layer's frozen kernels in the format of that name; "none" leaves them as they are.

  They are those of the linear maps that adapters are put beside by default, and of experts. Norms, biases and routers
  stay, and kernels whose columns are not whole blocks. Adapters are attached before.
  """
  if name == "none":
    return
  form = FORMATS[name]
  is_meant = re.compile(rf"(.*\.)?({'|'.join(DEFAULT_TARGETS)})")
  for path, module in list(nnx.iter_modules(layer)):
    if isinstance(module, Linear):
      if is_meant.fullmatch(".".join(map(str, path))) and form.fits(module.kernel.shape[-2]):
        module.kernel = QuantizedKernel(module.kernel[...], module.product.axes, form)
    else:
      for kernel, axes in getattr(module, "AXES", {}).items():
        if len(axes) == 3 and form.fits(getattr(module, kernel).shape[-2]):
          setattr(module, kernel, QuantizedKernel(getattr(module, kernel)[...], axes, form))


def expert_kernels(
  experts: Any, dtype: Any
) -> tuple[dict[str, jax.Array], dict[str, Axes], Callable[[Mapping[str, jax.Array]], dict[str, jax.Array]]]:
  """The parameters of experts as they are stored, and what makes of them, or of shards of them, what is computed with.

  Args:
    experts: a module with its parameters' logical axes as `AXES`.
    dtype: to compute in.

  Returns:
    Arrays [E, ...] by name, their logical axes, and a function from such arrays to the parameters in that dtype.
  """
  arrays, axes = {}, {}
  held = {name: getattr(experts, name) for name in experts.AXES}
  for name, param in held.items():
    whole: Axes = experts.AXES[name]
    if isinstance(param, nnx.Param):
      arrays[name], axes[name] = param[...], whole
    else:
      arrays |= param.stored(name)
      axes[f"{name}.codes"] = whole
      # One scale of a whole column is the same for every piece of it.
      axes[f"{name}.scales"] = whole if param.form.block else (whole[0], None, whole[2])

  def restore(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    found = {}
    for name, param in held.items():
      if isinstance(param, nnx.Param):
        found[name] = arrays[name].astype(dtype)
      else:
        decode = jax.vmap(functools.partial(param.form.decode, dtype=dtype))
        found[name] = decode(arrays[f"{name}.codes"], arrays[f"{name}.scales"])
    return found

  return arrays, axes, restore


# --- By path ----------------------------------------------------------------------------------------------------


def is_part(path: str) -> bool:
  """Whether a parameter is a part of a quantized kernel: its dtype is the format's."""
  return _PART.fullmatch(path) is not None


def quantized_kernels(params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """The parts of every quantized kernel by its path, from parameters by path or their shapes."""
  found: dict[str, dict[str, Any]] = {}
  for path, value in params.items():
    if match := _PART.fullmatch(path):
      found.setdefault(match[1], {})[match[2]] = value
  return found


def as_kernels(shapes: Mapping[str, Any]) -> dict[str, Any]:
  """Shapes by path with each quantized kernel's own in place of its parts': float32, in the place of its codes.

  Args:
    shapes: of parameters by path: arrays, or what has their shape and dtype.
  """
  found = {}
  for path, leaf in shapes.items():
    if path.endswith(_CODES):
      form = format_of(leaf)
      found[path.removesuffix(_CODES)] = jax.ShapeDtypeStruct(form.shape(leaf.shape), jnp.float32)
    elif not is_part(path):
      found[path] = leaf
  return found


@dataclasses.dataclass(frozen=True, eq=False)
class RestoredParameter:
  """A quantized kernel in float32, a layer (and expert) when it is asked for: no more than that is ever in memory.

  Attributes:
    parts: as they are read (`parallel.host_arrays.gathered`).
  """

  parts: Mapping[str, Any]

  @property
  def form(self) -> WeightFormat:
    """How it is stored."""
    return FORMATS["nf4" if "scale_offset" in self.parts else "int8"]

  @property
  def shape(self) -> tuple[int, ...]:
    return self.form.shape(self.parts["codes"].shape)

  def __getitem__(self, cell: tuple[int, ...]) -> jax.Array:
    return _restored(self.form.name, {name: jnp.asarray(part[cell]) for name, part in self.parts.items()})

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    del copy
    return np.stack([np.asarray(self[(i,)]) for i in range(self.shape[0])]).astype(dtype or np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _restored(name: str, parts: Parts) -> jax.Array:
  return FORMATS[name].restore(parts)


def restored(params: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters by path with each quantized kernel in place of its parts, restored as it is read."""
  kernels = {f"{path}{_CODES}": path for path in quantized_kernels(params)}
  parts = quantized_kernels(params)
  found = {}
  for path, value in params.items():
    if path in kernels:
      found[kernels[path]] = RestoredParameter(parts[kernels[path]])
    elif not is_part(path):
      found[path] = value
  return found
