"""Operations of a compiled program: matrix products in all the forms that compilers write them, and kernels."""

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np

from internvl_jax.aot.hlo import Array, Instruction, Module

_FLOATS = ("bf16", "f16", "f32")


def flops(module: Module) -> int:
  """Operations of the program's matrix products on a device; kernels written by hand are not looked into."""
  total = 0
  for name, lines in module.computations.items():
    if module.runs[name]:
      total += module.runs[name] * sum(product_flops(line, lines) for line in lines.values())
  return total


def is_library_product(instruction: Instruction) -> bool:
  """Whether it calls cuBLAS for a product: what XLA for GPUs makes of most."""
  return instruction.opcode == "custom-call" and instruction.target.startswith("__cublas$")


def product_flops(instruction: Instruction, lines: dict[str, Instruction]) -> int:
  """Operations of a line that is a matrix product, among the lines of its computation; 0 for other lines."""
  if instruction.opcode == "dot":
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    return _dot_flops(instruction, lines, re.findall(r"\d+", contracted[1]) if contracted else [])
  if is_library_product(instruction):
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
    assert contracted, instruction.attributes[:200]
    return _dot_flops(instruction, lines, re.findall(r"\d+", contracted[1]))
  if instruction.opcode == "convolution":  # What XLA for TPUs makes of a matrix product.
    return _convolution_flops(instruction, lines)
  return 0


def _dot_flops(instruction: Instruction, lines: dict[str, Instruction], contracted: list[str]) -> int:
  lhs = lines[instruction.operands[0]].arrays[0].dims
  return 2 * math.prod(instruction.arrays[0].dims) * math.prod(lhs[int(i)] for i in contracted)


def _convolution_flops(instruction: Instruction, lines: dict[str, Instruction]) -> int:
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
  assert labels
  lhs, kernel, out = labels.groups()
  lhs_dims, kernel_dims = (lines[name].arrays[0].dims for name in instruction.operands[:2])
  out_dims = instruction.arrays[0].dims
  total = 2 * out_dims[out.index("b")] * out_dims[out.index("f")] * kernel_dims[kernel.index("i")]
  window = dict(
    re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", instruction.attributes) or [""])[0])
  )
  for i in range(len(lhs) - 2):

    def setting(name: str, default: str, i: int = i) -> str:
      return window[name].split("x")[i] if name in window else default

    total *= _overlaps(
      lhs_dims[lhs.index(str(i))],
      kernel_dims[kernel.index(str(i))],
      out_dims[out.index(str(i))],
      stride=int(setting("stride", "1")),
      before=int(setting("pad", "0_0").split("_")[0]),
      lhs_dilate=int(setting("lhs_dilate", "1")),
      rhs_dilate=int(setting("rhs_dilate", "1")),
    )
  return total


def _overlaps(size, taps, out, *, stride, before, lhs_dilate, rhs_dilate) -> int:
  """Pairs of an output and a tap of the window that meet an element of the input, not padding between them.

  So that a batch dimension, which XLA writes as a window over an input dilated by zeros, counts once.
  """
  places = np.arange(out)[:, None] * stride + np.arange(taps) * rhs_dilate - before
  return int(np.sum((places >= 0) & (places % lhs_dilate == 0) & (places // lhs_dilate < size)))


# --- Kernels written by hand --------------------------------------------------------------------------------


def kernel_flops(module: Module, expert_parts: int = 1) -> int:
  """Operations of kernels written by hand (`_KERNELS`), by the shapes they are called with.

  Of attention, those of the slowest device: of a causal mask's square, the blocks that it leaves count; what segments
  hide within them is not known. Of experts, those of an even load: where a device has one of so many parts of them,
  as many of the rows that it is given are for its own.
  """
  total = 0.0
  for name, lines in module.computations.items():
    for line in lines.values() if module.runs[name] else ():
      if kernel := _kernel_of(line):
        arrays = [lines[operand].arrays[0] for operand in line.operands if operand in lines]
        share = 1 / expert_parts if kernel.of_experts else 1.0
        total += module.runs[name] * share * kernel.products * kernel.product(line, arrays)
  return round(total)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kernel:
  """How a kernel's operations are counted.

  Attributes:
    name: what its name begins with, as a regular expression.
    products: matrix products that it computes, those computed again included.
    product: operations of one of them, by the call and the arrays that it is called with.
    of_experts: whether its rows are for experts.
  """

  name: str
  products: int
  product: Callable[[Instruction, list[Array]], float]
  of_experts: bool = False


def _kernel_of(line: Instruction) -> _Kernel | None:
  if line.opcode != "custom-call":
    return None
  name = kernel_name(line)
  return next((kernel for kernel in _KERNELS if re.match(kernel.name, name)), None)


def kernel_name(line: Instruction) -> str:
  """What a kernel was called where it was written: on TPUs its instruction is called so, on GPUs its scope."""
  if line.target == "__gpu$xla.gpu.triton":
    return line.op_name.removesuffix("/pallas_call").rpartition("/")[2]
  return line.name


def _rows_by_groups(line: Instruction, arrays: list[Array]) -> float:
  """Operations of a product of all rows with the matrix of their group, or of its gradient."""
  rows = next(array.dims for array in arrays if array.dtype in _FLOATS)
  return 2 * math.prod(rows) * line.arrays[0].dims[-1]


def _splash_square(line: Instruction, arrays: list[Array]) -> float:
  """Operations of one product of queries [N, T, H] by keys in a splash kernel."""
  del line
  q, k = [array.dims for array in arrays if array.dtype in _FLOATS][:2]
  square = 2 * math.prod(q) * k[-2]
  # Segments are two lists of integers; a mask computed in the kernel brings a third, of the queries' places.
  if sum(array.dtype == "s32" for array in arrays) % 2 == 0:
    return square
  blocks, width = arrays[0].dims[-2:]
  across = k[-2] * blocks // q[-2]
  return square * min((2 * across - blocks + 1) / (2 * across), width / across)


def _square(line: Instruction, arrays: list[Array]) -> float:
  """Operations of one product of queries [B, T, N, H] by keys [B, S, K, H]; "causal" in the kernel's name halves it."""
  q, k = [array.dims for array in arrays if array.dtype in _FLOATS][:2]
  square = 2 * math.prod(q) * k[-3]
  return square / 2 if "causal" in kernel_name(line) else square


_KERNELS = (
  _Kernel(name="splash_mha_fwd", products=2, product=_splash_square),
  _Kernel(name="splash_mha_dkv", products=4, product=_splash_square),
  _Kernel(name="splash_mha_dq", products=3, product=_splash_square),
  _Kernel(name="t?gmm", products=1, product=_rows_by_groups, of_experts=True),
  _Kernel(name="attention_fwd", products=2, product=_square),
  _Kernel(name="attention_dkv", products=4, product=_square),
  _Kernel(name="attention_dq", products=3, product=_square),
  _Kernel(name="grouped_matmul(_dw)?", products=1, product=_rows_by_groups, of_experts=True),
)
