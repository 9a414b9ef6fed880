"""The layers that all parts of the model are made of.

Letters: D width in, F width out, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from internvl_jax.models.gradients import PRODUCT, matmul, scale, shift
from internvl_jax.parallel import sharded_gather
from internvl_jax.parallel.rules import Product

Axes = tuple[str | None, ...]


def make_param(value: Shaped[Array, "..."], axes: Axes) -> nnx.Param[jax.Array]:
  """A parameter whose axes carry logical names; placing it on a mesh is left to `parallel.rules`."""
  return nnx.Param(value, out_sharding=axes, eager_sharding=False)


class Linear(nnx.Module):
  """`x @ kernel + bias`, with kernel [D, F], in the dtype of `x`.

  A fresh kernel is normal with standard deviation 1/sqrt(D), so that a unit-variance input gives a
  unit-variance output (LeCun et al., Efficient BackProp, 1998); a fresh bias is zero.

  Attributes:
    product: how the product is sharded over a mesh.
    multiply: what computes it; `models.quantized.quantize` puts another in its place.
    kernel: the parameter [D, F], or what `models.base_weights.quantize_layer` stores in its place.
    adapter: what `models.lora.attach` put beside the kernel, or None: a function (x, y, linear) -> y.
  """

  def __init__(
    self,
    d_in: int,
    d_out: int,
    *,
    bias: bool,
    axes: tuple[str | None, str | None],
    rngs: nnx.Rngs,
    pieces: int | None = None,
    over: Literal["tokens", "tiles"] = "tokens",
  ):
    """Makes the map; `axes`, `pieces` and `over` are those of `parallel.rules.Product`."""
    self.product = Product(axes, pieces, over)
    self.multiply: Callable[..., Any] = matmul
    fresh = jax.random.normal(rngs.params(), (d_in, d_out)) / math.sqrt(d_in)
    self.kernel: Any = make_param(fresh, axes)
    self.bias = make_param(jnp.zeros(d_out), axes[1:]) if bias else None
    self.adapter: Callable[..., Any] | None = nnx.data(None)

  def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows F"]:
    y = self.base(x)
    if self.adapter is not None:
      y = self.adapter(x, y, self)
    return y if self.bias is None else shift(y, self.bias[...].astype(x.dtype))

  def base(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows F"]:
    """`x @ kernel`, the adapter and the bias not yet added."""
    if isinstance(self.kernel, nnx.Param):
      return self.multiply(x, self.kernel[...].astype(x.dtype), self.product)
    return self.kernel.matmul(x, self.product)


class LayerNorm(nnx.Module):
  """Layer normalization over the last axis, computed in float32."""

  def __init__(self, dim: int, *, eps: float, axis: str = "embed"):
    self.scale = make_param(jnp.ones(dim), (axis,))
    self.bias = make_param(jnp.zeros(dim), (axis,))
    self.eps = eps

  def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
    y = scale(y, self.scale[...].astype(jnp.float32))
    return shift(y, self.bias[...].astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
  """Root-mean-square normalization over the last axis, computed in float32 (arXiv:1910.07467)."""

  def __init__(self, dim: int, *, eps: float, axis: str | None = "embed"):
    self.scale = make_param(jnp.ones(dim), (axis,))
    self.eps = eps

  def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
    return scale(y, self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Embed(nnx.Module):
  """A table [V, D] of token embeddings.

  A fresh table is standard normal: it is the input of a normalized residual stream, where the usual 0.02
  drowns the token behind the first layers' outputs (a small model trained from scratch stays at the prior
  of its answers for thousands of steps; docs/quickstart.md has the measurement).
  """

  def __init__(self, vocab_size: int, dim: int, *, rngs: nnx.Rngs):
    self.embedding = make_param(jax.random.normal(rngs.params(), (vocab_size, dim)), ("vocab", "table"))

  def __call__(self, ids: Int[Array, "R S"], *, dtype: jnp.dtype) -> Float[Array, "R S D"]:
    return sharded_gather.embed(self.embedding[...], ids, dtype=dtype)


class LayerStack(nnx.Module):
  """Layers of one kind, stored as segments of stacked parameters and applied by `jax.lax.scan`.

  Compile time does not grow with depth. A segment is a contiguous range of layers, named by it
  ("0:20", "20:24"); a stack is split where layers differ in more than their weights: in whether they train,
  or in whether they run at all.
  """

  def __init__(
    self, make_layer: Callable[[nnx.Rngs], nnx.Module], *, bounds: tuple[int, ...], rngs: nnx.Rngs
  ):
    """Makes the layers of the segments between `bounds`, e.g. (0, 20, 24) for two segments."""
    segments = {}
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
      make = nnx.vmap(make_layer, in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
      segments[f"{start}:{stop}"] = nnx.split_rngs(splits=stop - start)(make)(rngs)
    self.segments = nnx.Dict(segments)

  def scan(
    self,
    apply: Callable[..., Any],
    x: Shaped[Array, "*carry"],
    *,
    xs: dict[str, jax.Array] | None = None,
    stop: int | None = None,
    remat: Callable[..., Any] | None = None,
    unroll: int = 1,
  ) -> tuple[Shaped[Array, "*carry"], dict[str, jax.Array]]:
    """Runs x through the layers below `stop`.

    Args:
      apply: function (layer, x, slice of xs) -> (x, outputs of this layer or {}).
      x: the carry.
      xs: per-layer inputs, each with a leading axis of all layers.
      stop: the first layer that does not run; it must be a bound of a segment. None runs all.
      remat: a wrapper such as `jax.checkpoint` with a policy; None keeps all activations.
      unroll: layers in the body of the loop.

    Returns:
      The last carry and the layers' outputs, stacked.
    """
    outputs = []
    for name, segment in self.segments.items():
      first, last = map(int, name.split(":"))
      if stop is not None and first >= stop:
        break
      assert stop is None or last <= stop, f"{stop} is not a bound of {list(self.segments)}"
      graph, weights = nnx.split(segment)

      def body(x: jax.Array, inputs: Any, graph: Any = graph):
        layer_weights, layer_xs = inputs
        return apply(nnx.merge(graph, layer_weights), x, layer_xs)

      segment_xs = jax.tree.map(lambda leaf, a=first, b=last: leaf[a:b], xs or {})
      x, out = jax.lax.scan(remat(body) if remat else body, x, (weights, segment_xs), unroll=unroll)
      outputs.append(out)
    if len(outputs) == 1:
      return x, outputs[0]
    return x, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs) if outputs else {}

  @property
  def sizes(self) -> dict[str, int]:
    """How many layers each segment has, by its name."""
    bounds = ((name, *map(int, name.split(":"))) for name in self.segments)
    return {name: stop - start for name, start, stop in bounds}

  def thread(
    self,
    apply: Callable[..., Any],
    x: Shaped[Array, "*carry"],
    states: dict[str, Any],
    *,
    xs: dict[str, jax.Array] | None = None,
  ) -> tuple[Shaped[Array, "*carry"], dict[str, Any]]:
    """Runs x through all layers, each of which changes its part of its segment's state in place.

    Args:
      apply: function (layer, x, state of the segment, number of the layer in it, slice of xs) -> (x, state).
      x: the carry.
      states: by the segments' names.
      xs: per-layer inputs, each with a leading axis of all layers.

    Returns:
      The last carry, and the states.
    """
    found, start = {}, 0
    for name, count in self.sizes.items():
      graph, weights = nnx.split(self.segments[name])

      def body(carry: Any, inputs: Any, graph: Any = graph):
        layer_weights, number, layer_xs = inputs
        return apply(nnx.merge(graph, layer_weights), *carry, number, layer_xs), None

      own = jax.tree.map(lambda leaf, a=start, n=count: leaf[a : a + n], xs or {})
      if count == 1:
        first = jax.tree.map(lambda leaf: leaf[0], (weights, own))
        (x, found[name]), _ = body((x, states[name]), (first[0], 0, first[1]))
      else:
        inputs = (weights, jnp.arange(count), own)
        (x, found[name]), _ = jax.lax.scan(body, (x, states[name]), inputs)
      start += count
    return x, found


def remat_by_name(policy: str | None, *, in_scan: bool = True) -> Callable[..., Any] | None:
  """The rematerialization wrapper of that name: None, "full" or "dots" (see RuntimeConfig.remat_policy).

  `in_scan` says that a scan's body is wrapped, where nothing need be done to keep what is computed twice apart.
  """
  if policy is None:
    return None
  policies = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
  }
  # prevent_cse=False is safe, and faster, inside a scan (jax.checkpoint's documentation).
  return lambda body: jax.checkpoint(body, policy=policies[policy], prevent_cse=not in_scan)
