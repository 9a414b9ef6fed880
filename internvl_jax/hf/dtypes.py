"""Which numbers are none: types that are no weights, and values that are not finite.

Whether a number of an IEEE type is finite is seen by its exponent alone: with the sign shifted out, NaN and infinity
are the largest integers. So one pass of integer maxima over what was just read tells, for all widths alike.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from internvl_jax.errors import UserError

WEIGHTS = ("BF16", "F16", "F32", "F64")
"""The types of numbers that are read as weights, by safetensors' names."""

# By type: its integer, and the smallest value of a number that is not finite, its sign shifted out.
_LIMITS: Mapping[np.dtype, tuple[type, int]] = {
  np.dtype(np.float64): (np.uint64, 0xFFE << 52),
  np.dtype(np.float32): (np.uint32, 0xFF << 24),
  np.dtype(np.float16): (np.uint16, 0x1F << 11),
  np.dtype(ml_dtypes.bfloat16): (np.uint16, 0xFF << 8),
}

_BLOCK = 2**16
"""Numbers checked together: they and the shifted copy fit the cache."""


def is_float(array: np.ndarray) -> bool:
  """Whether an array is of one of the types of weights."""
  return array.dtype in _LIMITS


def all_finite(array: np.ndarray) -> bool:
  """Whether a contiguous array of floats holds neither NaN nor infinity."""
  integer, limit = _LIMITS[array.dtype]
  bits = array.reshape(-1).view(integer)
  shifted = np.empty(min(_BLOCK, bits.size), integer)
  for start in range(0, bits.size, _BLOCK):
    part = bits[start : start + _BLOCK]
    if np.left_shift(part, 1, out=shifted[: part.size]).max() >= limit:
      return False
  return True


def count_not_finite(array: np.ndarray) -> int:
  """How many numbers of an array of floats are NaN or infinite."""
  return int(np.count_nonzero(~np.isfinite(array)))


_PACKED_EXPERTS = re.compile(r".*\.experts\.\w+_(blocks|scales)")
"""MXFP4, the one packed form that is read."""

_QUANTIZED = re.compile(
  r".*\.(qweight|qzeros|scales|g_idx|SCB|weight_format|absmax|nested_absmax|quant_map|nested_quant_map|quant_state\.\S+|"
  r"weight_scale(_inv|_2)?|input_scale|weight_packed|weight_shape|weight_zero_point|zero_point|weight\.absmax|"
  r"weight\.quant_\S+|weight\.nested_\S+)"
)
"""Names of what GPTQ, AWQ, bitsandbytes, compressed-tensors and block-wise float8 keep beside quantized weights."""


def refuse_quantized(
  types: Mapping[str, str], key: Callable[[str], str], where: Mapping[str, Path], said: str | None
) -> None:
  """Refuses a checkpoint whose tensors are packed, or of a type that is no weight.

  Args:
    types: by a tensor's name, its type as safetensors names it.
    key: what the file calls a tensor.
    where: the file of each tensor.
    said: the entry of config.json on how it is quantized, if there is one.

  Raises:
    UserError: it names the first such tensor, and all types there are.
  """
  typed = [
    name for name, found in types.items() if found not in WEIGHTS and not _is_packed_expert(name, found)
  ]
  named = [name for name in types if _QUANTIZED.fullmatch(name)]
  if not typed and not named:
    return
  first, count = (typed or named)[0], len({*typed, *named})
  found = sorted({types[name] for name in typed or named})
  more = f", and {count - 1} more are of quantized weights (types: {', '.join(found)})" if count > 1 else ""
  config = f"config.json says {said}" if said else "config.json does not say how"
  raise UserError(
    f"{where[first]}: the tensor {key(first)} has the type {types[first]}{more}: these are quantized weights, not to be "
    f"trained or converted, and {config}; take the checkpoint that is not quantized, or let the program that made this one "
    "write it in bfloat16"
  )


def _is_packed_expert(name: str, found: str) -> bool:
  return found == "U8" and _PACKED_EXPERTS.fullmatch(name) is not None
