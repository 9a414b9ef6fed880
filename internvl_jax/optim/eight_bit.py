"""Adam with moments of eight bits (arXiv:2110.02861), by the dynamic map and the blocks of bitsandbytes.

A moment of a matrix is a code of 8 bits for each number, and a float32 scale for each block of up to BLOCK numbers along one
axis: the largest magnitude in the block. Codes have the parameter's shape and sharding, scales the same with that axis
shorter. Each step decodes them, computes Adam's update in float32, and encodes the new moments.

Three things differ from bitsandbytes. Blocks follow an axis of the matrix, that which `fsdp` does not shard, so that no
block lies on two devices; bitsandbytes counts through the whole tensor. They are of 128 numbers, in place of 256, which is
what the shards of published models divide by. And a mean of squares that is not zero never gets the code of zero: by the
map alone it would below 1.6e-7 of its block's largest, and the next step of that number be up to 30 times too large.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from internvl_jax.hf.embeddings import EMBEDDING
from internvl_jax.trees import LAYER_RANGE

BLOCK = 128
"""Numbers that share a scale, at most."""

LEAST_BLOCK, LEAST_MATRIX = 16, 4096
"""Moments of matrices without such a block or with fewer numbers stay in float32, as in bitsandbytes."""

_DECADES = 7

_SHARDED = ("embed", "table")
"""Axes of weights that `fsdp` shards (`parallel.rules.WEIGHTS`)."""


class Quantized(NamedTuple):
  """A moment of eight bits.

  Attributes:
    codes: uint8, of the parameter's shape.
    scales: float32, with one number for each block along the axis of the blocks.
  """

  codes: jax.Array
  scales: jax.Array


class EightBitState(NamedTuple):
  """The state of `scale_by_adam_8bit`.

  Attributes:
    steps: int32, how many were taken.
    mu: the means of gradients by path, as `Quantized` or in float32.
    nu: those of their squares.
  """

  steps: jax.Array
  mu: dict[str, Any]
  nu: dict[str, Any]


def scale_by_adam_8bit(
  *, b1: float, b2: float, eps: float, axes: Mapping[str, Sequence[str | None]]
) -> optax.GradientTransformation:
  """Adam's direction, from moments of eight bits for matrices.

  Moments of vectors, of small matrices and of the input embedding are float32, as in Hugging Face's Trainer.

  Args:
    b1, b2, eps: Adam's.
    axes: the names of parameters' axes (`ModelDef.axes`), by which the axis of the blocks is chosen; of a path
      without, that is the last axis that has blocks.
  """

  def init(params: Any) -> EightBitState:
    def zeros(*, signed: bool) -> dict[str, Any]:
      return {path: _zeros(path, leaf, axes.get(path), signed=signed) for path, leaf in params.items()}

    return EightBitState(jnp.zeros((), jnp.int32), zeros(signed=True), zeros(signed=False))

  def update(updates: Any, state: EightBitState, params: Any = None) -> tuple[Any, EightBitState]:
    del params
    steps = jnp.asarray(optax.safe_increment(state.steps))
    found = {
      path: _step(grad, state.mu[path], state.nu[path], steps, (b1, b2, eps))
      for path, grad in updates.items()
    }
    directions, mu, nu = ({path: three[i] for path, three in found.items()} for i in range(3))
    return directions, EightBitState(steps, mu, nu)

  return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _step(
  grad: jax.Array, mu: Any, nu: Any, steps: jax.Array, settings: tuple[float, float, float]
) -> tuple[jax.Array, Any, Any]:
  """Adam's direction for a parameter, and its new moments."""
  b1, b2, eps = settings
  mean = b1 * _loaded(mu, signed=True) + (1 - b1) * grad
  square = b2 * _loaded(nu, signed=False) + (1 - b2) * grad**2
  direction = (mean / (1 - b1**steps)) / (jnp.sqrt(square / (1 - b2**steps)) + eps)
  return direction, _stored(mean, mu, signed=True), _stored(square, nu, signed=False)


# --- Which moments have eight bits ------------------------------------------------------------------------------


def block_of(path: str, shape: Sequence[int], axes: Sequence[str | None] | None) -> tuple[int, int] | None:
  """The axis of a parameter's blocks and their length; None if its moments are float32.

  It is the one of the last two axes that `fsdp` does not shard, if that has whole blocks of at least a quarter of
  BLOCK; else the one with the longer blocks.
  """
  leading = [name in ("layers", "expert") for name in axes] if axes else [bool(LAYER_RANGE.search(path))]
  is_matrix = len(shape) - sum(leading) >= 2 and math.prod(shape[-2:]) >= LEAST_MATRIX
  if not is_matrix or path == EMBEDDING:
    return None
  last, first = len(shape) - 1, len(shape) - 2
  order = [last, first] if axes is None or axes[last] not in _SHARDED else [first, last]
  lengths = {axis: math.gcd(shape[axis], BLOCK) for axis in order}
  axis = order[0] if lengths[order[0]] >= BLOCK // 4 else max(order, key=lambda axis: lengths[axis])
  return (axis, lengths[axis]) if lengths[axis] >= LEAST_BLOCK else None


