"""The optimizer step on CPUs beside PyTorch's: same weights, same rows, same losses.

  python benchmarks/step.py [--folder step_results] [--pairs 5] [--steps 6] [--cores 1 2] [--size small|toy]

Makes a model and a batch in the folder, if they are not there, then runs both sides in turn, each in a process of its own on
the same cores, and prints the median of the pairs' ratios: of the time of a step, and of the time that cores worked on it,
which neighbors on a busy machine disturb less. Fails where losses differ by more than 1e-5. PyTorch's side is transformers'
InternVLForConditionalGeneration with fused attention and fused AdamW; it needs the extra `parity`.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import paired_runs

HERE = Path(__file__).parent
SIDES = {"ours": HERE / "step_ours.py", "torch": HERE / "step_torch.py"}

LARGEST_DIFFERENCE = 1e-5
"""Of the losses of the two sides."""


@dataclasses.dataclass(frozen=True)
class Timing:
  """What one process says of its steps.

  Attributes:
    losses: of each step.
    seconds: of each step.
    busy: seconds that cores worked on each step, in the program or for it in the kernel.
  """

  losses: list[float]
  seconds: list[float]
  busy: list[float]

  @property
  def typical(self) -> tuple[float, float]:
    """Medians of seconds and of busy seconds, from the third step on: memory is in place by then."""
    return statistics.median(self.seconds[2:]), statistics.median(self.busy[2:])


def run_side(side: str, folder: Path, steps: int, cores: int) -> Timing:
  """Times one side, in a process on the first cores."""
  return Timing(**paired_runs.run(SIDES[side], folder, steps, cores=cores))


def compare(pairs: list[tuple[Timing, Timing]]) -> dict[str, float]:
  """Medians over pairs (ours, theirs), and the largest difference of their losses."""
  ratios = [[ours / theirs for ours, theirs in zip(a.typical, b.typical, strict=True)] for a, b in pairs]
  differences = [
    abs(ours - theirs) for a, b in pairs for ours, theirs in zip(a.losses, b.losses, strict=True)
  ]
  return {
    "ratio": statistics.median(ratio for ratio, _ in ratios),
    "busy_ratio": statistics.median(busy for _, busy in ratios),
    "ours": statistics.median(a.typical[0] for a, _ in pairs),
    "torch": statistics.median(b.typical[0] for _, b in pairs),
    "first": statistics.median(a.seconds[0] for a, _ in pairs),
    "difference": max(differences),
  }


def measure(folder: Path, *, pairs: int, steps: int, cores: int) -> dict[str, float]:
  """Runs pairs in turn and compares them; which side is first alternates."""
  return compare(paired_runs.in_turn(pairs, lambda side: run_side(side, folder, steps, cores)))


def make(folder: Path, size: str) -> None:
  """Writes the model and the batch, where they are not there yet."""
  paired_runs.make(SIDES["torch"], folder, size)


def main() -> int:
  """Prints a line for each number of cores; the exit code says whether losses agree."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--folder", type=Path, default=Path("step_results"))
  parser.add_argument("--pairs", type=int, default=5)
  parser.add_argument("--steps", type=int, default=6, help="steps of each run, at least 3")
  parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
  parser.add_argument("--size", choices=["small", "toy"], default="small")
  arguments = parser.parse_args()
  folder = arguments.folder.absolute()
  make(folder, arguments.size)
  worst, results = 0.0, {}
  for cores in arguments.cores:
    found: dict[str, Any] = measure(folder, pairs=arguments.pairs, steps=arguments.steps, cores=cores)
    results[cores], worst = found, max(worst, found["difference"])
    print(
      f"{cores} core(s): {found['ratio']:.3f} of PyTorch's time ({found['busy_ratio']:.3f} by the cores' work); "
      f"{found['ours']:.3f} s and {found['torch']:.3f} s a step; our first step, compiled, {found['first']:.1f} s; "
      f"losses differ by {found['difference']:.1e} at most",
      flush=True,
    )
  (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
  return int(worst > LARGEST_DIFFERENCE)


if __name__ == "__main__":
  sys.exit(main())
