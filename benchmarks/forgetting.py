"""Measures what a model forgets when it learns something new, and what averages and anchors keep of it.

  python scripts/quickstart_data.py --out quickstart
  python benchmarks/forgetting.py --data quickstart --out forgetting [--seeds 3] [--picture forgetting.png]
  python benchmarks/forgetting.py --data quickstart --out forgetting --toy

The start is the quickstart's model, which has learned all of easy-VQA. Then it learns from questions about colors alone, without one
about a shape. What it knows of both is compared for each way in WAYS:

  plain      the last weights
  ema        the moving average of the weights (training.optim_args=ema_decay=...)
  l2         decay towards the start (training.l2_to_start)
  weights    interpolation of start and plain (convert --interpolate), by the weight of plain

The settings of each way are chosen on one half of the held-out images, and what is reported is of the other half. Runs that are
there already are not made again; --seeds fine-tunes so many times from the one start. Prints a table and writes
OUT/forgetting.json.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bench_data
from internvl_jax import api
from internvl_jax.arguments import EvalConfig
from internvl_jax.config import TrainConfig
from internvl_jax.conversion import interpolate
from internvl_jax.hf.model_config import layout_named
from internvl_jax.sweep import models_in, score_models

REPOSITORY = Path(__file__).parents[1]
NEW, OLD = ("color", "yes_no_color"), ("shape", "yes_no_shape")
"""Types of questions: those that are trained on alone, and the others."""

START_STEPS, STEPS, RATE = 3000, 400, 2e-3
"""Steps on all questions, and on those about colors, the latter with their peak learning rate."""

MOST_LOST = 0.01
"""Of the best accuracy on what is new, what a way may lose."""

WAYS: dict[str, dict[str, str | float]] = {
  "plain": {},
  "ema 0.99": {"optim_args": "ema_decay=0.99"},
  "ema 0.995": {"optim_args": "ema_decay=0.995"},
  "l2 10": {"l2_to_start": 10.0},
  "l2 30": {"l2_to_start": 30.0},
  "l2 100": {"l2_to_start": 100.0},
}
"""Name -> settings of `training`."""

WEIGHTS = tuple(round(0.1 * i, 1) for i in range(1, 11))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """Where the data are and the results go, and how much is done.

  Attributes:
    data: what scripts/quickstart_data.py wrote.
    out: folder of the results.
    start_steps, steps: lengths of both trainings.
    ways: names of WAYS.
    weights: of the interpolation.
    limit: questions of a set; None: all.
  """

  data: Path
  out: Path
  start_steps: int = START_STEPS
  steps: int = STEPS
  ways: tuple[str, ...] = tuple(WAYS)
  weights: tuple[float, ...] = WEIGHTS
  limit: int | None = None


KINDS = {
  "plain": ("last weights", "s"),
  "ema": ("moving average, by decay", "^"),
  "l2": ("decay to the start, by strength", "D"),
  "weight": ("interpolated with the start, by weight", "o"),
}
"""First word of a way -> its label and marker."""


def main() -> None:
  """Trains, scores, prints and writes."""
  asked = arguments()
  experiment = Experiment(data=asked.data.absolute(), out=asked.out.absolute())
  if asked.toy:
    experiment = dataclasses.replace(
      experiment,
      start_steps=2,
      steps=2,
      ways=("plain", "l2 30"),
      weights=(0.0, 0.5, 1.0),
      limit=8,
    )
  write_data(experiment)
  begin(experiment)
  begun = accuracies(experiment.out / "start")
  scores = [scores_of_seed(experiment, seed) for seed in range(asked.seeds)]
  found = compare(begun, scores)
  result = {"machine": bench_data.machine(), "start": begun, "scores": scores, "ways": found}
  (experiment.out / "forgetting.json").write_text(json.dumps(result, indent=2) + "\n")
  print(table(begun, found))
  if asked.picture:
    draw(begun, found, asked.picture)


def arguments() -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data", type=Path, required=True, help="Folder of scripts/quickstart_data.py.")
  parser.add_argument("--out", type=Path, required=True, help="Folder of the results.")
  parser.add_argument("--seeds", type=int, default=3, help="Fine-tunings from the one start.")
  parser.add_argument("--picture", type=Path, help="Draw this file.")
  parser.add_argument("--toy", action="store_true", help="Two steps of everything: whether it runs.")
  return parser.parse_args()


# --- Data and runs ------------------------------------------------------------------------------------------


def write_data(experiment: Experiment) -> None:
  """Writes a meta file for each training, and the held-out sets: each kind of question, in halves by image."""
  source, folder = experiment.data / "data", experiment.out / "data"
  folder.mkdir(parents=True, exist_ok=True)
  meta = json.loads((source / "meta.json").read_text())
  entries = {
    kind: {**entry, "root": str(source / entry["root"]), "annotation": str(source / entry["annotation"])}
    for kind, entry in meta.items()
  }
  for name, kinds in (("start", OLD + NEW), ("colors", NEW)):
    (folder / f"{name}.json").write_text(json.dumps({kind: entries[kind] for kind in kinds}, indent=2) + "\n")
  lines = [json.loads(line) for line in (source / "test.jsonl").read_text().splitlines()]
  for name, chosen in halves(lines).items():
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chosen))


def halves(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
  """The held-out questions by set: those of even images, by which settings are chosen, and the others."""
  found: dict[str, list[Mapping[str, Any]]] = {
    f"{name}{half}": [] for name in ("new", "old") for half in ("", "-chosen-by")
  }
  for line in lines:
    is_even = int(Path(line["image"]).stem) % 2 == 0
    found[("new" if line["type"] in NEW else "old") + ("-chosen-by" if is_even else "")].append(line)
  return found


def sets(experiment: Experiment) -> str:
  """The held-out sets, as `eval.annotation` takes them."""
  folder, root = experiment.out / "data", str(experiment.data / "data" / "images")
  names = halves(()).keys()
  return json.dumps({name: {"annotation": str(folder / f"{name}.jsonl"), "root": root} for name in names})


def configured(experiment: Experiment, folder: Path, seed: int) -> TrainConfig:
  """The quickstart's recipe, for a run that leaves its model in a folder."""
  config = api.load_config(f"{REPOSITORY}/configs/quickstart.py:{experiment.data}")
  config.training.output_dir = str(folder)
  config.training.seed = seed
  config.training.save_strategy = "no"
  config.training.report_to = "none"
  config.training.disable_tqdm = True
  config.eval.annotation = sets(experiment)
  config.eval.group_field = None
  config.eval.limit = experiment.limit
  return config