def _zeros(path: str, leaf: Any, axes: Sequence[str | None] | None, *, signed: bool) -> Any:
  if (block := block_of(path, leaf.shape, axes)) is None:
    return jnp.zeros(leaf.shape, jnp.float32)
  axis, length = block
  blocks = (*leaf.shape[:axis], leaf.shape[axis] // length, *leaf.shape[axis + 1 :])
  zero = _codes_of_one_sign(signed=signed) if signed else 0
  return Quantized(jnp.full(leaf.shape, zero, jnp.uint8), jnp.zeros(blocks, jnp.float32))


def _loaded(moment: Any, *, signed: bool) -> jax.Array:
  """A moment in float32."""
  if not isinstance(moment, Quantized):
    return moment
  shape = moment.codes.shape
  codes, scales = _in_blocks(moment.codes, moment.scales.shape), moment.scales
  axis = _block_axis(shape, scales.shape)
  return (decode(codes, signed=signed) * jnp.expand_dims(scales, axis + 1)).reshape(shape)


def _stored(value: jax.Array, like: Any, *, signed: bool) -> Any:
  """A moment in the form of another."""
  if not isinstance(like, Quantized):
    return value
  axis = _block_axis(value.shape, like.scales.shape)
  blocks = _in_blocks(value, like.scales.shape)
  scales = jnp.max(jnp.abs(blocks), axis=axis + 1, keepdims=True)
  codes = encode(blocks / jnp.where(scales > 0, scales, 1), signed=signed)
  return Quantized(codes.reshape(value.shape), scales.squeeze(axis + 1))


def _block_axis(shape: tuple[int, ...], blocks: tuple[int, ...]) -> int:
  return next(axis for axis, (size, count) in enumerate(zip(shape, blocks, strict=True)) if size != count)


def _in_blocks(x: jax.Array, blocks: tuple[int, ...]) -> jax.Array:
  """The array with the axis of its blocks cut in two: which block, and which number in it."""
  axis = _block_axis(x.shape, blocks)
  return x.reshape(*x.shape[:axis], blocks[axis], x.shape[axis] // blocks[axis], *x.shape[axis + 1 :])


# --- The dynamic map --------------------------------------------------------------------------------------------


def _codes_of_one_sign(*, signed: bool) -> int:
  """How many codes stand for numbers above 0 and below 1: 127 of a signed map, which has as many below 0, or 254."""
  return 127 if signed else 254


def _decades(*, signed: bool) -> list[tuple[int, int, float]]:
  """(codes before, codes in it, its upper end) of each decade from 1e-7 to 1, in each of which codes are twice as many."""
  first = 1 if signed else 2
  return [(first * (2**i - 1), first * 2**i, 10.0 ** (i - _DECADES + 1)) for i in range(_DECADES)]


def encode(x: jax.Array, *, signed: bool) -> jax.Array:
  """The nearest codes uint8 of numbers float32 in [-1, 1], or [0, 1] if not signed.

  The map divides each decade [10^-k, 10^(1-k)] into equal parts, whose middles are its numbers; there are 0 and 1 besides.
  Codes are counted from the lowest number, as bitsandbytes does. Of squares (not signed), only 0 has the code of 0.
  """
  size, last = jnp.abs(x), _codes_of_one_sign(signed=signed) + 1
  code = jnp.zeros(x.shape, jnp.int32)
  for before, count, end in _decades(signed=signed):
    # Halfway between the last number of the decade before (0 before the first one) and the first of this one.
    start = end * (0.1 + 0.18 / count) if before else end * (0.05 + 0.225 / count)
    inside = jnp.clip(jnp.floor((size / end - 0.1) * (count / 0.9)), 0, count - 1)
    code = jnp.where(size >= start, 1 + before + inside.astype(jnp.int32), code)
  if not signed:
    code = jnp.where((size > 0) & (code == 0), 1, code)
    return jnp.where(size >= 1 - 0.225 / 128, last, code).astype(jnp.uint8)
  # There is a 1, but no -1.
  code = jnp.where(x >= 1 - 0.225 / 64, last, code)
  return (last - 1 + jnp.where(x < 0, -code, code)).astype(jnp.uint8)


def decode(codes: jax.Array, *, signed: bool) -> jax.Array:
  """The numbers float32 of codes; see `encode`. By arithmetic, as accelerators are slow at looking numbers up in tables."""
  last = _codes_of_one_sign(signed=signed) + 1
  code = codes.astype(jnp.int32) - (last - 1 if signed else 0)
  size = jnp.abs(code)
  value = jnp.zeros(codes.shape, jnp.float32)
  for before, count, end in _decades(signed=signed):
    inside = (size - 1 - before).astype(jnp.float32)
    value = jnp.where(size > before, end * (0.1 + (0.9 / count) * (inside + 0.5)), value)
  value = jnp.where(size == last, 1.0, value)
  return jnp.where(code < 0, -value, value)
