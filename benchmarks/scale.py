"""Simulates training on 8 to 4,096 chips: useful-token MFU, goodput, and where the rest of the time goes.

  python benchmarks/scale.py [--chips 8,64,512,4096] [--assume failures=1e-4,restart=1200] [--picture scale.png]
      [--page docs/scale_simulation.md] [--json scale_simulation.json]

A step is what the compiler made of it for each slice (benchmarks/scale_programs.json, by benchmarks/scale_programs.py), on
rows that are packed from recorded sizes. Slow chips, late hosts, save pauses, failures and restarts are drawn from
distributions. Everything assumed is printed first, and `--assume` changes it. Same seed, same numbers; seconds of one CPU
core.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from internvl_jax.arguments import LoaderConfig
from internvl_jax.data.schedule import balance
from scale_model import (
  DAY,
  Assumptions,
  Goodput,
  Program,
  Reliability,
  Rows,
  StepTime,
  assumed,
  changeable,
  fullest,
  packed_rows,
  programs,
  simulate,
  step_time,
)

REPOSITORY = Path(__file__).parents[1]
PROGRAMS = Path(__file__).with_name("scale_programs.json")
RECORDED = REPOSITORY / "tests" / "assets" / "packing_sizes.npz"
BEGIN, END = "<!-- benchmarks/scale.py: begin -->", "<!-- benchmarks/scale.py: end -->"
"""What is between them on a page is replaced."""

POOLS = ("padded to the budget", "as they come", "balanced")
"""How large pools of tiles are; the last is what all else supposes."""

GIB = 2**30
PARTS = {
  "useful": "tokens and tiles of the data",
  "recomputed": "recomputation, masked attention",
  "padding": "padding of pools",
  "below_peak": "chips below their peak",
  "exchanges": "exchanges that nothing hides",
  "waiting": "slow chips, late hosts",
  "saves": "pauses for saves",
  "lost": "failures: lost work, restarts",
}
"""Where the time of chips goes: what `StepTime` and `Goodput` call it, and readers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What is simulated.

  Attributes:
    steps: drawn for each slice.
    runs: drawn for each slice, of so many days.
    seed: of all that is drawn.
    days: see `runs`.
    epochs: of the recorded sizes, packed to draw rows from.
  """

  steps: int
  runs: int
  seed: int
  days: float = 30.0
  epochs: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
  """What steps on a slice compute.

  Attributes:
    program: of the slice.
    useful: FLOPs that a row needs on average.
    tiles: of a row on average.
    pools: tiles that each step computes, int64 [steps], by how large pools are (`POOLS`).
  """

  program: Program
  useful: float
  tiles: float
  pools: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """What was found for a slice.

  Attributes:
    program: of the slice.
    steps: mean steps, by how large pools are (`POOLS`).
    how: it saves and fails.
    interval: seconds of work between saves.
    run: where the time of runs goes.
  """

  program: Program
  steps: Mapping[str, StepTime]
  how: Reliability
  interval: float
  run: Goodput

  @property
  def step(self) -> StepTime:
    """The mean step with balanced rows."""
    return self.steps[POOLS[-1]]

  @property
  def effective(self) -> float:
    """The share of the peak, over all of a run's time, that goes to steps that count."""
    return self.step.mfu * self.run.goodput

  def shares(self) -> dict[str, float]:
    """Where the time of chips goes: shares that add up to 1."""
    step, run = dataclasses.asdict(self.step), dataclasses.asdict(self.run)
    inside = {part: run["goodput"] * step[part] / self.step.total for part in PARTS if part in step}
    return inside | {part: run[part] for part in PARTS if part in run}