def train(config: TrainConfig) -> None:
  """Trains, unless the model is there and scored."""
  folder = Path(config.training.output_dir or "")
  if not (folder / "eval_results.json").exists():
    config.training.overwrite_output_dir = folder.exists()
    api.train(config)


def begin(experiment: Experiment) -> None:
  """Trains the start."""
  config = configured(experiment, experiment.out / "start", seed=42)
  config.data.meta_path = str(experiment.out / "data" / "start.json")
  config.training.max_steps = experiment.start_steps
  train(config)


def fine_tune(experiment: Experiment, way: str, seed: int) -> Path:
  """Learns colors from the start in one way; returns the folder of the model."""
  folder = experiment.out / f"seed{seed}" / way.replace(" ", "_")
  config = configured(experiment, folder, seed)
  config.model.model_name_or_path = str(experiment.out / "start")
  config.runtime.random_init = False
  config.data.meta_path = str(experiment.out / "data" / "colors.json")
  config.training.max_steps = experiment.steps
  config.training.learning_rate = RATE
  config.training.eval_on_start = way == "plain"
  for name, value in WAYS[way].items():
    setattr(config.training, name, value)
  train(config)
  return folder


def scores_of_seed(experiment: Experiment, seed: int) -> dict[str, dict[str, float]]:
  """Accuracy on each held-out set, by way; interpolations are "weight 0.1" ..."""
  folders = {way: fine_tune(experiment, way, seed) for way in experiment.ways}
  found = {way: accuracies(folder) for way, folder in folders.items()}
  sweep = experiment.out / f"seed{seed}" / "sweep"
  if not (sweep / "sweep_results.json").exists():
    begun = str(experiment.out / "start")
    interpolate(str(folders["plain"]), begun, sweep, layout_named("internvl"), experiment.weights)
    asked = EvalConfig(annotation=sets(experiment), batch_size=256, max_new_tokens=2, limit=experiment.limit)
    score_models(models_in(sweep), asked, sweep)
  return found | {f"weight {weight}": accuracies(sweep / f"{weight:g}") for weight in experiment.weights}


