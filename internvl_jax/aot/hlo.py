"""Reads a compiled program (HLO as text): its loops, and what runs in them how often.

The compiler's own totals count the body of a loop once; here it counts as often as it runs.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_HEADER = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_ARRAY = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<dims>[\d,]*)\](?P<layout>\{[^}]*\})?")
_NAME = re.compile(r"%?([\w.\-]+(#\d+)?)\s*$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# Memory that is not the chip's main one: tiles of the chip's own memories.
_ON_CHIP = re.compile(r"S\([1-9]\d*\)")

_BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Array:
  """An array of an instruction's type."""

  dtype: str
  dims: tuple[int, ...]
  on_chip: bool

  @property
  def bytes(self) -> int:
    """Bytes without padding."""
    return math.prod(self.dims) * _bits(self.dtype) // 8


@functools.cache
def _bits(dtype: str) -> int:
  if dtype == "pred":
    return 8
  found = _BITS.search(dtype)
  return int(found[0]) if found else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of a computation.

  Attributes:
    operands: names of the lines whose results it takes.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  attributes: str
  is_root: bool

  @property
  def bytes(self) -> int:
    """Bytes of all its results."""
    return sum(array.bytes for array in self.arrays)

  @property
  def in_memory(self) -> int:
    """Bytes of those results that are in the main memory."""
    return sum(array.bytes for array in self.arrays if not array.on_chip)

  @property
  def op_name(self) -> str:
    """Where in the traced program it comes from."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ""

  @property
  def target(self) -> str:
    """What a custom call calls."""
    found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
    return found[1] if found else ""

  def called(self, attribute: str) -> str | None:
    """The computation that an attribute names, e.g. `body`."""
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
    return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Module:
  """A program: computations by name, and the one it begins with."""

  computations: dict[str, dict[str, Instruction]]
  entry: str

  @functools.cached_property
  def runs(self) -> dict[str, int]:
    """How often each computation runs, those inside of fusions included."""
    runs: dict[str, int] = dict.fromkeys(self.computations, 0)

    def visit(name: str, times: int) -> None:
      runs[name] += times
      for instruction in self.computations[name].values():
        for callee, repeats in self.calls(instruction):
          visit(callee, times * repeats)

    visit(self.entry, 1)
    return runs

  @functools.cached_property
  def control(self) -> set[str]:
    """The computations whose instructions run one by one: not those inside of fusions and reductions."""
    found: set[str] = set()
    pending = [self.entry]
    while pending:
      name = pending.pop()
      if name not in found:
        found.add(name)
        for instruction in self.computations[name].values():
          if instruction.opcode in ("while", "call", "conditional", "async-start"):
            pending += [callee for callee, _ in self.calls(instruction)]
    return found

  def calls(self, instruction: Instruction) -> Iterator[tuple[str, int]]:
    """The computations that an instruction runs, and how often."""
    if instruction.opcode == "while":
      body, condition = instruction.called("body"), instruction.called("condition")
      assert body and condition
      yield body, self._trips(instruction, body, condition) or 1
    elif instruction.opcode in ("fusion", "async-start", "call"):
      callee = instruction.called("calls") or instruction.called("to_apply")
      if callee in self.computations:
        yield callee, 1
    elif instruction.opcode == "conditional":
      found = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
      names = (
        [name.strip().lstrip("%") for name in found[1].split(",")]
        if found
        else [instruction.called("true_computation"), instruction.called("false_computation")]
      )
      yield from ((name, 1) for name in names if name)

  @functools.cached_property
  def uncounted_loops(self) -> list[str]:
    """The loops whose number of runs is not in the program; they are counted as one run."""
    loops = (
      line for name in self.control for line in self.computations[name].values() if line.opcode == "while"
    )
    found = []
    for loop in loops:
      body, condition = loop.called("body"), loop.called("condition")
      assert body and condition
      if self._trips(loop, body, condition) is None:
        found.append(loop.name)
    return found

  def _trips(self, loop: Instruction, body: str, condition: str) -> int | None:
    """How often a loop's body runs: by the compiler's annotation, or by its counter's bound and step; None: unknown."""
    if found := _TRIPS.search(loop.attributes):
      return int(found[1])
    test = next(line for line in self.computations[condition].values() if line.is_root)
    operands = [self.computations[condition].get(name) for name in test.operands]
    bound = next((_constant(line) for line in operands if line and line.opcode == "constant"), None)
    counter = next((line for line in operands if line and line.opcode == "get-tuple-element"), None)
    if bound is None or counter is None:
      return None
    lines = self.computations[body]
    results = next(line for line in lines.values() if line.is_root)
    next_value = lines.get(results.operands[element(counter)])
    steps = [lines.get(name) for name in next_value.operands] if next_value is not None else []
    step = next((_constant(line) for line in steps if line and line.opcode == "constant"), None)
    # Counters begin at 0: so do `lax.scan` and the loops that XLA makes of products and exchanges.
    return math.ceil(bound / (step or 1))


def _constant(line: Instruction) -> int | None:
  return int(line.operands[0]) if line.operands and line.operands[0].isdigit() else None


def element(line: Instruction) -> int:
  """Which element a get-tuple-element gets."""
  found = re.search(r"index=(\d+)", line.attributes)
  return int(found[1]) if found else 0


def parse(text: str) -> Module:
  """Reads a module as XLA prints it."""
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = "", {}
  for line in text.splitlines():
    if line.endswith("{") and (header := _HEADER.match(line)):
      current = computations[header["name"]] = {}
      entry = header["name"] if header["entry"] else entry
    elif found := _INSTRUCTION.match(line):
      instruction = _instruction(found["name"], found["rest"], bool(found["root"]))
      current.update(_elements(instruction, current))
      current[instruction.name] = instruction
  return Module(computations, entry)


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  opcode, _, _ = rest[end + 1 :].partition("(")
  start = end + 1 + len(opcode)
  stop = _closing(rest, start)
  operands = tuple(found[1] for part in _split(rest[start + 1 : stop]) if (found := _NAME.search(part)))
  arrays = tuple(_array(found) for found in _ARRAY.finditer(rest[:end]))
  return Instruction(name, opcode, arrays, operands, rest[stop + 1 :], is_root)


def _elements(instruction: Instruction, lines: dict[str, Instruction]) -> Iterator[tuple[str, Instruction]]:
  """The elements of tuples that newer versions of XLA write in short, `%tuple#1`, as instructions of their own."""
  for name in instruction.operands:
    whole, _, index = name.partition("#")
    if index and name not in lines:
      arrays = lines[whole].arrays[int(index) : int(index) + 1]
      yield name, Instruction(name, "get-tuple-element", arrays, (whole,), f"index={index}", False)


def _array(found: re.Match) -> Array:
  dims = tuple(int(size) for size in found["dims"].split(",") if size)
  return Array(found["dtype"], dims, bool(_ON_CHIP.search(found["layout"] or "")))


def _closing(text: str, start: int) -> int:
  """Where the bracket that opens at `start` closes."""
  depth = 0
  for found in re.compile(r"[()]").finditer(text, start):
    depth += 1 if found[0] == "(" else -1
    if depth == 0:
      return found.start()
  return len(text)


def _split(text: str) -> list[str]:
  """Splits operands at the commas that no bracket holds."""
  if not re.search(r"[({\[]", text):
    return text.split(",") if text else []
  parts, depth, last = [], 0, 0
  for i, char in enumerate(text):
    depth += (char in "({[") - (char in ")}]")
    if char == "," and depth == 0:
      parts.append(text[last:i])
      last = i + 1
  return [*parts, text[last:]]
