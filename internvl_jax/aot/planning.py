"""Compiles the training step for devices that need not be there, or searches for the fewest that it fits, and prints it.

`internvl_jax.plan` is the command.
"""

import dataclasses
from typing import Any

from internvl_jax.aot import report as reports
from internvl_jax.aot.price import check_price, price
from internvl_jax.aot.program import (
  BatchShape,
  Compiled,
  batch_shape,
  compile_beside,
  compile_step,
  plan_step,
)
from internvl_jax.aot.search import as_json, search, summary
from internvl_jax.aot.target import Target, open_target
from internvl_jax.config import TrainConfig
from internvl_jax.setup.devices import set_up_jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pricing:
  """What a plan's price is computed with; see `aot.price.Price`."""

  hour: float
  utilisation: float
  supervised: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """What is asked of a plan, beside the configuration.

  Attributes:
    topology: the devices, as `aot.target.open_target` reads it; of a search, their kind, or the most of them.
    tokens: of a row; None for the most that the configuration makes.
    tiles: of a row; None likewise.
    hbm: GiB that a program may use of each device; None for what the device has.
    optimization_level: of the compiler for TPUs: "default" or "O0" to "O3".
    dump: folder for the compiler's files; None for none.
    pricing: None prints no price.
  """

  topology: str
  tokens: int | None = None
  tiles: int | None = None
  hbm: float | None = None
  optimization_level: str = "O0"
  dump: str | None = None
  pricing: Pricing | None = None

  @property
  def limit(self) -> int | None:
    """`hbm` in bytes."""
    return None if self.hbm is None else round(self.hbm * reports.GIB)

  def shape(self, config: TrainConfig) -> BatchShape:
    """The batch that is planned for."""
    return batch_shape(config, tokens=self.tokens, tiles=self.tiles)


def compile_once(config: TrainConfig, request: Request) -> dict[str, Any]:
  """Compiles the step for the devices asked for and prints the report, which it returns as plain values."""
  shape, target = request.shape(config), open_target(request.topology)
  if request.pricing is not None:
    check_price(target)
  set_up_jax(config, keeps_programs=False)  # How long it takes to compile is what is reported.
  plan = plan_step(config, target, shape)
  compiled = compile_step(plan, target, optimization_level=request.optimization_level, dump=request.dump)
  limit = target.memory if request.limit is None else request.limit
  report = reports.make_report(plan, compiled, target, limit=limit)
  print(reports.render(report))
  beside = {
    name: _print_beside(name, program, limit)
    for name, program in compile_beside(plan, target, optimization_level=request.optimization_level).items()
  }
  found = report.as_json() | _print_price(report, target, request.pricing)
  return found | ({"beside": beside} if beside else {})


def _print_beside(name: str, program: Compiled, limit: int | None) -> dict[str, Any]:
  """Prints what a program needs that the task runs beside the step, and returns it as plain values."""
  total = sum(program.stats[kind] for kind in ("argument", "output", "temp")) - program.stats["alias"]
  fits = program.refusal is None and (limit is None or total <= limit)
  parts = ", ".join(f"{kind}s {program.stats[kind] / reports.GIB:.2f}" for kind in ("argument", "temp"))
  print(
    f"Beside the step, {name}: {total / reports.GIB:.2f} GiB a device ({parts}), "
    f"{'fits' if fits else 'does not fit'}; compiled in {program.compile_seconds:.0f} s"
  )
  return {"total_bytes": total, "fits": fits, **program.stats}


def search_fewest(config: TrainConfig, request: Request) -> dict[str, Any]:
  """Searches for the fewest devices, prints each attempt and the best report; returns all of it as plain values."""
  shape = request.shape(config)
  set_up_jax(config, keeps_programs=False)
  attempts = search(
    config,
    request.topology,
    shape,
    limit=request.limit,
    optimization_level=request.optimization_level,
    tell=lambda attempt: print(attempt, flush=True),
  )
  best = [attempt.report for attempt in attempts if attempt.fits and attempt.report]
  if best:
    print("\n" + reports.render(best[-1]))
  print("\n" + summary(attempts))
  cost = _print_price(best[-1], open_target(best[-1].topology), request.pricing) if best else {}
  return {"attempts": as_json(attempts)} | cost


def _print_price(report: reports.Report, target: Target, pricing: Pricing | None) -> dict[str, Any]:
  """Prints what tokens cost, if a price is given, and returns it as plain values."""
  if pricing is None:
    return {}
  found = price(report, target, **dataclasses.asdict(pricing))
  print(found)
  return {"price": dataclasses.asdict(found)}
