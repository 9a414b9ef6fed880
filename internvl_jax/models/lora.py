"""Low-rank adapters (arXiv:2106.09685), put beside the linear maps of a layer that is already built.

    linear.kernel [D, F]                     linear.kernel [D, F]
                            attach ->        linear.adapter.a [D, r], linear.adapter.b [r, F]
                            merge  <-        (linear.adapter.magnitude [F] under DoRA)

Attaching happens inside the function that makes one layer of a stack, so that adapters are stacked like the
kernels they belong to. Trainer, step and checkpoints know parameters only, and no adapter.

Letters: D width in, F width out, r rank.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from internvl_jax.arguments import LoRAConfig
from internvl_jax.models.gradients import matmul
from internvl_jax.models.layers import Linear, make_param
from internvl_jax.models.weight_formats import Parts, format_of
from internvl_jax.trees import submodule_of

MARK = ".adapter."
"""What the path of every adapter parameter has in it, between its linear map and its own name."""

DEFAULT_TARGETS = (
  r"(attn|self_attn)\.\w+",
  r"mlp\.(fc1|fc2|gate_proj|up_proj|down_proj|gate_up_proj)",
)
"""The reference's targets in all families: the projections of attention and of the dense feed-forward. A
router and stacked experts are not linear maps of this kind and stay as they are, as there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRASpec:
  r"""The adapters of a stack of layers.

  Attributes:
    rank: r.
    alpha: numerator of the scale.
    dropout: share of the adapter's inputs that is dropped in training.
    targets: regular expressions that end a linear map's path in its layer, from a dot on ("q_proj",
      r"self_attn\.q_proj").
    use_dora: weight-decomposed adapters (arXiv:2402.09353).
    use_rslora: scale by alpha / sqrt(r) in place of alpha / r (arXiv:2312.03732).
  """

  rank: int
  alpha: float
  dropout: float = 0.0
  targets: tuple[str, ...] = DEFAULT_TARGETS
  use_dora: bool = False
  use_rslora: bool = False

  @classmethod
  def of(cls, config: LoRAConfig, rank: int) -> "LoRASpec | None":
    """The adapters of that rank, with what the settings, or their defaults, say of the rest; None for rank 0."""
    if not rank:
      return None
    return cls(
      rank=rank,
      alpha=2.0 * rank if config.alpha is None else config.alpha,
      dropout=config.dropout,
      targets=config.targets or DEFAULT_TARGETS,
      use_dora=config.use_dora,
      use_rslora=config.use_rslora,
    )

  @property
  def scale(self) -> float:
    return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

  def adapts(self, path: str) -> bool:
    """Whether a linear map, given by its path in its layer, gets an adapter."""
    return any(re.fullmatch(rf"(?:.*\.)?(?:{target})", path) for target in self.targets)


class Adapter(nnx.Module):
  """`scale * dropout(x) @ a @ b`, and under DoRA the rescaled columns of the whole.

  Fresh, a is Kaiming-uniform with a = sqrt(5), that is uniform within 1/sqrt(D), and b is zero, as in PEFT. A
  fresh magnitude is the norm of the kernel's columns, which only loading knows: `fill_magnitudes`.
  """

  def __init__(self, linear: Linear, spec: LoRASpec, rngs: nnx.Rngs):
    D, F = linear.kernel.shape
    axis_in, axis_out = linear.product.axes
    bound = 1 / math.sqrt(D)
    self.a = make_param(
      jax.random.uniform(rngs.params(), (D, spec.rank), minval=-bound, maxval=bound), (axis_in, None)
    )
    self.b = make_param(jnp.zeros((spec.rank, F)), (None, axis_out))
    self.magnitude = make_param(jnp.ones(F), (axis_out,)) if spec.use_dora else None
    self.narrow = dataclasses.replace(linear.product, axes=(axis_in, None))
    self.widen = dataclasses.replace(linear.product, axes=(None, axis_out))
    self.scale, self.dropout = spec.scale, spec.dropout
    self.key: jax.Array | None = nnx.data(None)
    self.as_merged = False

  def __call__(
    self, x: Float[Array, "*rows D"], y: Float[Array, "*rows F"], linear: Linear
  ) -> Float[Array, "*rows F"]:
    """Adds the adapter's part to y = x @ kernel [..., F], the bias not yet added."""
    if self.as_merged:
      magnitude = None if self.magnitude is None else self.magnitude[...]
      whole = _merged(linear.kernel[...], self.a[...], self.b[...], magnitude, self.scale)
      return x @ whole.astype(x.dtype)
    a, b = self.a[...].astype(x.dtype), self.b[...].astype(x.dtype)
    dropped = x
    if self.key is not None and self.dropout > 0:
      kept = jax.random.bernoulli(self.key, 1 - self.dropout, x.shape)
      dropped = jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)
    part = matmul(matmul(dropped, a, self.narrow), b, self.widen) * self.scale
    if self.magnitude is None:
      return y + part
    # DoRA's norm is a constant to the gradient (its section 4.3).
    whole = _merged(linear.kernel[...], self.a[...], self.b[...], None, self.scale)
    norm = jax.lax.stop_gradient(_column_norms(whole))
    ratio = (self.magnitude[...].astype(jnp.float32) / norm).astype(x.dtype)
    # What dropout leaves of the input goes through both parts, as in PEFT.
    base = y if dropped is x else linear.base(dropped)
    return y + (ratio - 1) * base + ratio * part


