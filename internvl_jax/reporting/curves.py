"""Curves of a run: series of its log with few enough points to be drawn, in groups that share an axis."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from internvl_jax.reporting.run_files import Series

MOST_POINTS = 500
"""Points of a curve; what is between them is drawn as a band from the least to the greatest."""

_CHARTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
  ("Loss", "", ("train/loss",)),
  ("Learning rate", "", ("train/learning_rate",)),
  ("Gradient norm", "", ("train/grad_norm",)),
  ("MFU", "%", ("train/mfu",)),
  ("Supervised tokens", "/s", ("train/supervised_tokens_per_second",)),
  ("Tiles", "/s", ("train/tiles_per_second",)),
  (
    "Time of a step",
    "s",
    ("train/seconds_per_step", "train/compute_seconds_per_step", "train/data_seconds_per_step"),
  ),
  ("Steps skipped between entries", "", ("train/skipped_steps",)),
)
"""Title, unit and series of the charts that all runs may have; those without values are left out."""

_NAMES = {
  "train/seconds_per_step": "whole",
  "train/compute_seconds_per_step": "computing",
  "train/data_seconds_per_step": "waiting for data",
}

_TERMS = ("rewards", "logps", "losses")
"""Names of a task's own metrics begin so; what stands before the slash of other scores is the set."""

_NOT_DRAWN = {"train/epoch", "eval/epoch", "train/peak_memory_bytes", "train/save_pause_seconds"}


def charts(series: Mapping[str, Series]) -> list[dict[str, Any]]:
  """The charts of a run, as JSON values: first the usual ones, then the scores, then the task's own metrics."""
  found = []
  for title, unit, names in _CHARTS:
    if members := [name for name in names if name in series]:
      found.append(_chart(title, unit, {_NAMES.get(name, title): series[name] for name in members}))
  scores: dict[str, dict[str, Series]] = {}
  for name in sorted(series):
    if name.startswith("eval/") and name not in _NOT_DRAWN:
      metric, of = _score(name.removeprefix("eval/"))
      scores.setdefault(metric, {})[of] = series[name]
  found += [_chart(f"Held out: {metric.replace('_', ' ')}", "", of) for metric, of in scores.items()]
  usual = {name for _, _, names in _CHARTS for name in names} | _NOT_DRAWN
  terms = sorted(name for name in series if name.startswith("train/") and name not in usual)
  return found + [_chart(name.removeprefix("train/"), "", {name: series[name]}) for name in terms]


def _score(name: str) -> tuple[str, str]:
  """What a score measures, and of what: "anls" of "docvqa/anls" is docvqa's, "accuracy_cats" that of a group."""
  if name.endswith("_change"):
    metric, of = _score(name.removesuffix("_change"))
    return f"{metric}, change since the start", of
  of, _, metric = name.rpartition("/")
  if not of and metric.startswith("accuracy"):
    return "accuracy", metric.removeprefix("accuracy").removeprefix("_") or "all"
  return (metric, of) if of and of not in _TERMS else (name, name)


def _chart(title: str, unit: str, members: Mapping[str, Series]) -> dict[str, Any]:
  scale = 100.0 if unit == "%" else 1.0
  curves = [{"name": name, **decimated(one, scale)} for name, one in members.items()]
  return {"title": title, "unit": unit, "curves": curves}


def decimated(series: Series, scale: float = 1.0, most: int = MOST_POINTS) -> dict[str, Any]:
  """The points of a curve; where there are more than `most`, means of equal parts of the steps with their extremes.

  Returns:
    `x` and `y`; `low` and `high` where there were more points than are drawn; `last`, the last value as it is. Values
    that are not finite are left out.
  """
  steps, values = np.frombuffer(series.steps, np.int64), np.frombuffer(series.values, np.float64) * scale
  finite = np.isfinite(values)
  steps, values = steps[finite], values[finite]
  if len(steps) <= most:
    return {"x": steps.tolist(), "y": _short(values), "last": _last(values)}
  edges = np.linspace(steps[0], steps[-1], most, endpoint=False)
  starts = np.unique(np.searchsorted(steps, edges))
  counts = np.diff([*starts, len(steps)])
  return {
    "x": (np.add.reduceat(steps, starts) // counts).tolist(),
    "y": _short(np.add.reduceat(values, starts) / counts),
    "low": _short(np.minimum.reduceat(values, starts)),
    "high": _short(np.maximum.reduceat(values, starts)),
    "last": _last(values),
  }


def _short(values: np.ndarray) -> list[float]:
  """Six digits: more cannot be seen."""
  return [float(f"{value:.6g}") for value in values.tolist()]


def _last(values: np.ndarray) -> float | None:
  return float(values[-1]) if len(values) and math.isfinite(values[-1]) else None
