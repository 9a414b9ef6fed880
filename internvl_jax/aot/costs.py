"""What a step costs: the model's operations by part, and the least time that exchanges between chips take."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from internvl_jax.aot.hlo import Collective
from internvl_jax.aot.program import StepPlan
from internvl_jax.aot.target import Target
from internvl_jax.batch import PreferenceBatch
from internvl_jax.flops import Products, list_products
from internvl_jax.models.internvl import SCOPES
from internvl_jax.models.kernels import Kernels
from internvl_jax.objectives import ForwardPass

OTHER = "optimizer and other"
PARTS: Mapping[str, str] = {
  "vision_model": "ViT",
  "mlp1": "projector",
  "language_model": "LLM",
  "lm_head": "head",
  "embed": "embeddings",
}
"""What the parts are called, by their scopes."""

assert set(PARTS) == set(SCOPES)


def part_of(scope: str) -> str:
  """The part of the model that a scope of the traced program belongs to."""
  return next((name for key, name in PARTS.items() if key in scope), OTHER)


def phase_of(scope: str) -> str:
  """Whether something is computed forward, backward, or a second time on the way back."""
  if "rematted_computation" in scope:
    return "recomputed"
  return "backward" if "transpose(" in scope else "forward"


def model_flops(plan: StepPlan) -> dict[str, dict[str, int]]:
  """Operations of one data shard's rows in a step, {part: {"forward", "backward"}}, however they are computed.

  Nothing is counted twice for being recomputed. Attention of the language model counts the half of its square
  that a causal mask leaves; segments and windows, which leave less, are not looked at.
  """
  found: dict[str, dict[str, float]] = {}
  tokens = plan.shape.tokens
  for product in _plain_products(plan):
    phase, part = phase_of(product.scope), part_of(product.scope)
    if phase == "recomputed":
      continue
    share = (tokens + 1) / (2 * tokens) if product.batched and part == "LLM" else 1.0
    entry = found.setdefault(part, {"forward": 0.0, "backward": 0.0})
    entry[phase] += share * product.flops * plan.shape.accumulation
  return {part: {phase: round(value) for phase, value in entry.items()} for part, entry in found.items()}


def _plain_products(plan: StepPlan) -> list[Products]:
  """The products of the step on one shard's micro-batch, by the plainest code."""
  objective = plan.step.objective
  assert isinstance(objective, ForwardPass)
  how = dataclasses.replace(objective.how, kernels=Kernels(attention="plain"), remat=None)
  plain = dataclasses.replace(objective, how=how, fused_loss=False, shards=1)
  step = dataclasses.replace(plan.step, objective=plain, places=None)
  preference = isinstance(plan.batch, PreferenceBatch)
  batch = dataclasses.replace(plan.shape, accumulation=1).batch(shards=1, preference=preference)
  state, frozen, _, rate = plan.inputs
  return list_products(step.__call__, _whole(state), _whole(frozen), batch, rate)


def _whole(tree):
  """The same shapes on no device in particular."""
  return jax.tree.map(lambda leaf: leaf.update(sharding=None), tree)


# --- Exchanges ----------------------------------------------------------------------------------------------


def exchange_seconds(collective: Collective, target: Target) -> float | None:
  """The least time of one run of an exchange: no chip can take in or give out more than its links carry.

  All-to-alls are bounded by what the links across the middle of a group carry. None where links are not known.
  """
  if target.chip is None or not target.shape:
    return None
  speed = target.chip.link_bandwidth
  n = len(collective.groups[0])
  places = np.array([target.devices[i].coords[: len(target.shape)] for i in collective.groups[0]])
  if collective.kind == "all-to-all":
    crossing = n * collective.bytes / 4
    return max(crossing / (speed * links) for links in _links_across(places, target))
  # What a chip takes in of an array that all have in the end, twice for a sum; a permutation moves all of it.
  share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(collective.kind, (n - 1) / n)
  return share * collective.bytes / (speed * _links_of_a_chip(places, target))


def _links_of_a_chip(places: np.ndarray, target: Target) -> int:
  """Links to other chips of the group, of the chip that has fewest."""
  links = np.zeros(len(places), int)
  for axis, column in enumerate(places.T):
    if _is_ring(column, axis, target):
      links += 2
    else:
      links += (column > column.min()).astype(int) + (column < column.max())
  return max(1, int(links.min()))


def _links_across(places: np.ndarray, target: Target) -> Sequence[int]:
  """Links across the middle of a group, cut along each axis that it extends over."""
  found = []
  for axis, column in enumerate(places.T):
    length = len(set(column.tolist()))
    if length > 1:
      found.append(max(1, len(places) // length * (2 if _is_ring(column, axis, target) else 1)))
  return found or [1]


def _is_ring(column: np.ndarray, axis: int, target: Target) -> bool:
  """Whether a group takes all of an axis of the slice, and that closes to a ring."""
  assert target.chip
  length = target.shape[axis]
  return length % target.chip.ring == 0 and len(set(column.tolist())) == length > 2


def total_seconds(found: Sequence[Collective], target: Target) -> float | None:
  """The least time of all exchanges, one after the other."""
  seconds = [exchange_seconds(collective, target) for collective in found]
  known = [
    value * collective.runs for value, collective in zip(seconds, found, strict=True) if value is not None
  ]
  return math.fsum(known) if len(known) == len(found) and target.chip else None
