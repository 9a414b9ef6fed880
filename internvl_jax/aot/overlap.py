"""Which exchanges between devices a program hides behind products, by the order in which it runs them.

A collective is asynchronous: one line starts it, another waits for its result. What is between the two lines runs
beside it.
"""

import dataclasses
import re
from collections.abc import Sequence

from internvl_jax.aot.hlo import Instruction, Module
from internvl_jax.aot.operations import product_flops

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# Attention, grouped products and the like: work enough to hide behind, whose amount is not in the program.
_KERNELS = re.compile(r'custom_call_target="[^"]*(triton|mosaic|cudnn|fmha)', re.I)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
  """A collective, and what runs beside it.

  Attributes:
    kind: all-gather, reduce-scatter, all-reduce, all-to-all or collective-permute.
    bytes: of the whole array on a device, before it is scattered or after it is gathered.
    runs: how often it runs in a step.
    flops: operations of the products between its start and its end, each time.
    kernels: kernels written by hand that run between, each time.
    op_name: where in the traced program it comes from.
  """

  kind: str
  bytes: int
  runs: int
  flops: int
  kernels: int
  op_name: str

  @property
  def hidden(self) -> bool:
    """Whether there is a product, or a kernel written by hand, to hide it behind."""
    return bool(self.flops or self.kernels)


def exchanges(module: Module) -> list[Exchange]:
  """The collectives of a scheduled program, the ones that nothing runs beside included."""
  found = []
  for name in sorted(module.control - _wrapped(module)):
    lines = list(module.computations[name].values())
    for i, line in enumerate(lines):
      collective = _collective(module, line)
      if collective is None or not module.runs[name]:
        continue
      flops, kernels = _work(module, name, _beside(lines, i))
      inputs, results = _bytes(module.computations[name], line, collective)
      exchange = Exchange(
        kind=collective.opcode.removesuffix("-start"),
        bytes=max(inputs, results),
        runs=module.runs[name],
        flops=flops,
        kernels=kernels,
        op_name=collective.op_name or line.op_name,
      )
      found.append(exchange)
  return found


def hidden_share(found: Sequence[Exchange]) -> float:
  """The share of the bytes of a step that are exchanged beside products; 1 where nothing is exchanged."""
  total = sum(exchange.bytes * exchange.runs for exchange in found)
  return (
    sum(exchange.bytes * exchange.runs for exchange in found if exchange.hidden) / total if total else 1.0
  )


def _wrapped(module: Module) -> set[str | None]:
  """The computations that hold what a line of another one starts."""
  lines = (line for found in module.computations.values() for line in found.values())
  return {line.called("calls") for line in lines if line.opcode == "async-start"}


def _collective(module: Module, line: Instruction) -> Instruction | None:
  """The collective that a line runs or starts; None: it is another kind of line."""
  if line.opcode == "async-start" and (callee := line.called("calls")) in module.computations:
    wrapped = module.computations[callee].values()
    return next((inner for inner in wrapped if inner.opcode in _KINDS), None)
  return line if line.opcode.removesuffix("-start") in _KINDS else None


def _beside(lines: Sequence[Instruction], start: int) -> Sequence[Instruction]:
  """The lines between the one that starts a collective and the one that waits for it."""
  name = lines[start].name
  for i in range(start + 1, len(lines)):
    if lines[i].opcode.endswith("-done") and name in lines[i].operands:
      return lines[start + 1 : i]
  return ()


def _bytes(lines: dict[str, Instruction], line: Instruction, collective: Instruction) -> tuple[int, int]:
  """Bytes that a collective, which a line runs or starts, takes and gives."""
  inputs = sum(lines[name].bytes for name in line.operands if name in lines)
  # A line that starts one gives its operands along with its results.
  return inputs, collective.bytes - (inputs if collective.opcode.endswith("-start") else 0)


# --- Work ---------------------------------------------------------------------------------------------------


def _work(module: Module, computation: str, lines: Sequence[Instruction]) -> tuple[int, int]:
  """Operations of the products, and kernels, of some lines of a computation, with what they call."""
  flops = kernels = 0
  for line in lines:
    flops += product_flops(line, module.computations[computation])
    kernels += line.opcode == "custom-call" and bool(_KERNELS.search(line.attributes))
    for callee, times in module.calls(line):
      inner = _work(module, callee, list(module.computations[callee].values()))
      flops, kernels = flops + times * inner[0], kernels + times * inner[1]
  return flops, kernels
