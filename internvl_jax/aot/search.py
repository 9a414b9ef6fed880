"""Looks for the smallest slice of TPUs, or the fewest cards, that a run fits on, and how to arrange it there.

A lower bound of a chip's memory is known by arithmetic: parameters, optimizer state and gradients by their
shardings, and what every layer saves for the way back. Only where that fits is the step compiled. What a
compiled step took beyond the arithmetic hardly depends on the slice, so that one compilation tells which others are
not worth theirs. What is said to fit was compiled.

The smallest slices come first: a compiler that runs out of memory reports it before it generates code, which takes it most
of its time.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from internvl_jax.aot.program import BatchShape, StepPlan, compile_step, plan_step
from internvl_jax.aot.report import GIB, Report, arguments, make_report
from internvl_jax.aot.target import Target, open_target, suggest
from internvl_jax.arguments import MeshConfig
from internvl_jax.chips import GPUS, TPUS
from internvl_jax.config import TrainConfig
from internvl_jax.errors import UserError
from internvl_jax.hf.model import Source
from internvl_jax.open_model import open_shapes
from internvl_jax.trees import submodule_of

_SHARES = (1, 2, 4, 8)
"""Chips that may share rows; beyond a host's worth of them, exchanges take over."""

_ROOM = 0.85
"""To recompute less is tried where it is certain to fill no more than this."""

_NARROW = 0.96
"""What fills more than this is compiled once more, as a run will be: memory differs so much between the compiler's levels."""

_AS_IN_A_RUN = "default"

_CARRIES_OVER = 0.85
"""How much of what one arrangement took beyond the arithmetic another is certain to take, too."""


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
    mesh = " ".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1) or "one device"
    used = f"{'' if self.compiled else 'at least '}{self.bytes / GIB:.2f} GiB"
    return f"{self.topology:<12}{mesh:<28}remat {self.remat:<6}{used:<20}{self.outcome}"


def slices(name: str) -> list[str]:
  """The slices of a kind of TPU ("v5e") or the hosts of a kind of card ("h100"), smallest first.

  Those up to one of them, if one is named ("v5e:8x8", "h100:8").

  Raises:
    UserError: no such kind or slice.
  """
  kind, _, largest = name.partition(":")
  chip = TPUS.get(kind) or GPUS.get(kind)
  if chip is None:
    raise UserError(
      f"--topology={name}: --search looks through the slices of {', '.join(TPUS)} and the cards {', '.join(GPUS)}; "
      f"{suggest(kind) or 'name one of them'}"
    )
  if largest and largest not in chip.slices:
    shapes = "slices" if kind in TPUS else "hosts and cards"
    raise UserError(f"--topology={name}: the {shapes} of {kind} are {', '.join(chip.slices)}")
  shapes = chip.slices[: chip.slices.index(largest) + 1] if largest else chip.slices
  return [f"{kind}:{shape}" for shape in shapes]


def search(
  config: TrainConfig,
  name: str,
  shape: BatchShape,
  *,
  limit: int | None = None,
  optimization_level: str = "O0",
  tell: Callable[[Attempt], Any] = lambda attempt: None,
) -> list[Attempt]:
  """Tries arrangements until one fits; of those of one slice and mesh, the one that recomputes less goes first.

  Args:
    config: the run; axes of its mesh other than data and fsdp that are set stay as they are.
    name: see `slices`.
    shape: the batch.
    limit: bytes that a program may use of a chip, in place of the chip's.
    optimization_level: see `compile_step`.
    tell: called with each attempt.

  Returns:
    All attempts; the last is the answer if it fits, and otherwise nothing does.
  """
  state = _Search(
    config=config,
    shape=shape,
    source=open_shapes(config),
    limit=limit,
    level=optimization_level,
    tell=tell,
  )
  for target in map(open_target, slices(name)):
    if any(state.fits(target, mesh) for mesh in meshes(config, len(target.devices))):
      break
  return state.attempts


