"""Conversations with what a teacher says of them, as batches: pure numpy."""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from internvl_jax.batch import IGNORE_INDEX, TokenBatch
from internvl_jax.data.load import batching
from internvl_jax.data.load.batching import MicroBatch, Padding
from internvl_jax.data.sample.lines import LineSchema
from internvl_jax.tasks.distillation.batch import DistillationBatch
from internvl_jax.tasks.sft.data import DATA


class SampleTokens(NamedTuple):
  """The targets of a sample, which both models see alike.

  Attributes:
    number: of the sample in the mixture.
    tokens: its targets.
    content: a checksum of its ids and labels.
  """

  number: int
  tokens: int
  content: int


Known = Callable[[Sequence[SampleTokens]], np.ndarray]
"""Looks up what the teacher says of the targets of samples: `cache.token_dtype` [targets of all of them, in order]."""


def samples_of(micro: MicroBatch) -> list[SampleTokens]:
  """The samples of a micro-batch in their order; those that were dropped are not among them."""
  ends = micro.lengths.cumsum()
  found = []
  for g in np.flatnonzero(micro.lengths):
    place = slice(ends[g] - micro.lengths[g], ends[g])
    ids, labels = micro.input_ids[place], micro.labels[place]
    # A sample's first token is predicted by nothing.
    tokens = int((labels[1:] != IGNORE_INDEX).sum())
    content = zlib.crc32(labels.tobytes(), zlib.crc32(ids.tobytes()))
    found.append(SampleTokens(int(micro.indices[g]), tokens, content))
  return found


def _samples(micro_batches: Sequence[MicroBatch]) -> list[SampleTokens]:
  return [sample for micro in micro_batches for sample in samples_of(micro)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationData:
  """Conversations, and the batches of them with the teacher's tokens; see `load.task.DataTask`.

  Attributes:
    top_k: K, tokens that are kept.
    lines: how a line becomes a sample.
    known: looks up what the teacher says; None: that is not known. It is called in the main process only, with the samples
      of this host.
  """

  top_k: int
  lines: LineSchema = DATA.lines
  known: Known | None = None

  conversations = 1

  def assemble(self, micro_batches: Sequence[MicroBatch], padding: Padding) -> DistillationBatch:
    """Pads A micro-batches, and puts the teacher's tokens in the places of their targets."""
    rows = batching.assemble(micro_batches, padding)
    shape = (*rows.targets.shape, self.top_k)
    ids, logps = np.zeros(shape, np.int32), np.zeros(shape, np.float16)
    tail = np.zeros(rows.targets.shape, np.float32)
    if self.known is not None:
      real = rows.targets != IGNORE_INDEX
      found = self.known(_samples(micro_batches))
      # Targets are in the order of rows, and samples, too.
      ids[real], logps[real], tail[real] = found["ids"], found["logps"], found["tail"]
    return DistillationBatch(rows, ids, logps, tail)


class TeacherBatch(NamedTuple):
  """What the teacher is asked: tokens and tiles for the devices, and whose they are."""

  rows: TokenBatch
  samples: list[SampleTokens]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherData:
  """The same conversations for the teacher; see `load.task.DataTask`."""

  lines: LineSchema = DATA.lines

  conversations = 1

  def assemble(self, micro_batches: Sequence[MicroBatch], padding: Padding) -> TeacherBatch:
    """Pads micro-batches."""
    samples = _samples(micro_batches)
    return TeacherBatch(batching.assemble(micro_batches, padding), samples)
