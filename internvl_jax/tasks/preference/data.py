"""Preference pairs as batches: pure numpy."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from internvl_jax.data.load import batching
from internvl_jax.data.load.batching import MicroBatch, Padding
from internvl_jax.tasks.preference.batch import PreferenceBatch, pairs_of_row
from internvl_jax.tasks.preference.lines import PairLines

ReferenceLookup = Callable[[np.ndarray], np.ndarray]
"""Log-probabilities of the chosen and the rejected answer by the reference policy, float32 [n, 2], of the samples of
the mixture with these indices, int64 [n]; NaN where they are not known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairData:
  """Lines of pairs, and the batches of them; see `load.task.DataTask`.

  Attributes:
    lines: how a line becomes a pair.
    reference: looks up what the reference policy says of pairs; None: that is not known. It is called in the main process
      only, with the pairs of this host.
  """

  lines: PairLines
  reference: ReferenceLookup | None = None

  conversations = 2

  def assemble(self, micro_batches: Sequence[MicroBatch], padding: Padding) -> PreferenceBatch:
    """Pads A micro-batches of pairs; a pair that was dropped takes no place of its row.

    Args:
      micro_batches: A of them, each with R rows of pairs.
      padding: what to pad to; every supervised token counts once.
    """
    rows = batching.assemble(micro_batches, dataclasses.replace(padding, loss_reduction="token"))
    A, R, S = rows.input_ids.shape
    pair_index = np.full((A, R, pairs_of_row(S)), -1, np.int32)
    answers = np.zeros((*pair_index.shape, 2), np.int32)
    for a, micro in enumerate(micro_batches):
      present = micro.lengths > 0
      places = micro.rows[present], batching.numbers_in_rows(present, micro.rows)[present] - 1
      pair_index[a][places] = micro.indices[present]
      answers[a][places] = batching.segment_numbers(micro)[present]
    known = np.full((*pair_index.shape, 2), np.nan, np.float32)
    if self.reference is not None:
      known[pair_index >= 0] = self.reference(pair_index[pair_index >= 0].astype(np.int64))
    parent = np.zeros((A, R, S), np.int32)
    parent[rows.segment_ids > 0] = np.concatenate(list(map(batching.parents, micro_batches)))
    return PreferenceBatch(
      rows=rows,
      pair_weight=(pair_index >= 0).astype(np.float32),
      pair_index=pair_index,
      reference=known,
      answers=answers,
      parent=parent,
    )
