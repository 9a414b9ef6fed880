"""The least time that exchanges take, by the links and networks between devices.

TPUs of a slice are a torus of links between neighbors. Cards of a host all reach each other at one speed (NVLink by way of
a switch, or PCIe), and other hosts at another, each over a network port of its own.
"""

import collections
import math
from collections.abc import Sequence

import numpy as np

from internvl_jax.aot.collectives import Collective
from internvl_jax.aot.target import Target
from internvl_jax.chips import Card, Chip


def total_seconds(found: Sequence[Collective], target: Target) -> float | None:
  """The least time of all exchanges, one after the other; None where links are not known."""
  seconds = [exchange_seconds(collective, target) for collective in found]
  known = [
    value * collective.runs for value, collective in zip(seconds, found, strict=True) if value is not None
  ]
  return math.fsum(known) if len(known) == len(found) and target.chip else None


def exchange_seconds(collective: Collective, target: Target) -> float | None:
  """The least time of one run of an exchange: no device can take in or give out more than its links carry.

  None where links are not known.
  """
  if not target.shape:
    return None
  if isinstance(target.chip, Card):
    return _between_cards(collective, target, target.chip)
  return _on_torus(collective, target, target.chip) if isinstance(target.chip, Chip) else None


def _taken_in(kind: str, devices: int) -> float:
  """What a device takes in of an array that all have in the end, twice for a sum; a permutation moves all of it."""
  return {"all-reduce": 2 * (devices - 1) / devices, "collective-permute": 1.0}.get(
    kind, (devices - 1) / devices
  )


# --- Cards --------------------------------------------------------------------------------------------------


def _between_cards(collective: Collective, target: Target, card: Card) -> float:
  """The longer of two times, which overlap: that of the host's links, and that of the network between hosts.

  What comes from other hosts comes once to each host, a part of it by each card's port, and is passed on within.
  """
  hosts = collections.Counter(target.devices[i].process_index for i in collective.groups[0])
  together, size = min(hosts.values()), collective.bytes
  if collective.kind == "collective-permute":
    return size / (card.network_bandwidth if len(hosts) > 1 else card.link_bandwidth)
  if collective.kind == "all-to-all":
    devices = hosts.total()
    inside, outside = size * (together - 1) / devices, size * (devices - together) / devices
  else:
    inside = size * _taken_in(collective.kind, together)
    outside = size * _taken_in(collective.kind, len(hosts)) / together
  return max(inside / card.link_bandwidth, outside / card.network_bandwidth)


# --- Slices of TPUs -----------------------------------------------------------------------------------------


def _on_torus(collective: Collective, target: Target, chip: Chip) -> float:
  """All-to-alls are bounded by what the links across the middle of a group carry, the rest by a chip's links."""
  group = collective.groups[0]
  places = np.array([target.devices[i].coords[: len(target.shape)] for i in group])
  if len(np.unique(places, axis=0)) == 1:
    return _taken_in(collective.kind, len(group)) * collective.bytes / chip.inner_bandwidth
  rings = [_is_ring(column, length, chip) for column, length in zip(places.T, target.shape, strict=True)]
  if collective.kind == "all-to-all":
    crossing = len(group) * collective.bytes / 4
    return max(crossing / (chip.link_bandwidth * links) for links in _links_across(places, rings))
  size = _taken_in(collective.kind, len(group)) * collective.bytes
  return size / (chip.link_bandwidth * _links_of_a_chip(places, rings))


def _links_of_a_chip(places: np.ndarray, rings: Sequence[bool]) -> int:
  """Links to other chips of the group, of the chip that has fewest."""
  links = np.zeros(len(places), int)
  for column, ring in zip(places.T, rings, strict=True):
    links += 2 if ring else (column > column.min()).astype(int) + (column < column.max())
  return max(1, int(links.min()))


def _links_across(places: np.ndarray, rings: Sequence[bool]) -> Sequence[int]:
  """Links across the middle of a group, cut along each axis that it extends over."""
  found = []
  for column, ring in zip(places.T, rings, strict=True):
    length = len(set(column.tolist()))
    if length > 1:
      found.append(max(1, len(places) // length * (2 if ring else 1)))
  return found


def _is_ring(column: np.ndarray, length: int, chip: Chip) -> bool:
  """Whether a group takes all of an axis of the slice, and that closes to a ring."""
  return length % chip.ring == 0 and len(set(column.tolist())) == length > 2
