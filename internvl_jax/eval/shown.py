"""Samples that are shown at every evaluation: question, pictures, wanted answer, prediction and scores.

OUTPUT_DIR/evaluations/<step>/<set>.jsonl     a line each
OUTPUT_DIR/evaluations/pictures/<sha16>.jpg   their pictures, each once
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from PIL import Image

from internvl_jax.data.sample.placeholders import VIDEO_PLACEHOLDER
from internvl_jax.data.sample.tokenize import IMAGE_PLACEHOLDER
from internvl_jax.errors import redacted_json
from internvl_jax.outputs import EVALUATIONS
from internvl_jax.storage.paths import AnyPath, write_whole

SIDE = 448
"""Pixels of a shown picture's longer side, at most."""

MOST_PICTURES = 8
"""Pictures of a sample that are shown: its first images, or so many frames of its video."""

_QUALITY = 85
_PICTURES = "pictures"


class _Spool:
  """Files' contents by their names, each once, in one file of this machine that has no name and ends with the process.

  Of a large set that is shown whole, all pictures together would not fit into memory.
  """

  def __init__(self):
    """Opens nothing yet."""
    self._begin()

  def _begin(self) -> None:
    self._file: IO[bytes] | None = None
    self._places: dict[str, tuple[int, int]] = {}
    self._process, self._end = os.getpid(), 0

  def put(self, name: str, content: bytes) -> None:
    """Keeps a content, unless it is there."""
    if self._process != os.getpid():  # A fork writes to a file of its own.
      self._begin()
    if name in self._places:
      return
    self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115 - it stays open.
    os.pwrite(self._file.fileno(), content, self._end)
    self._places[name] = self._end, len(content)
    self._end += len(content)

  def get(self, name: str) -> bytes:
    """The content of a name that was put."""
    assert self._file is not None
    start, length = self._places[name]
    return os.pread(self._file.fileno(), length, start)


_SPOOL = _Spool()


@dataclasses.dataclass(frozen=True)
class Picture:
  """A picture as a JPEG of at most `SIDE` pixels a side, kept on disk.

  Attributes:
    name: its file's path from the folder of evaluations: pictures/<sha16>.jpg, by its content.
  """

  name: str

  @classmethod
  def of(cls, image: Image.Image | np.ndarray) -> "Picture":
    """Makes one of an RGB image of any size: Pillow's, or uint8 [height, width, 3]."""
    small = Image.fromarray(image) if isinstance(image, np.ndarray) else image.copy()
    small.thumbnail((SIDE, SIDE))
    small.save(content := io.BytesIO(), "JPEG", quality=_QUALITY)
    name = f"{_PICTURES}/{hashlib.sha256(content.getvalue()).hexdigest()[:16]}.jpg"
    _SPOOL.put(name, content.getvalue())
    return cls(name)

  @property
  def content(self) -> bytes:
    """The file's bytes."""
    return _SPOOL.get(self.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
  """A sample of a held-out set, and what the model answered.

  Attributes:
    question: its text, without the marks of images.
    answer: what is wanted: a text, or several of which each is right.
    prediction: what the model answered; empty where nothing was generated.
    scores: by metric.
    pictures: its images, or frames of its video.
  """

  question: str
  answer: str | list[str]
  prediction: str
  scores: dict[str, float]
  pictures: tuple[Picture, ...] = ()

  def as_json(self) -> dict[str, Any]:
    """A line of <set>.jsonl; pictures are the paths of their files from the folder of evaluations."""
    return {
      "question": self.question,
      "answer": self.answer,
      "prediction": self.prediction,
      "scores": self.scores,
      "pictures": [picture.name for picture in self.pictures],
    }


class ShownFiles:
  """The files of shown samples in a run's output directory, a folder or in a bucket."""

  def __init__(self, output_dir: AnyPath):
    """Names the folder; nothing is made before there is something to write."""
    self._folder = output_dir / EVALUATIONS

  def write(self, step: int, set_name: str, shown: Sequence[Shown]) -> None:
    """Writes <step>/<set>.jsonl, after those of its pictures that are not there yet.

    Args:
      step: steps that the model has taken.
      set_name: of the held-out set.
      shown: its samples.
    """
    pictures = {picture.name: picture for sample in shown for picture in sample.pictures}
    for name in sorted(pictures.keys() - self._present):
      write_whole(self._folder / name, pictures[name].content)
      self._present.add(name)
    folder = self._folder / str(step)
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(redacted_json(sample.as_json()), ensure_ascii=False) + "\n" for sample in shown)
    write_whole(folder / f"{set_name}.jsonl", "".join(lines).encode())

  @functools.cached_property
  def _present(self) -> set[str]:
    """Names of the pictures that are there, of starts before this one, too."""
    folder = self._folder / _PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    return {f"{_PICTURES}/{path.name}" for path in folder.glob("*.jpg")}


def without_marks(text: str) -> str:
  """A question as it is read by people: without the marks of images and videos."""
  for mark in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER):
    text = text.replace(mark, "")
  return text.strip()


def chosen_lines(count: int, show: int, seed: int) -> frozenset[int]:
  """The numbers of the samples of a set of `count` that are shown: `show` drawn by the seed; all where it is negative."""
  if show < 0 or show >= count:
    return frozenset(range(count))
  return frozenset(np.random.default_rng(seed).choice(count, show, replace=False).tolist())
