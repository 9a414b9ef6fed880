"""Reads a compiled program (HLO as text): its loops, and what runs in them how often.

The compiler's own totals count the body of a loop once; here it counts as often as it runs.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

_HEADER = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_ARRAY = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<dims>[\d,]*)\](?P<layout>\{[^}]*\})?")
# `%name`, or `%name#1`, which is that element of a tuple.
_NAME = re.compile(r"%?([\w.\-]+)(?:#(\d+))?\s*$")
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
    elements: of each operand, which element of its results is taken, where the line says so by itself.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  attributes: str
  is_root: bool
  elements: tuple[int | None, ...] = ()

  @property
  def bytes(self) -> int:
    """Bytes of all its results."""
    return sum(array.bytes for array in self.arrays)

  @property
  def in_memory(self) -> int:
    """Bytes of those results that lie in the main memory."""
    return sum(array.bytes for array in self.arrays if not array.on_chip)

  @property
  def op_name(self) -> str:
    """Where in the traced program it comes from."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
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
          if instruction.opcode in ("while", "call", "conditional"):
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
    """The loops of which the program does not tell how often they run; they are taken to run once."""
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
    """How often a loop's body runs: as the compiler says, or by its counter's bound and step; None: not known."""
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
      current[instruction.name] = instruction
  return Module(computations, entry)


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  opcode, _, _ = rest[end + 1 :].partition("(")
  start = end + 1 + len(opcode)
  stop = _closing(rest, start)
  names = [found for part in _split(rest[start + 1 : stop]) if (found := _NAME.search(part))]
  operands = tuple(found[1] for found in names)
  elements = tuple(int(found[2]) if found[2] else None for found in names)
  arrays = tuple(_array(found) for found in _ARRAY.finditer(rest[:end]))
  return Instruction(name, opcode, arrays, operands, rest[stop + 1 :], is_root, elements)


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


# --- Collectives --------------------------------------------------------------------------------------------

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
  """An exchange between devices.

  Attributes:
    kind: all-gather, all-reduce, reduce-scatter, all-to-all or collective-permute.
    dtype: of what is sent.
    bytes: of the whole array on a device, before it is scattered or after it is gathered.
    groups: the devices that exchange with each other, by their place in the mesh.
    runs: how often it runs in a step.
    op_name: where in the traced program it comes from.
  """

  kind: str
  dtype: str
  bytes: int
  groups: tuple[tuple[int, ...], ...]
  runs: int
  op_name: str

  def axes(self, mesh: dict[str, int]) -> tuple[str, ...]:
    """The axes of a mesh (their sizes by name, outermost first) along which the devices differ."""
    places = np.array(np.unravel_index(np.array(self.groups[0]), tuple(mesh.values())))
    return tuple(axis for axis, row in zip(mesh, places, strict=True) if len(set(row.tolist())) > 1)


def collectives(module: Module, devices: int) -> list[Collective]:
  """The exchanges of a program for so many devices, apart from those of a device with itself."""
  found = []
  for name, lines in module.computations.items():
    for instruction in lines.values():
      opcode = instruction.opcode.removesuffix("-start")
      if opcode in _KINDS and module.runs[name]:
        # XLA for TPUs writes a reduce-scatter as a fusion of an all-reduce and the slice that is kept.
        kind = "reduce-scatter" if "all-reduce-scatter" in name else opcode
        found.append(_collective(kind, instruction, lines, module.runs[name], devices))
  return [collective for collective in found if len(collective.groups[0]) > 1]


def _collective(kind, instruction, lines, runs, devices) -> Collective:
  groups = _groups(instruction.attributes, devices)
  operands = [lines[name] for name in instruction.operands if name in lines]
  size = sum(operand.bytes for operand in operands)
  size *= len(groups[0]) if kind == "all-gather" else 1
  dtype = next((array.dtype for operand in operands for array in operand.arrays), "")
  return Collective(kind, dtype, size, groups, runs, instruction.op_name)


_GROUPS = re.compile(
  r"(?P<pairs>source_target_pairs)=\{(?P<list_of_pairs>[\d,{} ]*)\}\}"
  r"|replica_groups=(?:\{(?P<list>[\d,{} ]*)\}(?=,|$)"
  r"|\[(?P<shape>[\d,]+)\]<=\[(?P<iota>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?"
  r"|mesh\[(?P<mesh>[^\]]*)\](?:, device_ids=\(\[(?P<ids>[\d,]+)\](?:T\((?P<ids_order>[\d,]+)\))?\))?"
  r"\s*\{(?P<axes>[^}]*)\})"
)


def _groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
  """The groups of devices, from any of the forms in which they are printed."""
  found = _GROUPS.search(attributes)
  assert found, f"no groups of devices in {attributes[:200]}"
  if found["shape"]:
    return _tuples(_iota(found["iota"], found["order"]).reshape(_ints(found["shape"])))
  if found["mesh"] is not None:
    ids = _iota(found["ids"] or str(devices), found["ids_order"])
    return _tuples(_mesh_groups(found["mesh"], found["axes"], ids))
  if found["pairs"]:
    return _connected([_ints(pair) for pair in re.findall(r"\d+,\d+", found["list_of_pairs"])])
  groups = tuple(_ints(group) for group in re.findall(r"\{([\d, ]+)", found["list"]))
  return groups or (tuple(range(devices)),)