def main() -> None:
  """Prints the report, and writes what is asked for."""
  asked = arguments()
  found = json.loads(Path(asked.programs).read_text())
  assumptions = asked_assumptions(asked.assume)
  settings = Settings(steps=asked.steps, runs=asked.runs, seed=asked.seed)
  chosen = asked_programs(programs(found), asked.chips)
  rows = recorded_rows(found["tokens"], chosen[0].tiles, settings)
  slices = [drawn_slice(program, rows, found["useful"], settings) for program in chosen]
  outcomes = [simulated(one, assumptions, settings) for one in slices]
  lines = [*preamble(found, rows, settings), "", *_assumed(assumptions), "", *_table(outcomes, rows), ""]
  lines += [*_parts(outcomes), "", *_sensitivity(slices[-1], assumptions, settings)]
  print("\n".join(lines))
  if asked.page:
    write_page(Path(asked.page), lines)
  if asked.picture:
    draw(outcomes, assumptions, settings, Path(asked.picture))
  if asked.json:
    Path(asked.json).write_text(json.dumps([dataclasses.asdict(one) for one in outcomes], indent=1) + "\n")


def arguments() -> argparse.Namespace:
  """What the command line asks for."""
  parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
  parser.add_argument("--chips", default="", help="numbers of chips; all that were compiled for, if empty")
  parser.add_argument("--assume", default="", help="assumptions to change: NAME=VALUE,...")
  window = LoaderConfig().balance_steps
  parser.add_argument("--steps", type=int, default=2 * window, help="drawn for each slice")
  parser.add_argument("--runs", type=int, default=16, help="of 30 days, drawn for each slice")
  parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
  parser.add_argument("--programs", default=str(PROGRAMS), help="what scale_programs.py wrote")
  parser.add_argument("--picture", help="file for the picture; needs matplotlib")
  parser.add_argument("--page", help="page to write the report into, between its markers")
  parser.add_argument("--json", help="file for all numbers")
  return parser.parse_args()


def asked_programs(compiled: Sequence[Program], chips: str) -> list[Program]:
  """The programs for so many chips, as CHIPS,..., or all."""
  wanted = [one.strip() for one in chips.split(",") if one.strip()]
  known = {str(one.chips): one for one in compiled}
  if missing := [one for one in wanted if one not in known]:
    raise SystemExit(f"--chips={chips}: not compiled for {missing[0]} chips, but for {', '.join(known)}")
  return [known[one] for one in wanted] or list(compiled)


def asked_assumptions(text: str) -> Assumptions:
  """The assumptions with NAME=VALUE,... in place of some."""
  try:
    pairs = [one.partition("=") for one in text.split(",") if one]
    return Assumptions().changed({name: float(value) for name, _, value in pairs})
  except ValueError as error:
    raise SystemExit(f"--assume={text}: {error}") from None


# --- Simulating ---------------------------------------------------------------------------------------------


def recorded_rows(tokens: int, tiles: int, settings: Settings) -> Rows:
  """Rows of the recorded sizes, of so many tokens and tiles at most."""
  sizes = np.load(RECORDED)["sizes"].astype(np.int64)
  return packed_rows(sizes, tokens, tiles, settings.epochs, np.random.default_rng(settings.seed))


def drawn_slice(program: Program, rows: Rows, useful: Mapping[str, float], settings: Settings) -> Slice:
  """Draws the rows of steps on a slice; `useful` has the FLOPs of a tile, a token and a pair."""
  rng = np.random.default_rng((settings.seed, program.chips))
  drawn = rng.integers(len(rows.tiles), size=(settings.steps, program.shards))
  tiles = rows.tiles[drawn]
  decoder = useful["per_token"] * rows.tokens[drawn] + useful["per_pair"] * rows.pairs[drawn]
  costs = np.stack([useful["per_tile"] * tiles, decoder], axis=-1)
  balanced = balanced_steps(np.round(costs / 1e6).astype(np.int64))
  pools = np.full(settings.steps, program.tiles), fullest(tiles), fullest(tiles.ravel()[balanced])
  return Slice(
    program=program,
    useful=rows.useful(useful),
    tiles=float(rows.tiles.mean()),
    pools=dict(zip(POOLS, pools, strict=True)),
  )


def balanced_steps(costs: np.ndarray) -> np.ndarray:
  """Assigns rows to steps of rows that cost the same, as a run does.

  Args:
    costs: int64 [steps, shards, 2] of the rows as they come, in the vision tower and in the decoder.

  Returns:
    int64 [steps, shards]: the places of the rows, counted through all steps.
  """
  steps, shards, _ = costs.shape
  window = LoaderConfig().balance_steps
  return np.concatenate(
    [
      start * shards + balance.even_steps(costs[start : start + window].reshape(-1, 2), shards)
      for start in range(0, steps, window)
    ]
  )


