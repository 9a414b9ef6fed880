"""Measures kernels, training steps and PyTorch beside them on one NVIDIA card, in at most so many minutes.

  python benchmarks/gpu.py --out DIR [--minutes 8] [--only kernels,step/3-1b,...] [--page docs/performance.md]
  python benchmarks/gpu.py --out DIR --toy

Parts, each of one or more units, in the order in which they are run:

  kernels    every kernel against plain attention and `ragged_dot` in float32: forward and gradients
  step       the whole step in bfloat16 on a packed row of 8,192 tokens: InternVL3-1B and -2B full, 8B LoRA
  torch      transformers' InternVL in PyTorch on the same rows (1B and 2B), unpacked and packed
  attention  attention alone at published sizes, by triton, xla and, where its masks do, cuDNN
  experts    the grouped matmul alone at a layer of 30B-A3B
  curve      50 steps in bfloat16 against float32 on the tests' recorded data
  tilings    other tilings of attention's kernels
  costs      what a tile, a token and a pair of attention cost in the step, as `loader.balance_costs` takes them

Every unit is a process of its own, so that it has the card for itself and one that fails takes no other along. A unit
that would not end in time is left out, and one that does not end in time is stopped; both are said. Every row is written
to DIR/results.json at once; DIR/table.md is made of it, and with --page a page's tables. Units that are not run keep
what an earlier run on the same card and versions has left in DIR. With --toy, all is tiny, kernels are interpreted, and the CPU does: it shows that the
script runs, and its times mean nothing. docs/performance.md explains the numbers.
"""

import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

import gpu_report
from gpu_results import Results
from internvl_jax import cli
from internvl_jax.errors import UserError

_OUT = flags.DEFINE_string("out", None, "Folder for the results.", required=True)
_MINUTES = flags.DEFINE_float("minutes", 8.0, "Minutes that all units together may take.", lower_bound=0)
_ONLY = flags.DEFINE_list("only", [], "Parts, or units as part/case; all if unset.")
_PAGE = flags.DEFINE_string("page", None, "Page whose tables are written anew, between its markers.")
_TOY = flags.DEFINE_bool("toy", False, "Tiny shapes on the CPU: shows that the script runs.")
_REMAT = flags.DEFINE_enum(
  "remat", "full", ("full", "dots", "none"), "What the steps' backward passes compute again."
)
_TILES = flags.DEFINE_integer(
  "tiles", None, "Tiles of the steps' pools; unset: as many as the loader takes for the row.", lower_bound=1
)
_UNIT = flags.DEFINE_string("unit", None, "Runs this unit here: what the script gives its own processes.")

REPOSITORY = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
  """What one process measures.

  Attributes:
    name: part, or part/case.
    functions: "module:function" each, called with the results, the unit's name and whether all is tiny.
    seconds: what it is thought to take on a card, all in all: a guess, by which units are left out.
    platforms: JAX's, where it must not take the card.
  """

  name: str
  functions: tuple[str, ...]
  seconds: float
  platforms: str | None = None

  @property
  def case(self) -> str:
    """The case, where it has one."""
    return self.name.partition("/")[2]


def list_units(toy: bool) -> list[Unit]:
  """All units, what matters most first."""
  steps = [("toy", 20.0, 20.0)] if toy else [("3-1b", 60.0, 45.0), ("3-2b", 60.0, 45.0)]
  pairs = [
    unit
    for case, ours, theirs in steps
    for unit in (
      Unit(name=f"step/{case}", functions=("gpu_steps:measure",), seconds=ours),
      Unit(name=f"torch/{case}", functions=("gpu_rival:measure",), seconds=theirs, platforms="cpu"),
    )
  ]
  adapters = [] if toy else [Unit(name="step/3-8b-lora", functions=("gpu_steps:measure",), seconds=70)]
  costs = ["toy"] if toy else ["3-1b", "3-2b", "3-8b-lora"]
  compare = ("gpu_attention:compare", "gpu_experts:compare")
  return [
    Unit(name="kernels", functions=compare, seconds=50),
    *pairs,
    Unit(name="attention", functions=("gpu_attention:measure",), seconds=50),
    Unit(name="experts", functions=("gpu_experts:measure",), seconds=30),
    *adapters,
    Unit(name="curve", functions=("gpu_curve:measure",), seconds=60),
    Unit(name="tilings", functions=("gpu_attention:sweep",), seconds=60),
    *(
      Unit(name=f"costs/{case}", functions=("gpu_costs:measure",), seconds=90 if toy else 150)
      for case in costs
    ),
  ]