def accuracies(folder: Path) -> dict[str, float]:
  """The accuracy on each set, of a model that is scored."""
  results = json.loads((folder / "eval_results.json").read_text())
  return {name: results[name]["accuracy"] for name in halves(())}


# --- Results ------------------------------------------------------------------------------------------------


def compare(
  begun: Mapping[str, float], scores: Sequence[Mapping[str, Mapping[str, float]]]
) -> list[dict[str, Any]]:
  """Means over the seeds for every way, and which setting of each kind is chosen.

  Chosen is the one with the best accuracy on what is old among those that lose at most MOST_LOST of the best on what is new,
  or where there is none, the best on what is new: all by the half of the questions that nothing is reported of.

  Args:
    begun: accuracy of the start on each set.
    scores: of each seed, by way and set.

  Returns:
    A row for each way: `new`, `old`, the share `kept` of the start's accuracy on what is old, what is `lost` of the best
    accuracy on what is new, `by_seed` pairs of new and old, and whether it is `chosen`.
  """
  ways = list(scores[0])
  mean = {way: {name: _mean([seed[way][name] for seed in scores]) for name in begun} for way in ways}
  best, best_chosen_by = (max(mean[way][name] for way in ways) for name in ("new", "new-chosen-by"))
  chosen = set()
  for kind in dict.fromkeys(map(_kind, ways)):
    own = [way for way in ways if _kind(way) == kind]
    good = [way for way in own if mean[way]["new-chosen-by"] >= best_chosen_by - MOST_LOST]
    by = "old-chosen-by" if good else "new-chosen-by"
    chosen.add(max(good or own, key=lambda way: mean[way][by]))
  return [
    {
      "way": way,
      "new": mean[way]["new"],
      "old": mean[way]["old"],
      "kept": mean[way]["old"] / begun["old"] if begun["old"] else 0.0,
      "lost": best - mean[way]["new"],
      "by_seed": [(seed[way]["new"], seed[way]["old"]) for seed in scores],
      "chosen": way in chosen,
    }
    for way in ways
  ]


def _mean(values: Sequence[float]) -> float:
  return sum(values) / len(values)


def _kind(way: str) -> str:
  return way.partition(" ")[0]


def table(begun: Mapping[str, float], found: Sequence[Mapping[str, Any]]) -> str:
  """The rows of `compare` as a table in Markdown."""
  lines = ["| way | new | old | kept of old | points below the best of new |", "|---|---|---|---|---|"]
  lines.append(f"| start | {begun['new']:.4f} | {begun['old']:.4f} | 100.0 % | |")
  for row in found:
    name = f"**{row['way']}**" if row["chosen"] else row["way"]
    lines.append(
      f"| {name} | {row['new']:.4f} | {row['old']:.4f} | {100 * row['kept']:.1f} % | {100 * row['lost']:.2f} |"
    )
  return "\n".join(lines)


def draw(begun: Mapping[str, float], found: Sequence[Mapping[str, Any]], path: Path) -> None:
  """Accuracy on what is old against that on what is new."""
  import matplotlib as mpl

  mpl.use("Agg")
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
  best = max(row["new"] for row in found)
  axes.axhspan(0.95 * begun["old"], 1.0, xmin=0, color="tab:green", alpha=0.08)
  axes.axvspan(best - MOST_LOST, 1.0, color="tab:green", alpha=0.08)
  for kind, (label, marker) in KINDS.items():
    rows = [row for row in found if _kind(row["way"]) == kind]
    line = "-" if kind == "weight" else ":"
    (drawn,) = axes.plot(
      [row["new"] for row in rows], [row["old"] for row in rows], line + marker, label=label
    )
    for row in rows:
      if kind != "plain":
        text = row["way"].partition(" ")[2]
        axes.annotate(
          text,
          (row["new"], row["old"]),
          (4, 4),
          textcoords="offset points",
          fontsize=7,
          color=drawn.get_color(),
        )
      if row["chosen"]:
        axes.plot(row["new"], row["old"], marker, markersize=13, fillstyle="none", color=drawn.get_color())
  axes.set_xlabel("accuracy on colors (new)")
  axes.set_ylabel("accuracy on shapes (old)")
  axes.grid(alpha=0.3)
  axes.legend(loc="lower left", fontsize=8)
  figure.savefig(path, dpi=90)


if __name__ == "__main__":
  main()