@dataclasses.dataclass(kw_only=True)
class _Search:
  """What a search is for, and what it knows so far.

  Attributes:
    config, shape, source, limit, level, tell: see `search`.
    attempts: so far.
    beyond: by rematerialization, bytes that the last compiled step took beyond the arithmetic, and the chips that
      shared its rows.
  """

  config: TrainConfig
  shape: BatchShape
  source: Source
  limit: int | None
  level: str
  tell: Callable[[Attempt], Any]
  attempts: list[Attempt] = dataclasses.field(default_factory=list)
  beyond: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

  def fits(self, target: Target, mesh: MeshConfig) -> bool:
    """Tries a mesh, with less recomputation first if that may fit; returns whether one fits."""
    for remat in ("dots", "full"):
      plan = self._plan(target, mesh, remat)
      if plan is None:
        return False
      if remat == "dots" and self._least(plan, remat) > _ROOM * self._memory(target):
        continue
      attempt = self._attempt(plan, target, remat)
      self.attempts.append(attempt)
      self.tell(attempt)
      if attempt.fits:
        return True
    return False

  def _memory(self, target: Target) -> int:
    memory = target.memory if self.limit is None else self.limit
    assert memory is not None
    return memory

  def _plan(self, target: Target, mesh: MeshConfig, remat: str) -> StepPlan | None:
    """The step so arranged; None where the model cannot be."""
    try:
      return plan_step(_changed(self.config, mesh, remat), target, self.shape, self.source)
    except UserError:
      return None

  def _least(self, plan: StepPlan, remat: str) -> int:
    """Bytes that a chip needs: by arithmetic, and by what a compiled step took beyond it."""
    extra, sharing = self.beyond.get(remat, (0, 1))
    return lower_bound(plan) + round(_CARRIES_OVER * extra * min(1.0, sharing / _sharing(plan)))

  def _attempt(self, plan: StepPlan, target: Target, remat: str) -> Attempt:
    memory = self._memory(target)
    if (least := lower_bound(plan)) > memory:
      return _not_compiled(plan, target, remat, least, "cannot fit")
    if (least := self._least(plan, remat)) > memory:
      return _not_compiled(plan, target, remat, least, "cannot fit, by what another took")
    return self._compile(plan, target, remat)

  def _compile(self, plan: StepPlan, target: Target, remat: str) -> Attempt:
    report = self._report(plan, target, self.level)
    # For cards, every compilation is as in a run.
    may_differ = target.platform == "tpu" and self.level != _AS_IN_A_RUN
    if report.fits and report.total > _NARROW * self._memory(target) and may_differ:
      report = self._report(plan, target, _AS_IN_A_RUN)
    outcome = "fits" if report.fits else "does not fit"
    if report.fits and report.roofline:
      outcome += f", at least {report.roofline.step:.2f} s a step"
    self.beyond[remat] = max(0, report.total - lower_bound(plan)), _sharing(plan)
    return Attempt(
      topology=target.name,
      mesh=dict(plan.mesh.shape),
      remat=remat,
      bytes=report.total,
      compiled=True,
      outcome=outcome,
      report=report,
    )

  def _report(self, plan: StepPlan, target: Target, level: str) -> Report:
    compiled = compile_step(plan, target, optimization_level=level)
    jax.clear_caches()
    return make_report(plan, compiled, target, limit=self._memory(target))


def _sharing(plan: StepPlan) -> int:
  """Chips that share a row."""
  return plan.mesh.size // plan.shards


def _not_compiled(plan: StepPlan, target: Target, remat: str, least: int, outcome: str) -> Attempt:
  return Attempt(
    topology=target.name,
    mesh=dict(plan.mesh.shape),
    remat=remat,
    bytes=least,
    compiled=False,
    outcome=outcome,
  )


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
  return open_shapes(config).config.text.experts is not None


def _changed(config: TrainConfig, mesh: MeshConfig, remat: str) -> TrainConfig:
  model = dataclasses.replace(config.model, grad_checkpoint=True)
  return dataclasses.replace(
    config, mesh=mesh, model=model, runtime=dataclasses.replace(config.runtime, remat_policy=remat)
  )


def lower_bound(plan: StepPlan) -> int:
  """Bytes that a chip certainly needs: the arguments, the gradients, and what layers save for the way back."""
  held = arguments(plan)
  return sum(held.values()) + held["parameters that train"] + _saved(plan)


def _saved(plan: StepPlan) -> int:
  """Bytes of what the layers of both stacks save: their inputs, and under "dots" the results of their products."""
  how, vision, text = plan.step.objective.how, plan.source.config.vision, plan.source.config.text
  sharing = _sharing(plan)
  tokens = plan.shape.rows * plan.shape.tokens // sharing
  patches = math.ceil(plan.shape.rows * plan.shape.tiles / sharing) * vision.num_tokens
  text_width, vision_width = text.hidden_size, vision.hidden_size
  if how.remat == "dots":
    text_width += (text.num_heads + 2 * text.num_kv_heads) * text.head_dim + text.hidden_size
    text_width += 0 if text.experts else 2 * text.intermediate_size
    vision_width += 4 * vision.hidden_size + vision.intermediate_size
  total = 0
  if any(not path.startswith("language_model.lm_head") for path in plan.state.params):
    total += text.num_layers * tokens * text_width
  if any(submodule_of(path) == "vision_model" for path in plan.state.params):
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
