"""Greedy decoding on CPUs beside transformers': same weights, same prompts with pictures, same tokens.

  python benchmarks/decoding.py [--folder decoding_results] [--pairs 5] [--tokens 256] [--rows 1 8] [--cores 2]
      [--size small|toy]

Makes a model and prompts in the folder, if they are not there, then runs both sides in turn, each in a process of its own on
the same cores, and prints medians over pairs of the ratios of ours to theirs: of the time that prompts take (an answer of one
token), of the time of each further token, and of all. Fails where more than one token in a hundred differs. PyTorch's side
is `generate` of transformers' InternVLForConditionalGeneration with fused attention; it needs the extra `parity`.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

import paired_runs

HERE = Path(__file__).parent
SIDES = {"ours": HERE / "decoding_ours.py", "torch": HERE / "decoding_torch.py"}

MOST_OTHER = 0.01
"""The largest share of tokens that differ: from a tie on, rows go their own ways."""


@dataclasses.dataclass(frozen=True)
class Timing:
  """What one process says of its answers.

  Attributes:
    tokens: of each row's answer.
    first: seconds of the first answers, which compile.
    short: seconds of answers of one token.
    long: seconds of answers of all tokens.
  """

  tokens: list[list[int]]
  first: float
  short: list[float]
  long: list[float]

  @property
  def prompts(self) -> float:
    """Seconds that prompts take."""
    return statistics.median(self.short)

  @property
  def each(self) -> float:
    """Seconds of each token after the first."""
    return (self.all - self.prompts) / (len(self.tokens[0]) - 1)

  @property
  def all(self) -> float:
    """Seconds of whole answers."""
    return statistics.median(self.long)


def run_side(side: str, folder: Path, rows: int, tokens: int, cores: int, repeats: int = 3) -> Timing:
  """Times one side, in a process on the first cores."""
  return Timing(**paired_runs.run(SIDES[side], folder, rows, tokens, repeats, cores=cores))


def compare(pairs: list[tuple[Timing, Timing]]) -> dict[str, float]:
  """Medians over pairs (ours, theirs), and the share of tokens that differ."""
  found = {}
  for name in ("prompts", "each", "all"):
    found[name] = statistics.median(getattr(a, name) / getattr(b, name) for a, b in pairs)
    found[f"ours_{name}"] = statistics.median(getattr(a, name) for a, _ in pairs)
    found[f"torch_{name}"] = statistics.median(getattr(b, name) for _, b in pairs)
  tokens = [
    pair
    for a, b in pairs
    for rows in zip(a.tokens, b.tokens, strict=True)
    for pair in zip(*rows, strict=True)
  ]
  found["other"] = sum(x != y for x, y in tokens) / len(tokens)
  found["first"] = statistics.median(a.first for a, _ in pairs)
  return found


def make(folder: Path, size: str) -> None:
  """Writes the model and the prompts, where they are not there yet."""
  paired_runs.make(SIDES["torch"], folder, size)


def main() -> int:
  """Prints a line for each number of rows; the exit code says whether tokens agree."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--folder", type=Path, default=Path("decoding_results"))
  parser.add_argument("--pairs", type=int, default=5)
  parser.add_argument("--tokens", type=int, default=256, help="of each answer")
  parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="answered at once, at most 8")
  parser.add_argument("--cores", type=int, default=2)
  parser.add_argument("--size", choices=["small", "toy"], default="small")
  arguments = parser.parse_args()
  folder = arguments.folder.absolute()
  make(folder, arguments.size)
  worst, results = 0.0, {}
  for rows in arguments.rows:
    pairs = paired_runs.in_turn(
      arguments.pairs, lambda side, rows=rows: run_side(side, folder, rows, arguments.tokens, arguments.cores)
    )
    results[rows] = found = compare(pairs)
    worst = max(worst, found["other"])
    print(
      f"{rows} row(s): {found['all']:.3f} of transformers' time: prompts {found['prompts']:.3f} "
      f"({found['ours_prompts']:.2f} s and {found['torch_prompts']:.2f} s), tokens {found['each']:.3f} "
      f"({rows / found['ours_each']:.0f} and {rows / found['torch_each']:.0f} a second); ours the first time, compiled, "
      f"{found['first']:.1f} s; {found['other']:.1%} of the tokens differ",
      flush=True,
    )
  (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
  return int(worst > MOST_OTHER)


if __name__ == "__main__":
  sys.exit(main())
