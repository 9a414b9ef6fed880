"""Draws the rewards of runs of configs/quickstart_grpo.py, and how many held-out answers match.

  python scripts/quickstart_grpo_picture.py --runs quickstart/output_grpo --before quickstart/output_early \
    --picture quickstart/output_grpo/grpo.png
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from absl import app, flags

mpl.use("Agg")
from matplotlib import pyplot as plt

_RUNS = flags.DEFINE_list("runs", ["quickstart/output_grpo"], "Folders of the runs, one line each.")
_BEFORE = flags.DEFINE_string("before", "quickstart/output_early", "The run that they began with.")
_PICTURE = flags.DEFINE_string("picture", "quickstart/output_grpo/grpo.png", "File to write.")

SMOOTHED = 5  # logged steps of which the mean is drawn


def main(argv: Sequence[str]) -> None:
  """Writes the picture, and prints the accuracy before and after."""
  del argv
  before = _json(Path(_BEFORE.value) / "eval_results.json")["accuracy"]
  runs = [Path(run) for run in _RUNS.value]
  figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
  for run in runs:
    history = _json(run / "trainer_state.json")["log_history"]
    after = _json(run / "eval_results.json")["accuracy"]
    seconds = _json(run / "train_results.json")["train_runtime"]
    left.plot(*smoothed(points(history, "reward")), linewidth=1, label=run.name)
    steps, accuracies = points(history, "eval_accuracy")
    # The last score is that of the exported model.
    steps, accuracies = [0, *steps, history[-1]["step"]], [before, *accuracies, after]
    right.plot(steps, accuracies, marker=".", linewidth=1, label=run.name)
    print(f"{run}: {before:.4f} before, {after:.4f} after; {seconds:.0f} s")
  for axes, title in ((left, "mean reward of sampled answers"), (right, "held-out answers that match")):
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("optimizer step")
    axes.grid(alpha=0.3)
  if len(runs) > 1:
    right.legend(fontsize=8)
  figure.savefig(_PICTURE.value, dpi=90)


def points(history: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps and values of a metric."""
  found = [(entry["step"], entry[name]) for entry in history if name in entry]
  steps, values = np.array(found, float).reshape(-1, 2).T
  return steps, values


def smoothed(curve: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Means over as many logged steps as `SMOOTHED` says, or as there are."""
  steps, values = curve
  window = max(1, min(SMOOTHED, len(values)))
  kernel = np.full(window, 1 / window)
  return steps[window - 1 :], np.convolve(values, kernel, mode="valid") if len(values) else values


def _json(path: Path) -> Any:
  return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
  app.run(main)
