"""What a run would make of the data, dataset by dataset, from the sizes of all samples."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from internvl_jax.data import batching
from internvl_jax.data.errors import DataError
from internvl_jax.data.mixture import Dataset, Mixture
from internvl_jax.data.pieces import UNSUPERVISED
from internvl_jax.data.workers import map_items

# Lines decoded by a worker at a time.
_GROUP = 64
# Lines named of each kind of loss.
_NAMED = 5


class DatasetReport(NamedTuple):
  """What becomes of a dataset's lines.

  Attributes:
    name: of the dataset.
    lines: that are used.
    samples: of an epoch, repeats and pieces included.
    unreadable: lines that cannot be read.
    over_long: lines that are too long and cannot be shortened.
    masked: lines that supervise no token, or none that the limits leave.
    shortened: lines that lose a part: their end, a piece without supervision, or tiles.
    split: lines that stand in rows in several pieces.
    tokens, tiles: int [readable lines], of each line before it is shortened.
    examples: for some of the lines that are lost, why.
  """

  name: str
  lines: int
  samples: int
  unreadable: int
  over_long: int
  masked: int
  shortened: int
  split: int
  tokens: np.ndarray
  tiles: np.ndarray
  examples: list[str]

  @property
  def lost(self) -> int:
    """Lines that the run would not learn from."""
    return self.unreadable + self.over_long + self.masked


def examine(mixture: Mixture) -> list[DatasetReport]:
  """Reports on every dataset of a mixture whose sizes are indexed."""
  return [_report(dataset, int(size)) for dataset, size in zip(mixture.datasets, mixture.sizes, strict=True)]


def _report(dataset: Dataset, samples: int) -> DatasetReport:
  records, pieces = dataset.records, dataset.pieces
  readable = records["tokens"] > 0
  used = pieces.lines < dataset.lines
  owners = np.repeat(np.arange(len(pieces.lines)), pieces.counts)
  kept = np.bincount(owners, pieces.sizes[:, 0], len(pieces.lines))
  lost = used & (pieces.counts == 0)
  untaught = lost & (pieces.losses == UNSUPERVISED)
  # Whether it fits as it is or was made to: a sample without a supervised token.
  masked = readable & (records["supervised"] == 0)
  masked[pieces.lines[lost]] = False
  shortened = used & ~lost
  shortened[used] &= kept[used] < records["tokens"][pieces.lines[used]]
  named = [*np.flatnonzero(~readable)[:_NAMED], *pieces.lines[lost][:_NAMED]]
  examples = [dataset.why_lost(int(line)) for line in named]
  examples += [
    f"{dataset.file.where(int(line))}: no token is supervised" for line in np.flatnonzero(masked)[:_NAMED]
  ]
  return DatasetReport(
    name=dataset.spec.name,
    lines=dataset.lines,
    samples=samples,
    unreadable=int((~readable).sum()),
    over_long=int((lost & ~untaught).sum()),
    masked=int(masked.sum() + untaught.sum()),
    shortened=int(shortened.sum()),
    split=int((used & (pieces.counts > 1)).sum()),
    tokens=np.array(records["tokens"][readable]),
    tiles=np.array(records["tiles"][readable]),
    examples=examples,
  )


def decode_all(
  mixture: Mixture, *, packed: bool, workers: int, progress: Callable[[int], Any] = lambda samples: None
) -> Iterator[str]:
  """Decodes every sample once, images and videos included, and yields why a run would lose it.

  What could not even be measured is not tried again.

  Args:
    mixture: the datasets, their sizes indexed.
    packed: rows hold several samples; then one is lost, too, if its size is not what the index says.
    workers: processes.
    progress: told how many samples were decoded.
  """
  groups = [chosen[i : i + _GROUP] for chosen in _of_one_pass(mixture) for i in range(0, len(chosen), _GROUP)]
  for group, errors in map_items(_Decode(mixture, packed), groups, workers):
    yield from errors
    progress(len(group))


def _of_one_pass(mixture: Mixture) -> Iterator[np.ndarray]:
  """Yields for each dataset its samples that the limits and the files leave, each once."""
  first = 0
  for dataset, size in zip(mixture.datasets, mixture.sizes.tolist(), strict=True):
    samples = np.arange(dataset.num_samples)
    yield first + samples[dataset.sizes_of(samples)[:, 0] > 0]
    first += size


@dataclasses.dataclass(frozen=True)
class _Decode:
  """Decodes a group of samples of the mixture, and returns why some cannot be decoded."""

  mixture: Mixture
  packed: bool

  def __call__(self, group: np.ndarray) -> list[str]:
    errors = []
    for index, planned in zip(group.tolist(), self.mixture.size_of(group), strict=True):
      try:
        sample = self.mixture.decode(0, index)
        if self.packed:
          batching.check_planned(sample, planned)
      except DataError as error:
        errors.append(str(error))
    return errors