def simulated(what: Slice, assumptions: Assumptions, settings: Settings) -> Outcome:
  """The steps and the runs of a slice."""
  seed = settings.seed, what.program.chips
  # From the same seed: so the kinds of pools meet the same stragglers.
  steps = {
    kind: step_time(
      what.program, what.useful, what.tiles, pools, assumptions, np.random.default_rng((*seed, 1))
    )
    for kind, pools in what.pools.items()
  }
  how = Reliability.of(what.program, assumptions)
  interval = how.best_interval()
  run = simulate(how, interval, days=settings.days, runs=settings.runs, rng=np.random.default_rng((*seed, 2)))
  return Outcome(program=what.program, steps=steps, how=how, interval=interval, run=run)


# --- Words --------------------------------------------------------------------------------------------------


def preamble(found: Mapping[str, Any], rows: Rows, settings: Settings) -> list[str]:
  """What was compiled, and what was drawn."""
  filled, tiles = rows.tokens.mean() / found["tokens"], rows.tiles.mean()
  return [
    f"{found['size']}, all of it trained by AdamW in bfloat16, parameters and moments sharded over all chips (`fsdp`), all",
    f"layers recomputed, compiled by {found['compiler']}. A chip has one row of {found['tokens']:,} tokens, so a step's batch",
    f"grows with the slice. There are {len(rows.tokens):,} rows, packed from {settings.epochs} epochs of 6,000 recorded sizes;",
    f"they are filled to {filled:.2%} and have {tiles:.1f} tiles on average. For each slice {settings.steps} steps and",
    f"{settings.runs} runs of {settings.days:g} days are drawn, from seed {settings.seed}.",
  ]


def _assumed(assumptions: Assumptions) -> list[str]:
  lines = ["| assumption | value | of what |", "|---|---|---|"]
  return lines + [f"| `{name}` | {value} | {text} |" for name, value, text in assumed(assumptions)]


def _table(outcomes: Sequence[Outcome], rows: Rows) -> list[str]:
  """A line a slice: memory, the step, MFU and goodput."""
  heads = (
    "chips",
    "slice",
    "GiB a chip",
    "tokens a step",
    "step, s",
    "exchanges, s: all, not hidden",
    "waiting, s",
  )
  heads += (f"MFU, pools {POOLS[0]}", *POOLS[1:], "a save every", "its pause, s", "failures a day", "goodput")
  heads += ("MFU × goodput", "tokens/s")
  lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
  for one in outcomes:
    program, step, how = one.program, one.step, one.how
    tokens = float(rows.tokens.mean()) * program.shards
    cells = (
      *(f"{program.chips:,}", program.topology, f"{program.memory / GIB:.1f}", f"{tokens:,.0f}"),
      *(f"{step.total:.2f}", f"{step.exchanged:.2f}, {step.exchanges:.2f}", f"{step.waiting:.3f}"),
      *(f"{one.steps[kind].mfu:.1%}" for kind in POOLS),
      *(
        f"{one.interval / 60:.0f} min",
        f"{how.pause:.1f}",
        f"{DAY / how.between:.2g}",
        f"{one.run.goodput:.1%}",
      ),
      *(f"{one.effective:.1%}", f"{tokens / step.total * one.run.goodput:,.0f}"),
    )
    lines.append(f"| {' | '.join(cells)} |")
  return lines


def _parts(outcomes: Sequence[Outcome]) -> list[str]:
  """Where the time of chips goes, a column a slice."""
  shares = [one.shares() for one in outcomes]
  chips = " | ".join(f"{one.program.chips:,}" for one in outcomes)
  lines = [f"| share of the chips' time, of chips | {chips} |", "|---" * (1 + len(outcomes)) + "|"]
  for part, name in PARTS.items():
    lines.append(f"| {name} | {' | '.join(f'{share[part]:.1%}' for share in shares)} |")
  return lines


