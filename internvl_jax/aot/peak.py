"""Peak memory: the values in a chip's memory when most of it is in use, from the compiler's own files.

XLA writes the place of every value (buffer assignment) and from which instruction to which it lives (live ranges,
in the order in which instructions run, bodies of loops included). A value that a loop carries is listed under its
first name alone: the others are followed back to it.
"""

import re

from internvl_jax.aot.hlo import Instruction, Module, element

_VALUE = re.compile(r"^ value: <\d+ (\S+) @\d+> \(size=(\d+),offset=(\d+)\)", re.MULTILINE)
_RANGE = re.compile(r"^\s+([^\s{]+)\{([\d,]*)\}:(\d+)-(\d+)$", re.MULTILINE)

Place = tuple[str, tuple[int, ...]]
"""An instruction, and which part of its result."""


def peak(module: Module, assignment: str, ranges: str) -> list[tuple[Place, int]]:
  """The temporaries that live at the peak, with their bytes, padding included; empty without the files."""
  lies = _assigned(assignment)
  if not lies:
    return []
  lives = _lifetimes(_Origins(module), lies, ranges)
  moments = sorted({first for first, _, _ in lives})
  best: list[tuple[int, Place]] = []
  most = 0
  for moment in moments:
    # Values of one place in memory follow each other; the larger one counts.
    there: dict[int, Place] = {}
    for first, last, place in lives:
      if first <= moment <= last:
        offset, size = lies[place]
        if offset not in there or size > lies[there[offset]][1]:
          there[offset] = place
    total = sum(lies[place][1] for place in there.values())
    if total > most:
      most, best = total, list(there.items())
  return sorted(((place, lies[place][1]) for _, place in best), key=lambda item: -item[1])


def _assigned(assignment: str) -> dict[Place, tuple[int, int]]:
  """Offset and size of every temporary in the main memory."""
  found = {}
  for allocation in re.split(r"^allocation ", assignment, flags=re.MULTILINE)[1:]:
    head = allocation.partition("\n")[0]
    if "preallocated-temp" in head and "color" not in head:
      for name, size, offset in _VALUE.findall(allocation):
        found[_place(name)] = (int(offset), int(size))
  return found


def _place(name: str) -> Place:
  name, _, index = name.partition("{")
  return name, _index(index.rstrip("}"))


def _index(text: str) -> tuple[int, ...]:
  return tuple(int(part) for part in text.split(",") if part)


def _lifetimes(origins: "_Origins", lies: dict[Place, tuple[int, int]], ranges: str):
  """(first instruction, last instruction, place) of what is known of every value's life."""
  found = []
  for name, index, first, last in _RANGE.findall(ranges):
    place = origins.find((name, _index(index)), lies)
    if place is not None:
      found.append((int(first), int(last), place))
  return found


class _Origins:
  """Follows values back to where they were made."""

  def __init__(self, module: Module):
    self._lines = {name: line for found in module.computations.values() for name, line in found.items()}
    self._loops: dict[str, Instruction] = {}
    for lines in module.computations.values():
      for line in lines.values():
        if line.opcode == "while":
          for computation in (line.called("body"), line.called("condition")):
            for inner in module.computations.get(computation or "", {}).values():
              if inner.opcode == "parameter":
                self._loops[inner.name] = line

  def find(self, place: Place, known: dict[Place, tuple[int, int]]) -> Place | None:
    """The first of the places before this one that has an address."""
    for _ in range(64):
      if place in known:
        return place
      before = self._before(*place)
      if before is None:
        return None
      place = before
    return None

  def _before(self, name: str, index: tuple[int, ...]) -> Place | None:
    line = self._loops.get(name) or self._lines.get(name)
    if line is None or not line.operands:
      return None
    if line.opcode == "tuple":
      return (line.operands[index[0]], index[1:]) if index else None
    if line.opcode == "get-tuple-element":
      return line.operands[0], (element(line), *index)
    if line.opcode in ("while", "bitcast", "optimization-barrier", "opt-barrier", "copy-done", "async-done"):
      return line.operands[0], index
    return None
