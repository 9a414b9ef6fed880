"""Shown samples as a table, for trackers that have tables with pictures."""

import io
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from internvl_jax.eval.shown import Shown


def shown_table(
  shown: Sequence[Shown], as_image: Callable[[Image.Image], Any], *, blank: Any = None
) -> tuple[list[str], list[list[Any]]]:
  """The columns and the rows of a table: pictures, question, answer, prediction and each score.

  Args:
    shown: the samples, a row each.
    as_image: makes the tracker's own image of a picture.
    blank: stands where a sample has fewer pictures than others.

  Returns:
    Names of the columns, and the rows.
  """
  pictures = max((len(sample.pictures) for sample in shown), default=0)
  scores = list(dict.fromkeys(name for sample in shown for name in sample.scores))
  places = [f"picture {i + 1}" if i else "picture" for i in range(pictures)]
  rows: list[list[Any]] = []
  for sample in shown:
    images = [as_image(Image.open(io.BytesIO(picture.content))) for picture in sample.pictures]
    wanted = sample.answer if isinstance(sample.answer, str) else " | ".join(sample.answer)
    texts = [sample.question, wanted, sample.prediction]
    empty = [blank] * (pictures - len(images))
    rows.append([*images, *empty, *texts, *(sample.scores.get(name) for name in scores)])
  return [*places, "question", "answer", "prediction", *scores], rows