def _sensitivity(what: Slice, assumptions: Assumptions, settings: Settings) -> list[str]:
  """MFU × goodput of a slice where one assumption is half or twice as much; shares at most 1."""
  base = simulated(what, assumptions, settings).effective
  lines = [
    f"| MFU × goodput of {what.program.chips:,} chips: {base:.1%}; if | is halved | is doubled |",
    "|---|---|---|",
  ]
  for name, value, is_share in changeable(assumptions):
    cells = []
    for other in (value / 2, min(2 * value, 1.0) if is_share else 2 * value):
      found = simulated(what, assumptions.changed({name: other}), settings).effective
      cells.append(f"{other:g}: {found:.1%}")
    lines.append(f"| `{name}` | {' | '.join(cells)} |")
  return lines


def write_page(page: Path, lines: Sequence[str]) -> None:
  """Writes the report between the markers of a page."""
  before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
  _, end, after = rest.partition(END)
  if not (begin and end):
    raise SystemExit(f"--page={page}: has no lines {BEGIN} and {END}; add them where the tables belong")
  page.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}", encoding="utf-8")


# --- The picture --------------------------------------------------------------------------------------------


def draw(outcomes: Sequence[Outcome], assumptions: Assumptions, settings: Settings, path: Path) -> None:
  """Draws where the time of chips goes, and goodput by chips for several rates of failures."""
  import matplotlib as mpl

  mpl.use("Agg")
  from matplotlib import pyplot as plt

  figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), width_ratios=(7, 5), layout="constrained")
  _draw_shares(left, outcomes)
  _draw_goodput(right, outcomes, assumptions, settings)
  figure.savefig(path, dpi=90)
  plt.close(figure)


def _draw_shares(axes: Any, outcomes: Sequence[Outcome]) -> None:
  names = [f"{one.program.chips:,}" for one in outcomes]
  shares = [one.shares() for one in outcomes]
  colors = (
    "tab:green",
    "tab:olive",
    "tab:cyan",
    "lightgray",
    "tab:blue",
    "tab:purple",
    "tab:orange",
    "tab:red",
  )
  bottom = np.zeros(len(outcomes))
  for (part, name), color in zip(PARTS.items(), colors, strict=True):
    values = np.array([100 * share[part] for share in shares])
    axes.bar(names, values, bottom=bottom, label=name, color=color)
    bottom += values
  for place, share in enumerate(shares):
    axes.text(place, 50 * share["useful"], f"{share['useful']:.0%}", ha="center", va="center", color="white")
  axes.set_ylim(0, 100)
  axes.set_xlabel("chips")
  axes.set_ylabel("% of the chips' time")
  axes.set_title("where the time goes", fontsize=10)
  handles, labels = axes.get_legend_handles_labels()
  axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def _draw_goodput(
  axes: Any, outcomes: Sequence[Outcome], assumptions: Assumptions, settings: Settings
) -> None:
  for factor, style in ((0.1, ":"), (1.0, "-"), (10.0, "--")):
    rate = assumptions.failures * factor
    changed = assumptions.changed({"failures": rate})
    for hourly, color in ((False, "tab:blue"), (True, "tab:orange")):
      values = []
      for one in outcomes:
        how = Reliability.of(one.program, changed)
        interval = 3600.0 if hourly else how.best_interval()
        rng = np.random.default_rng((settings.seed, one.program.chips, 2))
        run = simulate(how, interval, days=settings.days, runs=settings.runs, rng=rng)
        values.append(100 * run.goodput)
      label = f"{rate:.0e} failures a chip-hour, saved {'hourly' if hourly else 'at the optimum'}"
      axes.plot([one.program.chips for one in outcomes], values, style, color=color, marker=".", label=label)
  axes.set_xscale("log", base=2)
  axes.set_xticks([one.program.chips for one in outcomes], [f"{one.program.chips:,}" for one in outcomes])
  axes.set_ylim(0, 100)
  axes.set_xlabel("chips")
  axes.set_ylabel("goodput, %")
  axes.grid(alpha=0.3)
  axes.set_title("steps that count, of all time", fontsize=10)
  axes.legend(loc="lower left", fontsize=8)


if __name__ == "__main__":
  main()
