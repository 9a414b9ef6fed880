"""A bfloat16 training curve against the one in float32, by the whole program on the tests' recorded data."""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from gpu_results import Results
from internvl_jax.errors import UserError
from tests.support.toy import log_history, train_command  # pyright: ignore[reportMissingImports]  # From tests/.


def measure(results: Results, unit: str, *, toy: bool) -> None:
  """Trains the small recorded model twice, and adds what the losses of the two runs differ by."""
  steps = 3 if toy else 50
  exact, half = (losses(steps, bf16=bf16) for bf16 in (False, True))
  difference = np.asarray(half) - np.asarray(exact)
  results.add(
    unit,
    case=f"{steps} steps of tests/assets/curve, bf16 minus float32",
    first=exact[0],
    last=exact[-1],
    largest=float(np.abs(difference).max()),
    root_mean_square=float(np.sqrt((difference**2).mean())),
    mean=float(difference.mean()),
    float32=exact,
    bf16=half,
  )


def losses(steps: int, *, bf16: bool) -> list[float]:
  """The loss of every step of a run, as it is logged: four digits.

  Raises:
    UserError: the run failed.
  """
  with tempfile.TemporaryDirectory(prefix="internvl_jax_bench_") as folder:
    output = Path(folder) / "output"
    settings = [f"training.max_steps={steps}", f"training.bf16={bf16}", "training.save_strategy=no"]
    arguments, environment = train_command(Path(folder), output, *settings)
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
      raise UserError(f"the run with bf16={bf16} failed: {(done.stderr.splitlines() or ['no word'])[-1]}")
    return [entry["loss"] for entry in log_history(output) if "loss" in entry]