def attach(layer: nnx.Module, spec: LoRASpec, rngs: nnx.Rngs) -> None:
  """Gives every linear map of `layer` that the spec adapts a fresh adapter."""
  for path, module in list(nnx.iter_modules(layer)):
    if isinstance(module, Linear) and spec.adapts(".".join(map(str, path))):
      module.adapter = Adapter(module, spec, rngs)


def start_dropout(layer: nnx.Module, key: Key[Array, ""]) -> None:
  """Switches the dropout of a layer's adapters on, each with randomness of its own."""
  adapters = [module for _, module in nnx.iter_modules(layer) if isinstance(module, Adapter)]
  for i, adapter in enumerate(adapters):
    adapter.key = jax.random.fold_in(key, i)


def adapter_paths(paths: Iterable[str]) -> set[str]:
  """Those of the parameters that belong to adapters."""
  return {path for path in paths if MARK in path}


def _column_norms(kernel: jax.Array) -> jax.Array:
  """Norms [..., F] of the columns of [..., D, F]."""
  return jnp.linalg.norm(kernel.astype(jnp.float32), axis=-2)


def fill_magnitudes(params: Mapping[str, jax.Array], fresh: Iterable[str]) -> dict[str, jax.Array]:
  """`params` with DoRA's magnitudes at the paths `fresh` set to the norms of their kernels' columns."""
  params = dict(params)
  for path in fresh:
    linear, _, name = path.rpartition(MARK)
    if name == "magnitude":
      kernel = f"{linear}.kernel"
      parts = {other.rpartition(".")[2]: params[other] for other in params if other.startswith(f"{kernel}.")}
      norms_of = jax.jit(_stored_norms if parts else _column_norms, out_shardings=params[path].sharding)
      norms = norms_of(parts or params[kernel])
      params[path] = norms.astype(params[path].dtype)
  return params


def _stored_norms(parts: Parts) -> jax.Array:
  """`_column_norms` of a stack of quantized kernels, of which one at a time is restored."""
  return jax.lax.map(lambda layer: _column_norms(format_of(layer["codes"]).restore(layer)), parts)


@dataclasses.dataclass(frozen=True, eq=False)
class MergedParameter:
  """A kernel with its adapter added in float32, a layer when it is asked for: no more than that is ever in memory."""

  kernel: Any
  a: Any
  b: Any
  magnitude: Any
  scale: float

  @property
  def shape(self) -> tuple[int, ...]:
    return self.kernel.shape

  def __getitem__(self, cell: tuple[int, ...]) -> jax.Array:
    magnitude = None if self.magnitude is None else self.magnitude[cell]
    return _merged(self.kernel[cell], self.a[cell], self.b[cell], magnitude, self.scale)

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    del copy
    return np.stack([np.asarray(self[(i,)]) for i in range(self.shape[0])]).astype(dtype or np.float32)


def merge(params: Mapping[str, Any], scale_of: Mapping[str, float]) -> dict[str, Any]:
  """Parameters without adapters, each of which is to be added into its kernel when that is read.

  Args:
    params: all parameters by path.
    scale_of: the adapters' scale by part of the model (`trees.submodule_of`).
  """
  merged = {path: value for path, value in params.items() if MARK not in path}
  for path in params:
    linear, mark, name = path.rpartition(MARK)
    if mark and name == "a":
      prefix = linear + MARK
      merged[f"{linear}.kernel"] = MergedParameter(
        kernel=params[f"{linear}.kernel"],
        a=params[path],
        b=params[f"{prefix}b"],
        magnitude=params.get(f"{prefix}magnitude"),
        scale=scale_of[submodule_of(path)],
      )
  return merged


@functools.partial(jax.jit, static_argnums=4)
def _merged(kernel: jax.Array, a: jax.Array, b: jax.Array, magnitude: jax.Array | None, scale: float):
  """The kernel [D, F] that computes what a kernel and its adapter do, in float32."""
  whole = kernel.astype(jnp.float32) + scale * (a.astype(jnp.float32) @ b.astype(jnp.float32))
  if magnitude is None:
    return whole
  return whole * (magnitude.astype(jnp.float32) / _column_norms(whole))


def compute_as_merged(model: nnx.Module) -> None:
  """Lets a model's adapters compute with merged kernels, to see that merging changes nothing."""
  for _, module in nnx.iter_modules(model):
    if isinstance(module, Adapter):
      module.as_merged = True
