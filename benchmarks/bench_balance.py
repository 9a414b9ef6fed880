"""Measures how long devices wait for the slowest with packed rows as they come and with balanced ones, and planning.

  python benchmarks/bench_balance.py [--steps 128] [--sizes 2.5-1b 2.5-8b] [--shards 8 64 512] [--json out.json]
  python benchmarks/bench_balance.py --samples 1000000 [--shards 64] [--plain]

The first prints, for two mixtures, slowest over mean: what the slowest device of each step computes over what devices
compute on average, by FLOPs, when all of the model is trained. `padded` has the same for what devices run in fact: pools
of tiles are padded to the bucket that holds the fullest, and tiles and decoder each wait for their slowest. `x tiles,
pairs` has slowest over mean where the chip's speeds are others than rows are balanced for: tiles take so many times as
long as their FLOPs say, and attention's pairs. The mixtures:

  recorded   6,000 sizes of the recipes' data (tests/assets/packing_sizes.npz), shuffled anew for each epoch
  heavy      texts of log-normal length, some a whole row long, images of Pareto-distributed numbers of tiles, videos

The second times the planner on so many samples of the recorded sizes, balanced, and of that the balance alone; with
--plain also rows as they come. Each runs in a fresh process.
"""

import argparse
import dataclasses
import json
import multiprocessing
import pathlib
import resource
import time
from typing import Any

import numpy as np

import bench_data
from internvl_jax.aot import recipe
from internvl_jax.arguments import LoaderConfig, TrainingArguments
from internvl_jax.data.schedule import balance, packing
from internvl_jax.data.schedule.balance import Balance, RowCost
from internvl_jax.data.schedule.order import EpochOrder
from internvl_jax.data.schedule.packed_rows import RowStream
from internvl_jax.data.schedule.packed_steps import BalancedSteps, StepShape
from internvl_jax.data.schedule.schedule import make_schedule
from internvl_jax.data.schedule.shapes import tile_bucket
from internvl_jax.hf import published
from internvl_jax.open_model import open_shapes
from internvl_jax.setup.balance import run_row_cost
from internvl_jax.tasks import open_task

RECORDED = pathlib.Path(__file__).parents[1] / "tests" / "assets" / "packing_sizes.npz"
ROWS = packing.PackSettings(max_tokens=8192, max_tiles=40, over_long="drop")
WINDOW = LoaderConfig().balance_steps
SPEEDS = (2.0, 1.0), (0.5, 1.0), (1.0, 3.0), (1.0, 0.0)
"""How many times as long a chip takes for a tile, and for a pair of attention, as FLOPs say."""


def main() -> None:
  """Prints the table, and writes all numbers as JSON if asked to."""
  asked = arguments()
  print(bench_data.machine())
  result = time_planner(asked) if asked.samples else measure_balance(asked)
  if asked.json:
    pathlib.Path(asked.json).write_text(json.dumps({"machine": bench_data.machine(), **result}, indent=2))


def arguments() -> argparse.Namespace:
  """What the command line asks for."""
  parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
  parser.add_argument("--steps", type=int, default=128, help="steps of the largest number of devices")
  parser.add_argument("--sizes", nargs="+", default=["2.5-1b", "2.5-8b", "2.5-26b"], help="published sizes")
  parser.add_argument("--shards", nargs="+", type=int, default=[8, 64, 512], help="numbers of devices")
  parser.add_argument("--samples", type=int, default=0, help="time the planner on so many samples")
  parser.add_argument("--plain", action="store_true", help="with --samples: also plan rows as they come")
  parser.add_argument("--json", help="file for all numbers")
  return parser.parse_args()


def recorded() -> np.ndarray:
  """int64 [6000, 2]: tokens and tiles of the recorded samples."""
  return np.load(RECORDED)["sizes"].astype(np.int64)


def heavy(count: int = 20_000) -> np.ndarray:
  """int64 [count, 2]: two fifths are texts, 3 % videos of 8 to 30 frames, the others images of 1 to 13 tiles."""
  rng = np.random.default_rng(0)
  kinds = rng.choice(3, count, p=[0.4, 0.57, 0.03])
  tiles = np.select(
    [kinds == 0, kinds == 1], [0, np.minimum(1 + 2 * rng.pareto(1.0, count), 13)], rng.integers(8, 31, count)
  ).astype(np.int64)
  text = np.where(
    kinds == 0, np.exp(rng.normal(5.5, 1.3, count)), np.exp(rng.normal(4.5, 1.0, count))
  ).astype(np.int64)
  return np.stack([(256 * tiles + text).clip(8, ROWS.max_tokens), tiles], axis=1)


# --- Balance ------------------------------------------------------------------------------------------------


def measure_balance(asked: argparse.Namespace) -> dict[str, Any]:
  """Slowest over mean for every mixture, size and number of devices."""
  costs = {size: cost_of(size) for size in asked.sizes}
  count = asked.steps * max(asked.shards)
  print(f"slowest over mean over {count} rows, one of {ROWS.max_tokens} tokens a device and step:")
  speeds = "".join(f"{f'x {tiles:g},{pairs:g}':>9}" for tiles, pairs in SPEEDS)
  print(
    f"{'mixture':<10}{'model':<10}{'devices':>8}{'as they come':>14}{'balanced':>10}{'padded':>18}{speeds}"
  )
  found = []
  for name, sizes in (("recorded", recorded()), ("heavy", heavy())):
    rows, lengths = first_rows(sizes, count)
    fill = float(np.add.reduceat(rows[:, 0], np.cumsum(lengths) - lengths).mean() / ROWS.max_tokens)
    for size, cost in costs.items():
      for devices in asked.shards:
        one = {
          "mixture": name,
          "model": size,
          "devices": devices,
          "fill": fill,
          **compare(rows, lengths, cost, devices),
        }
        found.append(one)
        print(
          f"{name:<10}{size:<10}{devices:>8}{one['before']:>14.4f}{one['after']:>10.4f}"
          f"{one['padded_before']:>10.4f}{one['padded_after']:>8.4f}"
          + "".join(f"{each:>9.4f}" for each in one["speeds"])
        )
    print(f"{'':<10}{len(lengths)} rows, {100 * fill:.2f} % of their tokens are filled, balanced or not")
  return {"balance": found}


