"""The training step of a configuration, lowered from shapes alone, and compiled."""

import contextlib
import dataclasses
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from internvl_jax.aot import cuda
from internvl_jax.aot.target import Target
from internvl_jax.batch import Batch, abstract_batch
from internvl_jax.compiler import compile_program
from internvl_jax.config import TrainConfig
from internvl_jax.data.schedule.shapes import longest_row
from internvl_jax.errors import UserError
from internvl_jax.hf.model import Source
from internvl_jax.models.kernels import Device
from internvl_jax.open_model import open_shapes
from internvl_jax.parallel import batches
from internvl_jax.parallel import mesh as meshes
from internvl_jax.parallel.placement_table import placement_warnings
from internvl_jax.setup.balance import planned_balance
from internvl_jax.setup.devices import open_mesh
from internvl_jax.setup.step import set_up
from internvl_jax.state import TrainState
from internvl_jax.step import TrainStep
from internvl_jax.tasks import longest_sample
from internvl_jax.tasks.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchShape:
  """The largest batch of an optimizer step.

  Attributes:
    accumulation: micro-batches.
    rows: of a data shard and micro-batch.
    tokens: of a row.
    tiles: of a row.
    side: of a tile, in pixels.
  """

  accumulation: int
  rows: int
  tokens: int
  tiles: int
  side: int

  def batch(self, shards: int, task: Task) -> Batch:
    """Shapes of the task's batch for so many data shards."""
    rows = {"A": self.accumulation, "R": self.rows * shards, "S": self.tokens}
    pool = {"D": shards, "T": self.rows * self.tiles, "H": self.side, "W": self.side}
    return abstract_batch(task.batch, {**rows, **pool, **task.sizes(self.tokens)}, jax.ShapeDtypeStruct)


def batch_shape(config: TrainConfig, *, tokens: int | None = None, tiles: int | None = None) -> BatchShape:
  """The largest batch that the config's data can make, or one with so many tokens and tiles a row."""
  data = config.data
  # A line's conversations are in one row.
  longest = longest_row(data, longest_sample(config))
  if data.use_packed_ds:
    most = data.num_images_expected
  else:
    grid = data.max_dynamic_patch if data.dynamic_image_size else 1
    most = grid + (data.use_thumbnail and grid > 1)
  return BatchShape(
    accumulation=config.training.gradient_accumulation_steps,
    rows=config.training.per_device_train_batch_size,
    tokens=longest if tokens is None else tokens,
    tiles=most if tiles is None else tiles,
    side=data.force_image_size,
  )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class StepPlan:
  """A training step and the shapes and places of what it is called with.

  Attributes:
    source: the model.
    task: the way to learn.
    step: what is to be compiled.
    mesh: its devices.
    shape: the batch's.
    state, frozen, batch: as the step takes them, without numbers.
    xla_options: `runtime.xla_options`.
    warnings: a run's warnings about the sharding of the parameters.
    balance: how packed rows are balanced, see `setup.balance.planned_balance`; None: they are taken as they come.
  """

  source: Source
  task: Task
  step: TrainStep
  mesh: jax.sharding.Mesh
  shape: BatchShape
  state: TrainState
  frozen: dict[str, Any]
  batch: Batch
  xla_options: tuple[str, ...] = ()
  warnings: tuple[str, ...] = ()
  balance: dict[str, Any] | None = None

  @property
  def shards(self) -> int:
    """Data shards."""
    return meshes.data_parallel_size(self.mesh)

  @property
  def inputs(self) -> tuple:
    """What the step is called with."""
    return self.state, self.frozen, self.batch, jax.ShapeDtypeStruct((), np.float32)


def plan_step(
  config: TrainConfig, target: Target, shape: BatchShape, source: Source | None = None
) -> StepPlan:
  """Describes the step that the config makes on those devices.

  Raises:
    UserError: the config, the model and the devices do not fit together.
  """
  source = open_shapes(config) if source is None else source
  mesh = open_mesh(config, target.devices, source.model)
  meshes.check_lengths([shape.tokens], mesh)
  setup = set_up(config, source, mesh, device=Device.of(target.devices[0]))
  shards = meshes.data_parallel_size(mesh)
  batch = shape.batch(shards, setup.task)
  batch = jax.tree.map(
    lambda leaf, place: leaf.update(sharding=place), batch, batches.batch_shardings(batch, mesh)
  )
  return StepPlan(
    source=source,
    task=setup.task,
    step=setup.step,
    mesh=mesh,
    shape=shape,
    state=setup.abstract_state(),
    frozen=setup.abstract_frozen(),
    batch=batch,
    xla_options=config.runtime.xla_options,
    warnings=tuple(placement_warnings(setup.shapes, setup.places)),
    balance=planned_balance(config, source, setup.task, shards),
  )


# --- Compiling ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
  """What a compiler made of a step.

  Attributes:
    hlo: the program as text.
    stats: bytes a device, by the compiler's names for them (`memory_analysis`).
    flops: the compiler's own count, in which loops run once; None where it gives none.
    lower_seconds, compile_seconds: how long it took.
    refusal: why the compiler gave up, where memory did not suffice; what is known then comes from its dumps.
    files: the compiler's files on the addresses and lifetimes of values (see `peak`); empty where there are none.
  """

  hlo: str
  stats: dict[str, int]
  flops: float | None
  lower_seconds: float
  compile_seconds: float
  refusal: str | None
  files: tuple[str, str]


