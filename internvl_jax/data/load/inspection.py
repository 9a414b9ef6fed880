"""Statistics of the data, dataset by dataset, from the sizes of all samples: what a run would read and lose."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from internvl_jax.data.load import batching
from internvl_jax.data.load.mixture import Dataset, Mixture
from internvl_jax.data.sample import keys
from internvl_jax.data.sample.lines import LineSchema
from internvl_jax.data.sample.long_samples import UNSUPERVISED
from internvl_jax.data.sample.notes import Note
from internvl_jax.data.sample.templates import Template
from internvl_jax.data.source.interface import Records
from internvl_jax.data.source.workers import map_items
from internvl_jax.data.where import DataError

# Lines decoded by a worker at a time.
_GROUP = 64
# Lines named of each kind of loss.
_NAMED = 5
# Lines parsed by a worker at a time to see what in them is not read, and how many such things are told.
_NOTES_GROUP = 8192
_NOTES_SHOWN = 20


class DatasetReport(NamedTuple):
  """A report on a dataset's lines.

  Attributes:
    name: of the dataset.
    lines: that are used.
    samples: of an epoch, repeats and pieces included.
    unreadable: lines that cannot be read.
    over_long: lines that are too long and cannot be shortened.
    masked: lines that supervise no token, or none that the limits leave.
    shortened: lines that lose a part: their end, a piece without supervision, or tiles.
    split: lines that are split into several pieces.
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
  mixture: Mixture,
  *,
  packed: bool,
  workers: int,
  progress: Callable[[int], Any] = lambda samples: None,
  noted: Callable[[Note], Any] = lambda note: None,
) -> Iterator[str]:
  """Decodes every sample once, images and videos included, and yields why a run would lose it.

  What could not even be measured is not tried again.

  Args:
    mixture: the datasets, their sizes indexed.
    packed: rows are planned; then a sample is lost, too, if its size is not what the index says.
    workers: processes.
    progress: told how many samples were decoded.
    noted: told what one should know about how images were taken.
  """
  groups = [chosen[i : i + _GROUP] for chosen in _of_one_pass(mixture) for i in range(0, len(chosen), _GROUP)]
  for group, (errors, notes) in map_items(_Decode(mixture, packed), groups, workers):
    for note in notes:
      noted(note)
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
  """Decodes a group of samples of the mixture, and returns why some cannot be decoded, and the others' notes."""

  mixture: Mixture
  packed: bool

  def __call__(self, group: np.ndarray) -> tuple[list[str], list[Note]]:
    errors, notes = [], []
    for index, planned in zip(group.tolist(), self.mixture.size_of(group), strict=True):
      try:
        sample = self.mixture.decode(0, index)
        if self.packed:
          batching.check_planned(sample, planned, self.mixture.index_of)
        notes += sample.notes
      except DataError as error:
        errors.append(str(error))
    return errors, notes


def note_lines(mixture: Mixture, *, workers: int) -> list[str]:
  """A line for each dataset that has something which is not read and harmless, or is not as it says.

      d: not read: 'id' in 24 lines, 'widht' in 3 (did you mean 'width'? first d.jsonl:7)

  Args:
    mixture: the datasets.
    workers: processes.
  """
  described = []
  for dataset in mixture.datasets:
    found: dict[str, tuple[int, int]] = {}
    groups = [range(i, min(i + _NOTES_GROUP, dataset.lines)) for i in range(0, dataset.lines, _NOTES_GROUP)]
    count = _CountNotes(dataset.file, dataset.maker.lines, dataset.template)
    for _, notes in map_items(count, groups, workers):
      for note, (lines, first) in notes.items():
        before, earlier = found.get(note, (0, first))
        found[note] = before + lines, min(first, earlier)
    told = [_describe_note(note, *found[note], dataset) for note in sorted(found, key=lambda n: -found[n][0])]
    more = [f"and {len(told) - _NOTES_SHOWN} more"] if len(told) > _NOTES_SHOWN else []
    parts = ["not read: " + ", ".join(told[:_NOTES_SHOWN] + more)] if told else []
    if dataset.spec.length not in (None, len(dataset.file)):
      parts.append(f"the meta file says {dataset.spec.length} lines, there are {len(dataset.file)}")
    if parts:
      described.append(str(DataError(f"{dataset.spec.name}: {'; '.join(parts)}")))
  return described


def _describe_note(note: str, lines: int, first: int, dataset: Dataset) -> str:
  key = note.strip("'") if note.startswith("'") and note.endswith("'") else ""
  near = keys.nearest(key, "line") if key else None
  about = f" (did you mean {near!r}? first {dataset.file.where(first)})" if near else ""
  return f"{note} in {lines} line{'s' if lines > 1 else ''}{about}"


@dataclasses.dataclass(frozen=True)
class _CountNotes:
  """Counts what of a group of lines is not read: {note: (lines, the first)}."""

  file: Records
  lines: LineSchema
  template: Template

  def __call__(self, group: range) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for line in group:
      try:
        record = self.file.read(line)
        plain = self.lines.plain(record, self.file.where(line))
      except DataError:
        continue  # It is named as lost.
      for note in set(self.lines.unread(record, plain, self.template)):
        count, first = found.get(note, (0, line))
        found[note] = count + 1, first
    return found
