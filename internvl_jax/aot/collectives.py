"""Exchanges between devices in a compiled program: what is sent, within which groups, and how often."""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

import numpy as np

from internvl_jax.aot.hlo import Module

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


def find(module: Module, devices: int) -> list[Collective]:
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