def _connected(pairs: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
  """The groups within which devices send to each other, directly or by way of others."""
  group_of: dict[int, set[int]] = {}
  for pair in pairs:
    joined = set(pair).union(*(group_of.get(device, set()) for device in pair))
    group_of.update(dict.fromkeys(joined, joined))
  return tuple({id(group): tuple(sorted(group)) for group in group_of.values()}.values())


def _iota(shape: str, order: str | None) -> np.ndarray:
  """The numbers from 0 in an array of that shape, its axes in another order."""
  sizes = _ints(shape)
  ids = np.arange(math.prod(sizes)).reshape(sizes)
  return ids.transpose(_ints(order)) if order else ids


def _mesh_groups(mesh: str, axes: str, ids: np.ndarray) -> np.ndarray:
  """Groups along axes of the compiler's own mesh; an axis may be cut: 'a':(2)4 is its part of size 4 after 2."""
  sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
  chosen = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
  shape, keep = [], []
  for name, size in sizes.items():
    cuts = sorted(
      {1, size} | {int(c) for axis, pre, n in chosen if axis == name and n for c in (pre, int(pre) * int(n))}
    )
    for low, high in itertools.pairwise(cuts):
      whole = (name, "", "") in chosen
      inside = any(axis == name and n and int(pre) <= low < int(pre) * int(n) for axis, pre, n in chosen)
      shape.append(high // low)
      keep.append(whole or inside)
  ids = ids.reshape(shape or [ids.size])
  order = [i for i, kept in enumerate(keep) if not kept] + [i for i, kept in enumerate(keep) if kept]
  group = math.prod(size for size, kept in zip(shape, keep, strict=True) if kept)
  return ids.transpose(order).reshape(-1, group)


def _ints(text: str) -> tuple[int, ...]:
  return tuple(int(part) for part in text.split(","))


def _tuples(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
  return tuple(tuple(group) for group in groups.tolist())


# --- Operations ---------------------------------------------------------------------------------------------


def flops(module: Module) -> int:
  """Operations of the program's matrix products on a device; kernels written by hand are not looked into."""
  total = 0
  for name, lines in module.computations.items():
    if module.runs[name]:
      total += module.runs[name] * sum(_product_flops(line, lines) for line in lines.values())
  return total


def _product_flops(instruction: Instruction, lines: dict[str, Instruction]) -> int:
  if instruction.opcode == "dot":
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    lhs = lines[instruction.operands[0]].arrays[0].dims
    sizes = [lhs[i] for i in _ints(contracted[1])] if contracted and contracted[1] else []
    return 2 * math.prod(instruction.arrays[0].dims) * math.prod(sizes)
  if instruction.opcode == "convolution":  # What XLA for TPUs makes of a matrix product.
    return _convolution_flops(instruction, lines)
  return 0


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

  So that a batch dimension, which XLA writes as a window over an input spread out by zeros, counts once.
  """
  places = np.arange(out)[:, None] * stride + np.arange(taps) * rhs_dilate - before
  return int(np.sum((places >= 0) & (places % lhs_dilate == 0) & (places // lhs_dilate < size)))


_KERNEL_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}
"""Products of queries by keys that the splash kernels compute, those computed again included."""


def kernel_flops(module: Module, expert_parts: int = 1) -> int:
  """Operations of kernels written by hand, by the shapes they are called with.

  Of attention, those of the slowest device: of a causal mask's square, the blocks that it leaves count; what segments
  hide within them is not known. Of experts, those of an even load: where a device has one of so many parts of them,
  as many of the rows that it is given are for its own.
  """
  total = 0.0
  for name, lines in module.computations.items():
    for line in lines.values() if module.runs[name] else ():
      found = re.match(r"splash_mha_(fwd|dkv|dq)", line.name)
      if found and line.opcode == "custom-call":
        total += module.runs[name] * _KERNEL_PRODUCTS[found[1]] * _square_flops(line, lines)
      if re.match(r"t?gmm", line.name) and line.opcode == "custom-call":
        total += module.runs[name] * _grouped_flops(line, lines) / expert_parts
  return round(total)


def _grouped_flops(line: Instruction, lines: dict[str, Instruction]) -> float:
  """Operations of a product of all rows with the matrix of their group, or of its gradient."""
  arrays = [lines[name].arrays[0] for name in line.operands if name in lines]
  rows = next(array.dims for array in arrays if array.dtype in ("bf16", "f32"))
  return 2 * math.prod(rows) * line.arrays[0].dims[-1]


def _square_flops(line: Instruction, lines: dict[str, Instruction]) -> float:
  """Operations of one product of queries by keys in a kernel."""
  arrays = [lines[name].arrays[0] for name in line.operands if name in lines]
  q, k = [array.dims for array in arrays if array.dtype in ("bf16", "f32")][:2]
  square = 2 * math.prod(q) * k[-2]
  # Segments are two lists of integers; a mask computed in the kernel brings a third, of the queries' places.
  if sum(array.dtype == "s32" for array in arrays) % 2 == 0:
    return square
  blocks, width = arrays[0].dims[-2:]
  across = k[-2] * blocks // q[-2]
  return square * min((2 * across - blocks + 1) / (2 * across), width / across)


# --- Memory traffic -----------------------------------------------------------------------------------------

_FREE = frozenset(
  {"parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional"}
  | {"after-all", "partition-id", "replica-id", "async-update"}
)


def traffic(module: Module) -> int:
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
