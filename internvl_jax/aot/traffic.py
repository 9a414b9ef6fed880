"""Bytes that a compiled program moves to and from the main memory."""

from internvl_jax.aot.hlo import Instruction, Module
from internvl_jax.aot.operations import is_library_product

_FREE = frozenset(
  {"parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional"}
  | {"after-all", "partition-id", "replica-id", "async-start", "async-update"}
)


def bytes_moved(module: Module) -> int:
  """Bytes that a device's instructions read from and write to its main memory, as an estimate.

  Each instruction reads its operands and writes its results, of which slices and updates touch only their part.
  Padding is left out.
  """
  total = 0
  for name in module.control:
    lines = module.computations[name]
    moved = 0
    for line in lines.values():
      if line.opcode not in _FREE and not line.opcode.endswith("-done"):
        moved += _read(module, line, lines) + _written(module, line)
    total += module.runs[name] * moved
  return total


def _read(module: Module, line: Instruction, lines: dict[str, Instruction]) -> int:
  if line.opcode == "dynamic-slice" or line.opcode == "gather":
    return line.in_memory
  operands = [lines[name] for name in line.operands if name in lines]
  if line.opcode == "dynamic-update-slice":
    return operands[1].in_memory
  callee = line.called("calls") if line.opcode == "fusion" else None
  if callee is None:
    return sum(operand.in_memory for operand in operands)
  return sum(min(operand.in_memory, _used(module, callee, i)) for i, operand in enumerate(operands))


def _used(module: Module, computation: str, index: int) -> int:
  """Bytes of a fusion's parameter that it reads."""
  lines = module.computations[computation]
  source = next(
    (line for line in lines.values() if line.opcode == "parameter" and line.operands == (str(index),)), None
  )
  if source is None:
    return 0
  aliases, total = {source.name}, 0
  for line in lines.values():
    places = [i for i, name in enumerate(line.operands) if name in aliases]
    if not places:
      continue
    if line.opcode == "bitcast":
      aliases.add(line.name)
    elif line.opcode in ("dynamic-slice", "gather") and places == [0]:
      total += line.bytes
    elif line.opcode == "dynamic-update-slice" and places == [0]:
      continue
    elif line.opcode == "fusion" and (callee := line.called("calls")):
      total += sum(_used(module, callee, i) for i in places)
    else:
      return source.bytes
  return total


def _written(module: Module, line: Instruction) -> int:
  if line.opcode == "dynamic-update-slice":
    return 0  # What is written is what was read: counted once there, once here would need its operand.
  callee = line.called("calls") if line.opcode == "fusion" else None
  if is_library_product(line):
    return line.arrays[0].bytes  # The second is scratch space.
  if callee is None or not line.in_memory:
    return line.in_memory
  lines = module.computations[callee]
  root = next(inner for inner in lines.values() if inner.is_root)
  results = [lines[name] for name in root.operands] if root.opcode == "tuple" else [root]
  total = 0
  for result, array in zip(results, line.arrays, strict=False):
    update = _update_of(result, lines)
    total += 0 if array.on_chip else update if update is not None else array.bytes
  return total


def _update_of(result: Instruction, lines: dict[str, Instruction]) -> int | None:
  """Bytes of the part that is written, where the result is an array with a part replaced."""
  while result.opcode == "bitcast":
    result = lines[result.operands[0]]
  if result.opcode != "dynamic-update-slice":
    return None
  return lines[result.operands[1]].bytes
