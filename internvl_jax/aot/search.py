"""Looks for the smallest slice of a kind of TPU that a run fits on, and how to arrange it there.

What certainly lies in a chip's memory is known by arithmetic: parameters, optimizer state and gradients by their
shardings, and what every layer saves for the way back. Only where that leaves room is the step compiled.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from internvl_jax.aot.chips import TPUS
from internvl_jax.aot.program import BatchShape, StepPlan, compile_step, plan_step
from internvl_jax.aot.report import GIB, Report, arguments, make_report
from internvl_jax.aot.target import Target, open_target
from internvl_jax.arguments import MeshConfig
from internvl_jax.assembly import describe_model
from internvl_jax.config import TrainConfig
from internvl_jax.errors import UserError
from internvl_jax.objectives import ForwardPass
from internvl_jax.parallel.mesh import DATA_AXES
from internvl_jax.trees import part_of

# The slices that can be had: https://cloud.google.com/tpu/docs/v5e, v6e, v5p and v4; of the large tori, the cubes
# and their doubles.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")

_SHARES = (1, 2, 4, 8)
"""Chips that may share rows; beyond a host's worth of them, exchanges take over."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
  """One way to arrange a slice, and what came of it.

  Attributes:
    topology, mesh, remat: the arrangement.
    bytes: of a chip: at least, if it was not compiled.
    compiled: whether it was.
    outcome: in words.
    report: of what was compiled.
  """

  topology: str
  mesh: dict[str, int]
  remat: str
  bytes: int
  compiled: bool
  outcome: str
  report: Report | None = None

  @property
  def fits(self) -> bool:
    """Whether it was compiled and fits."""
    return self.report is not None and bool(self.report.fits)

  def __str__(self) -> str:
    mesh = " ".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1) or "one chip"
    used = f"{'' if self.compiled else 'at least '}{self.bytes / GIB:.2f} GiB"
    return f"{self.topology:<12}{mesh:<28}remat {self.remat:<6}{used:<20}{self.outcome}"


def slices(name: str) -> list[str]:
  """The slices of a kind ("v5e"), or those up to one of them ("v5e:8x8"), smallest first.

  Raises:
    UserError: no such kind or slice.
  """
  kind, _, largest = name.partition(":")
  if kind not in TPUS:
    raise UserError(
      f"--topology={name}: --search looks through the slices of {', '.join(TPUS)}; name one of them"
    )
  shapes = _FLAT if TPUS[kind].dimensions == 2 else _CUBIC
  if largest and largest not in shapes:
    raise UserError(f"--topology={name}: the slices of {kind} are {', '.join(shapes)}")
  return [f"{kind}:{shape}" for shape in (shapes[: shapes.index(largest) + 1] if largest else shapes)]


def search(
  config: TrainConfig,
  name: str,
  shape: BatchShape,
  *,
  limit: int | None = None,
  optimization_level: str = "O1",
  tell: Callable[[Attempt], Any] = lambda attempt: None,
) -> list[Attempt]:
  """Tries arrangements until one fits, and on that slice and mesh the one that recomputes less.

  Args:
    config: the run; axes of its mesh other than data and fsdp that are set stay as they are.
    name: see `slices`.
    shape: the batch.
    limit: bytes that a program may use of a chip, in place of the chip's.
    optimization_level: see `compile_step`.
    tell: called with each attempt.

  Returns:
    All attempts; the last that fits is the answer. None fits if there is no such.
  """
  source = describe_model(config)
  attempts: list[Attempt] = []
  for topology in slices(name):
    target = open_target(topology)
    memory = target.memory if limit is None else limit
    assert memory is not None
    for mesh in meshes(config, len(target.devices)):
      for remat in ("full", "dots"):
        changed = _changed(config, mesh, remat)
        attempt = _attempt(changed, target, shape, source, memory, optimization_level)
        if attempt is None:
          break
        attempts.append(attempt)
        tell(attempt)
        if not attempt.fits:
          break
      if attempts and any(attempt.fits for attempt in attempts):
        return attempts
  return attempts