_STATS: tuple[str, ...] = ("argument", "output", "alias", "temp", "generated_code")


def compile_step(
  plan: StepPlan, target: Target, *, optimization_level: str = "O0", dump: str | None = None
) -> Compiled:
  """Compiles a step. A step that does not fit is an answer like another.

  Args:
    plan: the step.
    target: the devices it is planned for.
    optimization_level: how hard the compiler for a slice of TPUs tries. "default" is what a run on TPUs gets. "O0" and
      "O1" take a fraction of its time, with memory within 4 % (docs/scale.md). For cards it is always what a run gets.
    dump: an empty folder for what the compiler for compile-only devices writes about the program; None keeps nothing of it.

  Raises:
    UserError: the compiler is not all there.
  """
  start = time.perf_counter()
  # As `trainer.CompiledSteps` does it.
  lowered = jax.jit(plan.step.__call__, donate_argnums=0).lower(*plan.inputs)
  return compile_lowered(lowered, start, plan, target, optimization_level=optimization_level, dump=dump)


def compile_beside(plan: StepPlan, target: Target, *, optimization_level: str = "O0") -> dict[str, Compiled]:
  """Compiles what the task runs beside the step, by its names; see `compile_step`."""
  found = {}
  for name, (function, inputs) in plan.task.beside(plan.step.objective, plan.mesh, plan.batch).items():
    start = time.perf_counter()
    lowered = jax.jit(function).lower({**plan.frozen, **plan.state.params}, *inputs)
    found[name] = compile_lowered(lowered, start, plan, target, optimization_level=optimization_level)
  return found


def compile_lowered(
  lowered: Any,
  start: float,
  plan: StepPlan,
  target: Target,
  *,
  optimization_level: str = "O0",
  dump: str | None = None,
) -> Compiled:
  """Compiles a program of a plan that was lowered since `start`; see `compile_step`."""
  lowered_at = time.perf_counter()
  if not target.compile_only:
    compiled = compile_program(lowered, target.platform, plan.xla_options)
    seconds = time.perf_counter() - lowered_at
    return _result(compiled, compiled.as_text() or "", None, ("", ""), lowered_at - start, seconds)
  if optimization_level != "default" and target.platform == "tpu":
    jax.config.update("jax_optimization_level", optimization_level)
  with contextlib.ExitStack() as stack:
    folder = dump or stack.enter_context(tempfile.TemporaryDirectory(prefix="internvl_jax_plan_"))
    refusal = compiled = None
    try:
      # The text of a program compiled for v5p and v6e cannot be had otherwise.
      dumps = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
      compiled = compile_program(lowered, target.platform, plan.xla_options, compile_only=True, **dumps)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        if cuda.is_missing_tool(error):
          raise UserError(f"the compiler for NVIDIA's cards is not all there: {cuda.INSTALL}") from error
        raise
      refusal = re.sub(r"\s+", " ", str(error).splitlines()[0]).removeprefix("RESOURCE_EXHAUSTED: ")
    seconds = time.perf_counter() - lowered_at
    dumps = _Dumps(Path(folder))
    if refusal is None:
      return _result(compiled, dumps.hlo, None, dumps.files, lowered_at - start, seconds)
    return Compiled(
      hlo=dumps.hlo,
      stats=dumps.stats,
      flops=None,
      lower_seconds=lowered_at - start,
      compile_seconds=seconds,
      refusal=refusal,
      files=dumps.files,
    )


def _result(
  compiled: Any, hlo: str, refusal, files, lower_seconds: float, compile_seconds: float
) -> Compiled:
  found = compiled.memory_analysis()
  costs = compiled.cost_analysis() or {}
  return Compiled(
    hlo=hlo,
    stats={name: int(getattr(found, f"{name}_size_in_bytes")) for name in _STATS} if found else {},
    flops=costs.get("flops"),
    lower_seconds=lower_seconds,
    compile_seconds=compile_seconds,
    refusal=refusal,
    files=files,
  )


class _Dumps:
  """The files that XLA writes beside a program, of the largest program in a folder."""

  def __init__(self, folder: Path):
    programs = sorted(folder.glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size)
    self._stem = str(programs[-1]).removesuffix(".txt") if programs else ""

  def _read(self, suffix: str) -> str:
    path = Path(self._stem + suffix)
    return path.read_text(encoding="utf-8") if self._stem and path.is_file() else ""

  @property
  def hlo(self) -> str:
    """The program."""
    return self._read(".txt")

  @property
  def stats(self) -> dict[str, int]:
    """Bytes of the main memory, as `memory_analysis` names them, from the list of allocations."""
    stats: dict[str, int] = dict.fromkeys(_STATS, 0)
    pattern = r"^allocation \d+: size (\d+),(?: color (\d+),)? page \d+, (.*)$"
    for size, color, kind in re.findall(pattern, self._read("-buffer-assignment.txt"), re.MULTILINE):
      if color not in ("", "0") or "thread-local" in kind:
        continue
      name = "argument" if kind.startswith("parameter") else "output" if "live-out" in kind else "temp"
      stats[name] += int(size)
      if name == "argument" and "live-out" in kind:
        stats["alias"] += int(size)
        stats["output"] += int(size)
    return stats

  @property
  def files(self) -> tuple[str, str]:
    """The addresses of values, and their lifetimes."""
    return self._read("-buffer-assignment.txt"), self._read("-live-range.txt")
