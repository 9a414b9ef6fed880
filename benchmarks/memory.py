"""Memory, descriptors and threads of a run over thousands of steps: what grows with the number of steps is a leak.

  python benchmarks/memory.py [--steps 2000] [--every 100] [--workers 2] [--out memory] [-- --config=... overrides]

Trains the smallest model that has all parts (that of the tests), or the recipe that is given after `--`, with worker processes,
checkpoints and an entry of the log every so many steps, and looks at its processes from outside at each entry. Prints a
table, writes OUT.json, and OUT.png where matplotlib is installed.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

_STEP = re.compile(r"\bstep (\d+)/\d+")


@dataclasses.dataclass(frozen=True)
class Usage:
  """What the processes of a run hold after a step.

  Attributes:
    step: steps taken.
    main_mib: resident memory of the trainer, but for what is mapped from files.
    workers_mib: of its worker processes together.
    descriptors: open files of all.
    threads: of all.
    processes: how many there are.
    shared: blocks of shared memory that they have mapped.
    names: what there is in /dev/shm, of whomever.
  """

  step: int
  main_mib: float
  workers_mib: float
  descriptors: int
  threads: int
  processes: int
  shared: int
  names: int


def usage(step: int, main: int) -> Usage:
  """Looks at a process and all that it has started."""
  pids = [main, *_descendants(main)]
  held = {pid: _own_mib(pid) for pid in pids}
  blocks: set[str] = set()
  for pid in pids:
    blocks |= _shared_blocks(pid)
  return Usage(
    step,
    round(held[main], 1),
    round(sum(held.values()) - held[main], 1),
    sum(_count(f"/proc/{pid}/fd") for pid in pids),
    sum(_count(f"/proc/{pid}/task") for pid in pids),
    len(pids),
    len(blocks),
    _count("/dev/shm"),
  )


def _descendants(parent: int) -> list[int]:
  found = []
  for task in Path(f"/proc/{parent}/task").iterdir():
    for child in map(int, _read(task / "children").split()):
      found += [child, *_descendants(child)]
  return found


def _own_mib(pid: int) -> float:
  """Anonymous and shared memory: what is mapped from files is no one's."""
  found = re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", _read(Path(f"/proc/{pid}/status")), re.M)
  return sum(map(int, found)) / 1024


def _shared_blocks(pid: int) -> set[str]:
  lines = _read(Path(f"/proc/{pid}/maps")).splitlines()
  return {" ".join(line.split()[3:]) for line in lines if "/dev/shm/" in line or "memfd:" in line}


def _count(folder: str) -> int:
  try:
    return len(os.listdir(folder))
  except OSError:  # It has ended.
    return 0


def _read(path: Path) -> str:
  try:
    return path.read_text()
  except OSError:
    return ""


def toy(folder: Path) -> list[str]:
  """The tests' smallest run, as arguments."""
  sys.path.insert(0, str(REPOSITORY))
  from tests.support.hosts import make_world  # pyright: ignore[reportMissingImports]

  world = make_world(folder / "world")
  out = ("training.output_dir", folder / "out"), ("mesh.data", 1), ("mesh.fsdp", 1)
  return [f"--config={world}/recipe.py:{world}", *(f"--config.{name}={value}" for name, value in out)]


def watched(arguments: list[str], *, steps: int, every: int, workers: int) -> Iterator[Usage]:
  """Trains, and yields what is held after every so many steps.

  Raises:
    RuntimeError: the run failed.
  """
  settings = {
    "max_steps": steps,
    "logging_steps": every,
    "dataloader_num_workers": workers,
    "save_strategy": "steps",
    "save_steps": max(1, steps // 8),
    "save_total_limit": 2,
  }
  asked = [f"--config.training.{name}={value}" for name, value in settings.items()]
  recipe = [argument for argument in arguments if argument.startswith("--config=")]
  others = [argument for argument in arguments if argument not in recipe]
  command = [sys.executable, "-m", "internvl_jax.train", *recipe, *asked, *others]
  path = str(REPOSITORY)
  environment = {"JAX_NUM_CPU_DEVICES": "1"} | os.environ | {"PYTHONPATH": path}
  process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace")
  assert process.stderr is not None
  tail: list[str] = []
  for line in process.stderr:
    tail = [*tail, line][-20:]
    if found := _STEP.search(line):
      yield usage(int(found[1]), process.pid)
  if process.wait():
    raise RuntimeError("".join(tail))


def growth(found: list[Usage]) -> dict[str, float]:
  """How much more of each is held in the last quarter than in the second one: leaks grow, caches fill once."""
  quarter = max(1, len(found) // 4)
  second, last = found[quarter : 2 * quarter], found[-quarter:]
  names = [field.name for field in dataclasses.fields(Usage) if field.name != "step"]
  return {name: round(_mean(last, name) - _mean(second, name), 1) for name in names}


def _mean(found: list[Usage], name: str) -> float:
  return sum(getattr(one, name) for one in found) / len(found)


def draw(found: list[Usage], path: Path) -> None:
  """Draws memory and descriptors over the steps."""
  import matplotlib.pyplot as plt

  figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 6))
  steps = [one.step for one in found]
  above.plot(steps, [one.main_mib for one in found], label="trainer, MiB")
  above.plot(steps, [one.workers_mib for one in found], label="workers, MiB")
  below.plot(steps, [one.descriptors for one in found], label="open descriptors")
  below.plot(steps, [one.threads for one in found], label="threads")
  below.set_xlabel("step")
  for axes in (above, below):
    axes.set_ylim(bottom=0)
    axes.legend()
  figure.savefig(path, dpi=120)


def main() -> None:
  parser = argparse.ArgumentParser(description="Memory, descriptors and threads of a run over its steps.")
  parser.add_argument("--steps", type=int, default=2000)
  parser.add_argument("--every", type=int, default=100)
  parser.add_argument("--workers", type=int, default=2)
  parser.add_argument("--out", type=Path, default=Path("memory"))
  parser.add_argument(
    "arguments", nargs="*", help="of internvl_jax.train, after --; by default the tests' toy"
  )
  asked = parser.parse_args()
  found: list[Usage] = []
  names = [field.name for field in dataclasses.fields(Usage)]
  print("".join(f"{name:>13}" for name in names))
  with tempfile.TemporaryDirectory() as folder:
    arguments = asked.arguments
    if not any(argument.startswith("--config=") for argument in arguments):
      arguments = [*toy(Path(folder)), *arguments]
    for one in watched(arguments, steps=asked.steps, every=asked.every, workers=asked.workers):
      found.append(one)
      print("".join(f"{getattr(one, name):>13}" for name in names), flush=True)
  grown = growth(found)
  print("last quarter less second quarter:", json.dumps(grown))
  report = {"usage": [dataclasses.asdict(one) for one in found], "growth": grown}
  asked.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
  if importlib.util.find_spec("matplotlib"):
    draw(found, asked.out.with_suffix(".png"))


if __name__ == "__main__":
  main()
