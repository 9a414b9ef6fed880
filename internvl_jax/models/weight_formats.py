"""Formats for weights that are stored in fewer bits: NF4 with double quantization (QLoRA, arXiv:2305.14314), and int8.

The numbers are bitsandbytes' `Linear4bit` (nf4, compressed statistics) and `Linear8bitLt`, so that what is trained on
them is trained on the base model that PEFT loads with `load_in_4bit` or `load_in_8bit`.

    nf4     blocks of 64 weights along D share a scale, their absmax; a weight is the nearest of 16 values times that. Scales
            less their mean, in blocks of 256 in PyTorch's order (F, then D), are 8-bit codes times a scale of their own.
    int8    a column of D weights shares a scale, its absmax; a weight is the nearest of 255 equal steps.

An array of codes is in two steps, so that a shard can be encoded without the others: `encode` needs blocks that are
whole, and `compress` the scales of the whole matrix.

Letters: D width in, F width out, n = D / 64 blocks, m = ceil(n F / 256) groups of scales.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, Num, UInt8

Parts = Mapping[str, jax.Array]
"""What a matrix is stored as: `codes`, `scales`, and of NF4 `scale_scales` and `scale_offset`."""

NF4_VALUES = (
  *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
  *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
  *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
  *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of a normal distribution: what a code stands for, in units of the block's scale (arXiv:2305.14314, appendix E)."""

BLOCK, GROUP = 64, 256
"""Weights that share a scale, and scales that share one; bitsandbytes' defaults."""

_HALF = BLOCK // 2

# What zeros are divided by: the smallest number that is not flushed to zero.
_TINY = float(np.finfo(np.float32).tiny)