def meshes(config: TrainConfig, chips: int) -> Iterator[MeshConfig]:
  """Arrangements of so many chips to try, those that share no rows first."""
  asked = config.mesh
  if any(getattr(asked, axis) != 1 for axis in ("expert", "sequence", "tensor")):
    yield dataclasses.replace(asked, data=1, fsdp=-1)
    return
  axis = "expert" if _has_experts(config) else "tensor"
  for share in _SHARES:
    if chips % share == 0:
      yield dataclasses.replace(asked, data=1, fsdp=chips // share, **{axis: share})


def _has_experts(config: TrainConfig) -> bool:
  return describe_model(config).config.text.experts is not None


def _changed(config: TrainConfig, mesh: MeshConfig, remat: str) -> TrainConfig:
  model = dataclasses.replace(config.model, grad_checkpoint=True)
  return dataclasses.replace(
    config, mesh=mesh, model=model, runtime=dataclasses.replace(config.runtime, remat_policy=remat)
  )


def _attempt(config, target: Target, shape: BatchShape, source, memory: int, level: str) -> Attempt | None:
  """What comes of one arrangement; None where the model cannot be arranged so."""
  try:
    plan = plan_step(config, target, shape, source)
  except UserError:
    return None
  least = lower_bound(plan)
  known = {"topology": target.name, "mesh": dict(plan.mesh.shape), "remat": config.runtime.remat_policy}
  if least > memory:
    return Attempt(**known, bytes=least, compiled=False, outcome="cannot fit")
  compiled = compile_step(plan, target, optimization_level=level)
  jax.clear_caches()
  report = make_report(plan, compiled, target, limit=memory)
  outcome = "fits" if report.fits else "does not fit"
  if report.fits and report.roofline:
    outcome += f", at least {report.roofline.step:.2f} s a step"
  return Attempt(**known, bytes=report.total, compiled=True, outcome=outcome, report=report)


def lower_bound(plan: StepPlan) -> int:
  """Bytes that a chip certainly needs: the arguments, the gradients, and what layers save for the way back."""
  held = arguments(plan)
  return sum(held.values()) + held["parameters that train"] + _saved(plan)


def _saved(plan: StepPlan) -> int:
  """Bytes of what the layers of both stacks save: their inputs, and under "dots" the results of their products."""
  objective = plan.step.objective
  assert isinstance(objective, ForwardPass)
  how, vision, text = objective.how, plan.source.config.vision, plan.source.config.text
  sharing = math.prod(size for axis, size in plan.mesh.shape.items() if axis not in DATA_AXES)
  tokens = plan.shape.rows * plan.shape.tokens // sharing
  patches = math.ceil(plan.shape.rows * plan.shape.tiles / sharing) * (1 + vision.num_patches)
  text_width, vision_width = text.hidden_size, vision.hidden_size
  if how.remat == "dots":
    text_width += (text.num_heads + 2 * text.num_kv_heads) * text.head_dim + 2 * text.hidden_size
    text_width += 0 if text.experts else 2 * text.intermediate_size
    vision_width += 5 * vision.hidden_size + vision.intermediate_size
  total = 0
  if any(not path.startswith("language_model.lm_head") for path in plan.state.params):
    total += text.num_layers * tokens * text_width
  if any(part_of(path) == "vision_model" for path in plan.state.params):
    total += (vision.num_layers - (vision.split or 0)) * patches * vision_width
  return total * jax.numpy.dtype(how.dtype).itemsize


def summary(attempts: list[Attempt]) -> str:
  """What was found, in a line."""
  found = [attempt for attempt in attempts if attempt.fits]
  if not found:
    return "nothing fits; allow a larger slice, shorter rows (--tokens), or train less (LoRA, a frozen ViT)"
  best = found[-1]
  mesh = " ".join(
    f"--config.mesh.{axis}={size}" for axis, size in best.mesh.items() if size > 1 or axis == "data"
  )
  return f"the smallest that fits is {best.topology}: {mesh} --config.runtime.remat_policy={best.remat}"


def as_json(attempts: list[Attempt]) -> list[dict[str, Any]]:
  """The attempts as plain values."""
  return [
    {
      **dataclasses.asdict(dataclasses.replace(attempt, report=None)),
      "report": attempt.report and attempt.report.as_json(),
    }
    for attempt in attempts
  ]
