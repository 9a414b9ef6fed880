"""What the samples of a mixture depend on, for those who keep something computed from each of them."""

import hashlib
import json
from typing import Any, NamedTuple

from internvl_jax.data.mixture import Dataset, Mixture

# Changes whenever the same data would become other samples.
_VERSION = 2


def preference_fingerprint(mixture: Mixture) -> str:
  """Returns a SHA-256, in hex, of all that the pairs and their order in the mixture depend on.

  These are the entries of the meta file, the bytes of the annotation files (read once more, whole), the tokenizer and
  the template, all settings of images, videos and lengths, and the seed that says how many frames a video gives. Not
  the images themselves: one that is replaced under its name goes unseen, as it does by the index of sizes. Copies of
  the annotation files elsewhere, or written again, have the same; `root` counts by its absolute path.

  Args:
    mixture: of the pairs; their sizes need not be indexed.

  Raises:
    DataError: an annotation file cannot be read.
  """
  content = {
    "version": _VERSION,
    "preference": mixture.preference,
    "pixels": [mixture.data.pad2square, mixture.data.normalize_type],
    "datasets": [_content(dataset) for dataset in mixture.datasets],
  }
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _content(dataset: Dataset) -> dict[str, Any]:
  spec = dataset.spec
  return {
    "name": spec.name,
    "repeat_time": spec.repeat_time,
    "data_augment": spec.data_augment,
    "annotation": dataset.file.digest(),
    "limits": list(dataset.limits),
    "sizes": dataset.key(),
  }


class Varying(NamedTuple):
  """A dataset whose samples are not the same every time.

  Attributes:
    dataset: its name.
    cause: why, and what to change.
  """

  dataset: str
  cause: str


def first_varying(mixture: Mixture) -> Varying | None:
  """Returns the first dataset of which a sample may differ between epochs; None if every sample is always the same.

  What was computed from a sample of such a dataset, a reference policy's log-probabilities say, holds for one epoch.
  An annotation file is searched for videos, but only lines that may have one are parsed.
  """
  for dataset in mixture.datasets:
    name = dataset.spec.name
    if dataset.spec.data_augment:
      cause = "data_augment re-encodes its images at a random quality; set it to false in the meta file"
      return Varying(name, cause)
    if line := dataset.first_video():
      return Varying(name, f"the frames of its videos are drawn anew in every epoch, from {line} on")
  return None