# Between two values: a number at the border takes the lower one.
_BORDERS = (np.array(NF4_VALUES[1:], np.float32) + np.array(NF4_VALUES[:-1], np.float32)) / np.float32(2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFormat:
  """How matrices [D, F] are stored.

  Attributes:
    name: what `lora.quantize_base` says.
    block: weights along D that share a scale; None: all of a column.
    packed: codes in a byte, which are of rows of one block.
    encode: [D, F] -> codes and scales in float32 [blocks, F].
    decode: codes and scales, and a dtype, float32 if none is given -> [D, F].
    compress: scales [blocks, F] -> all parts but the codes.
    expand: parts -> scales [blocks, F] in float32.
  """

  name: str
  block: int | None
  packed: int
  encode: Callable[[Float[Array, "D F"]], tuple[jax.Array, jax.Array]]
  decode: Callable[..., Float[Array, "D F"]]
  compress: Callable[[Float[Array, "n F"]], dict[str, jax.Array]]
  expand: Callable[[Parts], Float[Array, "n F"]]

  def fits(self, width: int) -> bool:
    """Whether a column of so many weights is whole blocks."""
    return self.block is None or width % self.block == 0

  def blocks(self, width: int) -> int:
    """How many scales a column of so many weights has."""
    return 1 if self.block is None else width // self.block

  def quantize(self, kernel: Float[Array, "*lead D F"]) -> dict[str, jax.Array]:
    """The parts of matrices [..., D, F]."""

    def one(kernel: jax.Array) -> dict[str, jax.Array]:
      codes, scales = self.encode(kernel)
      return {"codes": codes, **self.compress(scales)}

    return over_lead(one, kernel.ndim - 2)(kernel)

  def restore(self, parts: Parts) -> Float[Array, "*lead D F"]:
    """The matrices [..., D, F] that parts stand for, in float32."""
    return over_lead(lambda parts: self.decode(parts["codes"], self.expand(parts)), parts["codes"].ndim - 2)(
      dict(parts)
    )

  def shape(self, codes: Sequence[int]) -> tuple[int, ...]:
    """The shape of the matrices whose codes have that shape."""
    return (*codes[:-2], codes[-2] * self.packed, codes[-1])


def over_lead(function: Callable[..., Any], axes: int) -> Callable[..., Any]:
  """A function of one matrix for arrays with so many axes before it."""
  for _ in range(axes):
    function = jax.vmap(function)
  return function


# --- NF4 ------------------------------------------------------------------------------------------------------


def _encode_nf4(kernel: Float[Array, "D F"]) -> tuple[UInt8[Array, "half F"], Float[Array, "n F"]]:
  """Codes, two to a byte, and the absmax of blocks. The second half of a block's rows is in the lower four bits."""
  D, F = kernel.shape
  blocks = kernel.astype(jnp.float32).reshape(D // BLOCK, BLOCK, F)
  absmax = jnp.max(jnp.abs(blocks), axis=1)
  scaled = blocks * (1 / jnp.maximum(absmax, _TINY))[:, None]
  codes = jnp.zeros(scaled.shape, jnp.uint8)
  for border in _BORDERS:
    codes += scaled > border
  packed = (codes[:, :_HALF] << 4) | codes[:, _HALF:]
  return packed.reshape(D // 2, F), absmax


def _decode_nf4(
  codes: UInt8[Array, "half F"], absmax: Float[Array, "n F"], dtype: Any = jnp.float32
) -> Float[Array, "D F"]:
  F = codes.shape[-1]
  shifts = jnp.array([4, 0], jnp.uint8)[:, None, None]
  numbers = (codes.reshape(-1, 1, _HALF, F) >> shifts) & 15
  # Rounded before it is laid out anew: a matrix in float32 would be written to memory.
  return (_lookup(numbers) * absmax[:, None, None]).astype(dtype).reshape(-1, F)


def _lookup(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
  """`NF4_VALUES[codes]` by a tree of choices: fast where a gather from a table is not, which is on TPUs and CPUs."""
  # Of the codes, though zero: JAX would take arrays of constants out of a scan over layers, and keep them all.
  zero = (codes & 0).astype(jnp.float32)
  values = [zero + np.float32(value) for value in NF4_VALUES]
  for bit in range(4):
    is_set = ((codes >> bit) & 1).astype(bool)
    values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
  return values[0]


def dynamic_map() -> Float[np.ndarray, " 256"]:
  """The values of codes of scales: 2^i steps in each of seven decades, both signs, 0 and 1 (arXiv:1511.04561)."""
  positive = [
    (np.linspace(0.1, 1, 2**i + 1)[:-1] + np.linspace(0.1, 1, 2**i + 1)[1:]) / 2 * 10.0 ** (i - 6)
    for i in range(7)
  ]
  found = np.concatenate(positive)
  return np.concatenate([-found[::-1], [0.0], found, [1.0]]).astype(np.float32)


def _dynamic_values(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
  """`dynamic_map()[codes]`, calculated: step j of decade i is 0.1 + 0.9 (j + 1/2) / 2^i, times 10^(i - 6)."""
  rank = codes.astype(jnp.float32) - 127
  size = jnp.abs(rank)
  decades = [(0.1 * 10.0 ** (i - 6), 0.9 / 2**i * 10.0 ** (i - 6)) for i in range(7)]
  value = size  # Of rank 0, which has no sign.
  for i, (start, step) in enumerate([*decades, (1.0, 0.0)]):
    value = jnp.where(size >= 2**i, start + step / 2 + step * (size - 2**i), value)
  return jnp.sign(rank) * value


def _compress_scales(absmax: Float[Array, "n F"]) -> dict[str, jax.Array]:
  """Double quantization: codes of the scales less their mean, and the absmax of groups of 256."""
  n, F = absmax.shape
  offset = jnp.mean(absmax)
  flat = jnp.pad((absmax - offset).T.reshape(-1), (0, -absmax.size % GROUP))
  groups = flat.reshape(-1, GROUP)
  largest = jnp.max(jnp.abs(groups), axis=1)
  table = dynamic_map()
  scaled = groups * (1 / jnp.maximum(largest, _TINY))[:, None]
  codes = jnp.searchsorted((table[1:] + table[:-1]) / 2, scaled, method="scan_unrolled").astype(jnp.uint8)
  return {
    "scales": codes.reshape(-1)[: n * F].reshape(F, n).T,
    "scale_scales": largest,
    "scale_offset": offset[None],
  }


def _expand_scales(parts: Parts) -> Float[Array, "n F"]:
  n, F = parts["scales"].shape
  groups = jnp.repeat(parts["scale_scales"], GROUP)[: n * F].reshape(F, n).T
  scales = _dynamic_values(parts["scales"]) * groups + parts["scale_offset"]
  # Fused with what follows, they would be computed for each weight of a block, and be rounded in different ways.
  return jax.lax.optimization_barrier(scales)


# --- int8 -----------------------------------------------------------------------------------------------------


def _encode_int8(kernel: Float[Array, "D F"]) -> tuple[Int8[Array, "D F"], Float[Array, "one F"]]:
  kernel = kernel.astype(jnp.float32)
  absmax = jnp.max(jnp.abs(kernel), axis=0, keepdims=True)
  steps = kernel * (127 / jnp.maximum(absmax, _TINY))
  return jnp.round(steps).astype(jnp.int8), absmax


def _decode_int8(
  codes: Int8[Array, "D F"], absmax: Float[Array, "one F"], dtype: Any = jnp.float32
) -> Float[Array, "D F"]:
  return (codes.astype(jnp.float32) * absmax * np.float32(1 / 127)).astype(dtype)


def _uncompressed(absmax: Float[Array, "one F"]) -> dict[str, jax.Array]:
  return {"scales": absmax}


FORMATS: dict[str, WeightFormat] = {
  "int8": WeightFormat(
    name="int8",
    block=None,
    packed=1,
    encode=_encode_int8,
    decode=_decode_int8,
    compress=_uncompressed,
    expand=lambda parts: parts["scales"],
  ),
  "nf4": WeightFormat(
    name="nf4",
    block=BLOCK,
    packed=2,
    encode=_encode_nf4,
    decode=_decode_nf4,
    compress=_compress_scales,
    expand=_expand_scales,
  ),
}
"""What `lora.quantize_base` may say, apart from "none"."""


def format_of(codes: Num[Array, "..."] | jax.ShapeDtypeStruct) -> WeightFormat:
  """The format whose codes have that dtype."""
  return FORMATS["int8" if codes.dtype == jnp.int8 else "nf4"]
