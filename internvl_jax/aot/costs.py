"""What a step costs: the model's operations by part and phase."""

import dataclasses
from collections.abc import Mapping

import jax

from internvl_jax.aot.program import StepPlan
from internvl_jax.metrics.flops import Products, list_products
from internvl_jax.models.internvl import SCOPES
from internvl_jax.step import OPTIMIZER_SCOPE

OTHER = "optimizer and other"
PARTS: Mapping[str, str] = {
  "vision_model": "ViT",
  "mlp1": "projector",
  "mlp2": "projector",
  "tile_router": "router",
  "language_model": "LLM",
  "lm_head": "head",
  "embed": "embeddings",
}
"""What the parts are called, by their scopes."""

assert set(PARTS) == set(SCOPES)


def part_of_scope(scope: str) -> str:
  """The part of the model that a scope of the traced program belongs to."""
  return next((name for key, name in PARTS.items() if key in scope), OTHER)


def phase_of(scope: str) -> str:
  """Whether something is computed forward, backward, or a second time on the way back."""
  if "rematted_computation" in scope:
    return "recomputed"
  return "backward" if "transpose(" in scope else "forward"


def model_flops(plan: StepPlan) -> dict[str, dict[str, int]]:
  """Operations of one data shard's rows in a step, {part: {"forward", "backward"}}, however they are computed.

  Nothing is counted twice for being recomputed, and nothing that the optimizer computes: Muon's products are no part of the model. Attention of the language model counts the half of its square
  that a causal mask leaves; segments and windows, which leave less, are not considered.
  """
  found: dict[str, dict[str, float]] = {}
  tokens = plan.shape.tokens
  for product in _plain_products(plan):
    phase, part = phase_of(product.scope), part_of_scope(product.scope)
    if phase == "recomputed" or OPTIMIZER_SCOPE in product.scope:
      continue
    share = (tokens + 1) / (2 * tokens) if product.batched and part == "LLM" else 1.0
    entry = found.setdefault(part, {"forward": 0.0, "backward": 0.0})
    entry[phase] += share * product.flops * plan.shape.accumulation
  return {part: {phase: round(value) for phase, value in entry.items()} for part, entry in found.items()}


def _plain_products(plan: StepPlan) -> list[Products]:
  """The products of the step on one shard's micro-batch, by the plainest code."""
  step = dataclasses.replace(plan.step, objective=plan.step.objective.plain(), places=None)
  batch = dataclasses.replace(plan.shape, accumulation=1).batch(1, plan.task)
  state, frozen, _, rate = plan.inputs
  return list_products(step.__call__, _whole(state), _whole(frozen), batch, rate)


def _whole(tree):
  """The same shapes on no device in particular."""
  return jax.tree.map(lambda leaf: leaf.update(sharding=None), tree)
