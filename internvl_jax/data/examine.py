"""What a run would make of the data, dataset by dataset, from the sizes of all samples."""

import concurrent.futures
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from internvl_jax.arguments import DataTrainingArguments
from internvl_jax.data import batching, packing
from internvl_jax.data.errors import DataError
from internvl_jax.data.sample import Mixture

# Samples decoded by a worker at a time.
_GROUP = 64
# Lines named of each kind of loss.
_NAMED = 5


class DatasetReport(NamedTuple):
  """What becomes of a dataset's lines.

  Attributes:
    name: of the dataset.
    lines: that are used.
    samples: of an epoch, repeats included.
    unreadable: lines that cannot be read.
    cut_images: lines whose images lie beyond max_seq_length.
    over_long: lines that fit no packed row; 0 where rows are not packed.
    masked: lines that supervise no token.
    truncated: lines that lose their end to max_seq_length.
    tokens, tiles: int [readable lines], of each sample before it is cut.
    examples: for some of the lines that are lost, why.
  """

  name: str
  lines: int
  samples: int
  unreadable: int
  cut_images: int
  over_long: int
  masked: int
  truncated: int
  tokens: np.ndarray
  tiles: np.ndarray
  examples: list[str]

  @property
  def lost(self) -> int:
    """Lines that the run would not learn from."""
    return self.unreadable + self.cut_images + self.over_long + self.masked


def examine(
  mixture: Mixture, data: DataTrainingArguments, settings: packing.PackSettings | None
) -> list[DatasetReport]:
  """Reports on every dataset of a mixture whose sizes are indexed.

  Args:
    mixture: the datasets.
    data: their settings.
    settings: the budgets of packed rows; None where rows are not packed.
  """
  return [_report(mixture, dataset, data, settings) for dataset in range(len(mixture.specs))]


def _report(
  mixture: Mixture, dataset: int, data: DataTrainingArguments, settings: packing.PackSettings | None
) -> DatasetReport:
  records = mixture.records(dataset)
  readable = records["tokens"] > 0
  cut = readable & (records["needed"] > data.max_seq_length)
  masked = readable & ~cut & (records["supervised"] == 0)
  over = np.zeros_like(readable)
  if settings is not None:
    tokens = np.minimum(records["tokens"], data.max_seq_length)
    over = readable & ~cut & ~masked & ~settings.fits(tokens, records["tiles"])
  first = int(mixture.sizes[:dataset].sum())
  where = mixture.files[dataset].where
  examples = [mixture.why_unreadable(first + int(i)) for i in np.flatnonzero(~readable | cut)[:_NAMED]]
  examples += [f"{where(int(i))}: no token is supervised" for i in np.flatnonzero(masked)[:_NAMED]]
  for i in np.flatnonzero(over)[:_NAMED]:
    examples.append(
      f"{where(int(i))}: {records['tokens'][i]} tokens and {records['tiles'][i]} tiles fit no row"
    )
  return DatasetReport(
    name=mixture.specs[dataset].name,
    lines=len(records),
    samples=int(mixture.sizes[dataset]),
    unreadable=int((~readable).sum()),
    cut_images=int(cut.sum()),
    over_long=int(over.sum()),
    masked=int(masked.sum()),
    truncated=int((readable & ~cut & (records["tokens"] > data.max_seq_length)).sum()),
    tokens=np.array(records["tokens"][readable]),
    tiles=np.array(records["tiles"][readable]),
    examples=examples,
  )


def decode_all(
  mixture: Mixture, *, packed: bool, workers: int, progress: Callable[[int], Any] = lambda samples: None
) -> Iterator[str]:
  """Decodes every line once, images and videos included, and yields why a run would lose it.

  Lines that could not even be measured are not tried again.

  Args:
    mixture: the datasets, their sizes indexed.
    packed: rows hold several samples; then one is lost, too, if its size is not what the index says.
    workers: processes.
    progress: told how many samples were decoded.
  """
  groups = [chosen[i : i + _GROUP] for chosen in _readable(mixture) for i in range(0, len(chosen), _GROUP)]
  if workers <= 1 or len(groups) <= workers:  # Workers take seconds to start.
    for group in groups:
      yield from _decode(mixture, group, packed)
      progress(len(group))
    return
  # Workers are started afresh: a forked copy of a process with JAX's threads may hang.
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(
    workers, context, initializer=_start_worker, initargs=(mixture, packed)
  ) as pool:
    for group, errors in zip(groups, pool.map(_decode_in_worker, groups), strict=True):
      yield from errors
      progress(len(group))


def _readable(mixture: Mixture) -> Iterator[np.ndarray]:
  """Yields for each dataset the samples of its measurable lines, each line once."""
  first = 0
  for dataset, size in enumerate(mixture.sizes):
    yield first + np.flatnonzero(mixture.records(dataset)["tokens"] > 0)
    first += int(size)


_worker: tuple[Mixture, bool] | None = None


def _start_worker(mixture: Mixture, packed: bool) -> None:
  global _worker  # noqa: PLW0603 - sent once to each process, not with every group
  _worker = mixture, packed


def _decode_in_worker(group: np.ndarray) -> list[str]:
  assert _worker is not None
  mixture, packed = _worker
  return _decode(mixture, group, packed)


def _decode(mixture: Mixture, group: np.ndarray, packed: bool) -> list[str]:
  errors = []
  for index, planned in zip(group.tolist(), mixture.size_of(group), strict=True):
    try:
      sample = mixture.decode(0, index)
      if packed:
        batching.check_planned(sample, planned)
    except DataError as error:
      if planned[0]:  # What max_seq_length cuts is reported from its size.
        errors.append(str(error))
  return errors
