"""Draws what the quickstart's model answered, beside its loss curve.

python scripts/quickstart_picture.py --out quickstart
"""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from absl import app, flags
from PIL import Image

mpl.use("Agg")
from matplotlib import pyplot as plt

_OUT = flags.DEFINE_string("out", "quickstart", "Folder that the quickstart wrote to.")
_RUN = flags.DEFINE_string("run", None, "The run's folder; OUT/output if unset.")

ROWS, COLUMNS = 3, 4


def main(argv: Sequence[str]) -> None:
  """Writes predictions.png into the run's folder."""
  del argv
  data = Path(_OUT.value) / "data"
  run = Path(_RUN.value) if _RUN.value else Path(_OUT.value) / "output"
  history = json.loads((run / "trainer_state.json").read_text())["log_history"]
  results = json.loads((run / "eval_results.json").read_text())
  predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]

  figure = plt.figure(figsize=(13, 7), layout="constrained")
  left, right = figure.subfigures(1, 2, width_ratios=(5, 3))
  draw_answers(left, choose(predictions), data / "images")
  draw_loss(right, history)
  title = f"{results['num_questions']:,} held-out questions: {results['accuracy']:.1%} right"
  figure.suptitle(title, fontsize=14)
  path = run / "predictions.png"
  figure.savefig(path, dpi=90)
  print(f"{title}; picture in {path}")


def choose(predictions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Questions for the picture, drawn at random (not the best ones), all types in turn."""
  by_type: dict[str, list[dict[str, Any]]] = {}
  order = np.random.default_rng(0).permutation(len(predictions))
  for i in order:
    by_type.setdefault(predictions[i]["type"], []).append(predictions[i])
  types = sorted(by_type)
  return [by_type[types[i % len(types)]][i // len(types)] for i in range(ROWS * COLUMNS)]


def draw_answers(figure: Any, predictions: Sequence[dict[str, Any]], images: Path) -> None:
  """A grid of images, each with its question, the right answer and the model's."""
  for axes, prediction in zip(figure.subplots(ROWS, COLUMNS).flat, predictions, strict=True):
    axes.imshow(Image.open(images / prediction["image"]))
    axes.set_xticks([])
    axes.set_yticks([])
    question = prediction["conversations"][-2]["value"].removeprefix("<image>\n")
    axes.set_title(textwrap.fill(question, 24), fontsize=9)
    color = "tab:green" if prediction["correct"] else "tab:red"
    wrong = "" if prediction["correct"] else f" (right: {prediction['answer']})"
    axes.set_xlabel(f"{prediction['prediction']}{wrong}", color=color, fontsize=10)


def draw_loss(figure: Any, history: Sequence[dict[str, Any]]) -> None:
  """The training loss by step."""
  axes = figure.subplots()
  points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
  axes.plot(*zip(*points, strict=True), linewidth=1)
  axes.set_yscale("log")
  axes.set_xlabel("optimizer step")
  axes.set_ylabel("cross-entropy of the answer")
  axes.grid(alpha=0.3)
  axes.set_title("training loss", fontsize=10)


if __name__ == "__main__":
  app.run(main)
