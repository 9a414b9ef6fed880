"""Overlap of boxes, of answers such as `<box>[[x1, y1, x2, y2]]</box>`."""

import re
from collections.abc import Sequence

import numpy as np

from internvl_jax.eval.metrics.answered import Answered

SCALE = 1000
"""Coordinates in texts are parts per thousand of the image's width and height."""

ENOUGH = 0.5
"""A box is found where the overlap is at least so much."""

_BOX = re.compile(r"\[*\[(.*?),(.*?),(.*?),(.*?)\]\]*")
_NO_BOX = np.zeros(4, np.float32)


def iou(answered: Sequence[Answered]) -> list[float]:
  """Intersection over union of the first box that the model names and the wanted one; 0 where it names none.

  The wanted box is the line's `bbox` in pixels, with its `width` and `height`, or else the first one in the wanted answer.
  """
  return [_overlap(*_boxes(one)) for one in answered]


def iou_accuracy(answered: Sequence[Answered]) -> list[float]:
  """1 where the IoU is at least 0.5, as the reference scores RefCOCO (eval/refcoco/evaluate_grounding.py)."""
  return [float(value >= ENOUGH) for value in iou(answered)]


def _boxes(one: Answered) -> tuple[np.ndarray, np.ndarray]:
  """The model's box and the wanted one, both in pixels or both in parts."""
  given, box, sides = _box_in(one.prediction), one.record.get("bbox"), _sides(one)
  if box is None or sides is None:
    return given, _box_in(one.answers[0])
  return given * np.tile(sides, 2), np.asarray(box, np.float32)


def _sides(one: Answered) -> np.ndarray | None:
  sides = [one.record.get(name) for name in ("width", "height")]
  return None if None in sides else np.asarray(sides, np.float32)


def _box_in(text: str) -> np.ndarray:
  """The first box of a text, in parts of the image; what adds up to less than 4 is in such parts already."""
  found = _BOX.search(text)
  try:
    box = np.array([float(side) for side in found.groups()] if found else _NO_BOX, np.float32)
  except ValueError:
    return _NO_BOX
  return box / np.float32(SCALE) if box.sum() >= 4 else box


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
  sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
  common = np.prod(sides)
  union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - common
  return float(common / union) if union else 0.0