def cost_of(size: str) -> RowCost:
  """The cost of rows when all of a published size is trained."""
  config = recipe.get_config()
  config.model.model_name_or_path, config.data.strict_mode = published.hub_id(size), False
  source = open_shapes(config)
  return run_row_cost(config, source, open_task(config, source))


def first_rows(sizes: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
  """The first rows of a shuffled stream: their samples' sizes end to end, and how many samples each has."""
  stream = RowStream(EpochOrder(len(sizes), 0, shuffle=True), lambda indices: sizes[indices], ROWS)
  rows = [next(stream).indices for _ in range(count)]
  return sizes[np.concatenate(rows)], np.array([len(row) for row in rows])


def compare(sizes: np.ndarray, lengths: np.ndarray, cost: RowCost, shards: int) -> dict[str, Any]:
  """What `balance.waiting` gives, the same with pools and decoder each at their slowest, and at other speeds."""
  rows, sizes = len(lengths), sizes[: lengths.sum()]
  costs = cost.of_rows(sizes, lengths)
  tiles = np.add.reduceat(sizes[:, 1], np.cumsum(lengths) - lengths)
  before, after = balance.waiting(costs, shards, WINDOW)
  plain = np.arange(rows).reshape(-1, shards)
  assigned = np.concatenate(
    [
      start + balance.assign(costs[start : start + WINDOW * shards], 1, shards, shards)
      for start in range(0, rows, WINDOW * shards)
    ]
  )

  def padded(steps: np.ndarray) -> float:
    pools = sum(tile_bucket(int(most)) for most in tiles[steps].max(axis=1))
    decoder = int(costs[steps, 1].max(axis=1).sum())
    return (cost.per_tile * pools + decoder) * shards / int(costs.sum())

  def at(tiles: float, pairs: float) -> float:
    other = dataclasses.replace(
      cost, per_tile=round(tiles * cost.per_tile), per_pair=round(pairs * cost.per_pair)
    )
    return balance.slowest_over_mean(other.of_rows(sizes, lengths).sum(axis=1)[assigned], 1, shards)

  return {
    "before": before,
    "after": after,
    "padded_before": padded(plain),
    "padded_after": padded(assigned),
    "speeds": [at(*speed) for speed in SPEEDS],
  }


# --- Planning -----------------------------------------------------------------------------------------------


def time_planner(asked: argparse.Namespace) -> dict[str, Any]:
  """Times the planner on an epoch of so many samples, with rows as they come if that is asked for, and balanced."""
  samples, shards = asked.samples, asked.shards[0]
  result: dict[str, Any] = {"samples": samples, "devices": shards}
  for name, window in [("as they come", 0)] * asked.plain + [("balanced", WINDOW)]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
      result[name] = found = pool.apply(plan, (samples, shards, window))
    print(
      f"{name:<14}{1e6 * found['seconds'] / samples:>7.1f} s of CPU a million samples, {found['first_seconds']:.2f} s before "
      f"the first step, {found['balance_seconds']:.1f} s for balance, peak {found['peak_mb']:+.0f} MB"
    )
  return result


def plan(samples: int, shards: int, window: int) -> dict[str, float]:
  """Plans the steps of an epoch of the recorded sizes, over and over: seconds of CPU, and by how much memory peaked."""
  sizes = recorded()
  sizes = sizes[packing.PackSettings.fits(ROWS, *sizes.T)]
  settings = Balance(steps=window, cost=RowCost(per_tile=50 * balance.UNIT, per_pair=500)) if window else None
  rows = samples * 1373 // 5985  # What the recorded ones need, by docs/data.md.
  schedule = make_schedule(
    EpochOrder(samples, 0, shuffle=True),
    StepShape(accumulation=1, shards=shards, rows_per_shard=1),
    TrainingArguments(max_steps=rows // shards),
    lambda indices: sizes[indices % len(sizes)],
    ROWS,
    lambda indices: rows,
    settings,
  )
  schedule.order.places(0, 1)  # The shuffled order itself is not what is measured.
  added = count_seconds(BalancedSteps, "_assign")
  before, start = peak_mb(), time.process_time()
  cursor = schedule.cursor()
  cursor.next_rows()
  first = time.process_time() - start
  for _ in range(schedule.total_steps - 1):
    cursor.next_rows()
  return {
    "seconds": time.process_time() - start,
    "first_seconds": first,
    "balance_seconds": sum(added),
    "peak_mb": peak_mb() - before,
  }


def count_seconds(owner: type, name: str) -> list[float]:
  """Seconds of CPU of every call of a method from now on, appended to the list that is returned."""
  method, found = getattr(owner, name), []

  def timed(*args: Any) -> Any:
    start = time.process_time()
    try:
      return method(*args)
    finally:
      found.append(time.process_time() - start)

  setattr(owner, name, timed)
  return found


def peak_mb() -> float:
  """The most memory that this process ever had."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
  main()