def main(argv: Sequence[str]) -> None:
  """Runs the units that fit, each in a process, or the one that is asked for here."""
  del argv
  results = Results(_OUT.value)
  if _UNIT.value is not None:
    (unit,) = [unit for unit in list_units(_TOY.value) if unit.name == _UNIT.value]
    run_here(unit, results)
    return
  if _TOY.value and _PAGE.value:
    raise UserError("--page: what --toy measures says nothing; leave one of them out")
  start = time.monotonic()
  # Whoever ends this process ends those that it has started.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
  units = wanted(list_units(_TOY.value), _ONLY.value)
  # The search for the card is a part of the minutes.
  results.describe(**machine(_TOY.value))
  for unit in units:
    left = 60 * _MINUTES.value - (time.monotonic() - start)
    run_apart(unit, results, left, unit_command(unit), environment(_TOY.value, unit.platforms))
  lines = gpu_report.render(results.read())
  (Path(_OUT.value) / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
  print("\n".join(lines))
  if _PAGE.value:
    gpu_report.write_page(Path(_PAGE.value), lines)


def wanted(units: Sequence[Unit], only: Sequence[str]) -> list[Unit]:
  """The units that are asked for by their names or their parts'.

  Raises:
    UserError: a name is none of these.
  """
  names = {unit.name for unit in units} | {gpu_report.part_of(unit.name) for unit in units}
  if unknown := [name for name in only if name not in names]:
    raise UserError(
      f"--only={','.join(unknown)}: there is no such part; there are {', '.join(sorted(names))}"
    )
  return [unit for unit in units if not only or {unit.name, gpu_report.part_of(unit.name)} & set(only)]


# --- The machine --------------------------------------------------------------------------------------------

_PROBE = (
  "import jax, json; from internvl_jax.metrics import mfu; d = jax.devices()[:1]; "
  "print(json.dumps([d[0].platform, d[0].device_kind, mfu.peak_flops(d)]))"
)


def machine(toy: bool) -> dict[str, Any]:
  """Card, driver, versions and command.

  Raises:
    UserError: JAX sees no card.
  """
  done = subprocess.run(
    [sys.executable, "-c", _PROBE], env=environment(toy), capture_output=True, text=True, check=False
  )
  if done.returncode:
    raise UserError(f"JAX does not start: {(done.stderr.splitlines() or ['no word'])[-1]}")
  where, kind, peak = json.loads(done.stdout.splitlines()[-1])
  if where != "gpu" and not toy:
    raise UserError(
      f"JAX sees no NVIDIA card, but a {where} ({kind}): pip install -e '.[cuda]', or try --toy"
    )
  packages = ("jax", "jaxlib", "torch", "transformers", "flash_attn")
  return {
    "card": f"none ({kind}; toy sizes, whose times mean nothing)" if toy else kind,
    "driver": driver(),
    "peak_tflops": None if peak is None else peak / 1e12,
    "python": platform.python_version(),
    **{name: version(name) for name in packages},
  }


def version(package: str) -> str | None:
  """The version of a package that is installed; None where it is not."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def driver() -> str | None:
  """The version of NVIDIA's driver; None where there is none."""
  if shutil.which("nvidia-smi") is None:
    return None
  command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  return (done.stdout.splitlines() or [None])[0] if not done.returncode else None


# --- Units --------------------------------------------------------------------------------------------------


def environment(toy: bool, platforms: str | None = None) -> dict[str, str]:
  """The environment of a process that measures."""
  paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
  found = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
  if toy or platforms:
    found |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
  return found


def unit_command(unit: Unit) -> list[str]:
  """The command of a process that measures a unit."""
  options = {"out": _OUT.value, "unit": unit.name, "remat": _REMAT.value, "tiles": _TILES.value}
  given = [f"--{name}={value}" for name, value in options.items() if value is not None]
  return [sys.executable, __file__, *given, *["--toy"] * _TOY.value]


def run_apart(
  unit: Unit, results: Results, left: float, command: Sequence[str], variables: dict[str, str]
) -> None:
  """Runs a unit's command in a process of its own, and says how it ended.

  Args:
    unit: what is left out where fewer seconds are left than it may take.
    results: where that is written.
    left: seconds; it is stopped after so many, or after thrice what it was thought to take.
    command: adds the unit's rows to the results.
    variables: the environment.
  """
  if left < unit.seconds:
    why = f"{max(0.0, left):.0f} s are left, and it may take {unit.seconds:.0f} s"
    results.leave_out(unit.name, why)
    print(f"{unit.name}: left out: {why}", flush=True)
    return
  today = datetime.datetime.now(datetime.UTC).date().isoformat()
  results.begin(unit.name, command=" ".join(["python benchmarks/gpu.py", *sys.argv[1:]]), date=today)
  start = time.monotonic()
  returned = wait_for(command, variables, min(left, 3 * unit.seconds))
  took = time.monotonic() - start
  status = "done" if returned == 0 else f"failed with status {returned}"
  status = f"stopped after {took:.0f} s" if returned is None else status
  results.end(unit.name, status, seconds=round(took, 1))
  print(f"{unit.name}: {status}, {took:.1f} s", flush=True)


def wait_for(command: Sequence[str], variables: dict[str, str], seconds: float) -> int | None:
  """The status with which a command ends; None where it was stopped, with all processes that it had started."""
  with subprocess.Popen(command, env=variables, start_new_session=True) as process:
    try:
      return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
      return None
    finally:
      if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)


def run_here(unit: Unit, results: Results) -> None:
  """Measures what a unit is for; an error is written down with its rows before it ends the process."""
  options: dict[str, Any] = {"toy": _TOY.value}
  part = gpu_report.part_of(unit.name)
  if part in ("step", "torch", "costs"):
    gpu_steps = importlib.import_module("gpu_steps")
    options |= {"case": gpu_steps.CASES[unit.case], "remat": _REMAT.value}
  if part == "step":
    options["pool"] = _TILES.value
  for name in unit.functions:
    module, _, function = name.partition(":")
    try:
      getattr(importlib.import_module(module), function)(results, unit.name, **options)
    except Exception as error:
      results.add(unit.name, case=name, refused=gpu_report.first_line(error))
      raise


if __name__ == "__main__":
  cli.run_app(main)
