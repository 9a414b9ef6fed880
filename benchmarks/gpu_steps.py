"""The whole training step on one packed row, put together from the trainer's own pieces."""

import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gpu_rows
from gpu_results import Results
from gpu_timing import Timing
from internvl_jax.aot import recipe
from internvl_jax.batch import TokenBatch, count
from internvl_jax.compiler import compile_program
from internvl_jax.config import TrainConfig
from internvl_jax.hf import published
from internvl_jax.metrics import mfu
from internvl_jax.open_model import open_shapes
from internvl_jax.parallel import batches
from internvl_jax.setup.devices import open_mesh, set_up_jax
from internvl_jax.setup.step import Setup, set_up
from internvl_jax.state import TrainState
from internvl_jax.trees import count as count_parameters

TOY = Path(__file__).parents[1] / "tests" / "assets" / "curve" / "init"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A model and what of it trains.

  Attributes:
    name: of the unit, and in tables.
    model: hub id of a published size, of which nothing is read, or a folder with a config.json.
    variant: of `aot.recipe`: "" trains all of it, "lora" adapters of the language model.
    tokens: of the row.
    side: of a tile, in pixels.
    image_token: the id at image tokens, as PyTorch's model is told, too; text has ids below it.
  """

  name: str
  model: str
  variant: str = ""
  tokens: int = 8192
  side: int = 448
  image_token: int = 151667

  def config(self, remat: str = "full") -> TrainConfig:
    """The recipe of a run, with weights drawn at random; `remat` is a policy, or "none"."""
    config = recipe.get_config(self.variant)
    config.model.model_name_or_path = self.model
    config.data.force_image_size = self.side
    config.runtime.random_init = True
    config.model.grad_checkpoint = remat != "none"
    if remat != "none":
      config.runtime.remat_policy = remat  # pyright: ignore[reportAttributeAccessIssue]
    return config


CASES = {
  case.name: case
  for case in (
    Case(name="3-1b", model=published.hub_id("3-1b")),
    Case(name="3-2b", model=published.hub_id("3-2b")),
    Case(name="3-8b-lora", model=published.hub_id("3-8b"), variant="lora"),
    Case(name="toy", model=str(TOY), tokens=64, side=56, image_token=388),
  )
}
"""By name."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Ready:
  """A case on one device: the run's setup, its batch of numpy arrays, and the FLOPs that rows need."""

  setup: Setup
  batch: TokenBatch
  useful: mfu.UsefulFlops

  @property
  def flops(self) -> float:
    """FLOPs that a step over the batch needs."""
    return self.useful.of(count(self.batch))


def prepare(case: Case, *, remat: str, pool: int | None) -> Ready:
  """Sets a case up on the first device, as far as shapes go; `pool` is the number of tiles, None the loader's."""
  config = case.config(remat)
  set_up_jax(config)
  source = open_shapes(config)
  setup = set_up(config, source, open_mesh(config, jax.devices()[:1]))
  batch = gpu_rows.packed_batch(
    case.tokens,
    per_tile=source.config.tokens_per_tile,
    side=case.side,
    image_token=case.image_token,
    pool=pool,
  )
  useful = mfu.useful_flops(source.config, source.model.shapes, setup.trainable)
  return Ready(setup=setup, batch=batch, useful=useful)


def start(setup: Setup) -> tuple[TrainState, dict[str, jax.Array]]:
  """Draws the weights: the state at the first step, and what is frozen."""
  params = setup.source.load(setup.shapes, setup.places.params)
  frozen = {path: value for path, value in params.items() if path not in setup.trainable}
  return setup.create_state(params), frozen


def compiled(setup: Setup, state: TrainState, frozen: dict[str, jax.Array], batch: TokenBatch) -> Any:
  """The program of a step over such a batch, as `trainer.CompiledSteps` compiles it, which keeps its own to itself."""
  inputs = state, frozen, batches.place_batch(batch, setup.mesh), np.float32(1e-5)
  lowered = jax.jit(setup.step.__call__, donate_argnums=0).lower(*inputs)
  return compile_program(lowered, setup.mesh.devices.flat[0].platform)


def measure(
  results: Results, unit: str, case: Case, *, remat: str = "full", pool: int | None = None, toy: bool = False
) -> None:
  """Draws the weights, compiles the step, takes steps, and adds a row."""
  ready = prepare(case, remat=remat, pool=pool)
  setup, batch = ready.setup, ready.batch
  state, frozen = start(setup)
  began = time.perf_counter()
  program = compiled(setup, state, frozen, batch)
  compiled_in = time.perf_counter() - began
  peak_before = peak_bytes()
  _, timing, losses = take_steps(program, state, frozen, setup, batch, samples=2 if toy else 5)
  counts = count(batch)
  results.add(
    unit,
    case=case.name,
    trains=case.variant or "full",
    tokens=int(counts.tokens),
    row=case.tokens,
    tiles=int(counts.image_tokens) // setup.source.config.tokens_per_tile,
    pool=batch.tiles.shape[2],
    parameters=count_parameters(setup.shapes),
    attention=setup.how.kernels.attention,
    remat=setup.how.remat or "none",
    compile_seconds=compiled_in,
    **timing.as_ms(),
    tokens_per_second=int(counts.tokens) / timing.median,
    useful_tflop=ready.flops / 1e12,
    peak_before_bytes=peak_before,
    **memory(program),
    first_loss=losses[0],
    last_loss=losses[-1],
  )
  assert all(map(math.isfinite, losses)), losses


def take_steps(
  program: Any,
  state: TrainState,
  frozen: dict[str, jax.Array],
  setup: Setup,
  batch: TokenBatch,
  *,
  samples: int,
) -> tuple[TrainState, Timing, list[float]]:
  """Times steps that follow each other, with the host ahead of the device as in a run; also the state after them.

  The batch goes to the device anew for every step. Samples are of four steps, after two that are not timed.
  """
  rate, losses, seconds = np.float32(1e-5), [], []
  metrics: Any = None
  for steps in (2, *itertools.repeat(4, samples)):
    start = time.perf_counter()
    for _ in range(steps):
      state, metrics = program(state, frozen, batches.place_batch(batch, setup.mesh), rate)
    losses.append(float(metrics.loss))
    seconds.append((time.perf_counter() - start) / steps)
  return state, Timing.of(seconds[1:], 4), losses


def peak_bytes() -> int | None:
  """The most memory that was in use so far in this process; None where the device does not count it."""
  return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def memory(program: Any) -> dict[str, int | None]:
  """Bytes: the most that was in use so far, what the compiler planned for the program, and what there is for a run."""
  found, stats = program.memory_analysis(), jax.devices()[0].memory_stats() or {}
  planned = None
  if found is not None:
    parts = ("argument", "output", "temp", "generated_code")
    planned = sum(getattr(found, f"{part}_size_in_bytes") for part in parts) - found.alias_size_in_bytes
  return {
    "peak_bytes": peak_bytes(),
    "planned_bytes": planned,
    "limit_bytes": stats.get("bytes_limit"),
  }
