"""Pairs of runs, ours and PyTorch's, in turn and on the same cores: what `step.py` and `decoding.py` share."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

HERE = Path(__file__).parent
Timing = TypeVar("Timing")


def run(script: Path, *arguments: object, cores: int) -> dict[str, Any]:
  """Runs a script in a process on the first cores; returns the JSON of the last line that it prints."""
  chosen = ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores]))
  command = ["taskset", "-c", chosen, sys.executable, str(script), *map(str, arguments)]
  environment = {**os.environ, "OMP_NUM_THREADS": str(cores), "JAX_PLATFORMS": "cpu"}
  environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  if done.returncode:
    raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def in_turn(count: int, time_side: Callable[[str], Timing]) -> list[tuple[Timing, Timing]]:
  """Times the sides "ours" and "torch" so many times; which is first alternates. Returns pairs (ours, PyTorch's)."""
  found = []
  for number in range(count):
    timed = {side: time_side(side) for side in sorted(("ours", "torch"), reverse=bool(number % 2))}
    found.append((timed["ours"], timed["torch"]))
  return found


def make(script: Path, folder: Path, size: str) -> None:
  """Lets PyTorch's side write the model and the inputs, where they are not there yet."""
  if not (folder / "batch.npz").exists():
    subprocess.run([sys.executable, str(script), str(folder), "--make", size], check=True)
