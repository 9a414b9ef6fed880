"""Lines of conversations as prompts: what lies before the last answer, which is what answers are compared with. Pure numpy."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE, TokenBatch
from internvl_jax.data.load import batching
from internvl_jax.data.load.batching import MicroBatch, Padding
from internvl_jax.data.sample.conversations import ConversationLines
from internvl_jax.tasks import other_kinds
from internvl_jax.tasks.grpo.batch import PromptBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptData:
  """Conversations, and batches of what lies before their last answer; see `load.task.DataTask`.

  Attributes:
    lines: as for supervised fine-tuning.
  """

  lines: ConversationLines = dataclasses.field(
    default_factory=lambda: ConversationLines(others=other_kinds())
  )

  conversations = 1

  def assemble(self, micro_batches: Sequence[MicroBatch], padding: Padding) -> PromptBatch:
    """Pads A micro-batches of prompts. A sample without an answer, or one that was cut, leaves its row empty.

    Args:
      micro_batches: A of them, each of R rows with one sample.
      padding: what to pad to.
    """
    rows = batching.assemble(micro_batches, dataclasses.replace(padding, loss_reduction="token"))
    index = np.full(rows.input_ids.shape[:2], -1, np.int32)
    for a, micro in enumerate(micro_batches):
      whole = (micro.lengths > 0) & ~micro.happened("truncated") & ~micro.happened("fully_masked")
      index[a, micro.rows[whole]] = micro.indices[whole]
    lengths = np.where(index < 0, 0, prompt_lengths(rows.targets))
    return PromptBatch(rows=_cut(rows, lengths), index=np.where(lengths > 0, index, -1).astype(np.int32))


def prompt_lengths(targets: Int[np.ndarray, "A R S"]) -> Int[np.ndarray, "A R"]:
  """Computes int [A, R]: the tokens before the last answer of each row; 0 where nothing is to be predicted.

  Args:
    targets: int32 [A, R, S], the token to predict at each place.
  """
  learned = targets != IGNORE_INDEX
  last = learned.shape[-1] - 1 - learned[..., ::-1].argmax(-1)
  before = ~learned & (np.arange(learned.shape[-1]) < last[..., None])
  # The place after the last one, before the answer's end, that predicts nothing; it predicts the answer's first token.
  first = np.where(before.any(-1), learned.shape[-1] - before[..., ::-1].argmax(-1), 0)
  return np.where(learned.any(-1), first + 1, 0)


def _cut(rows: TokenBatch, lengths: np.ndarray) -> TokenBatch:
  """The rows' first tokens, without targets."""
  kept = np.arange(rows.input_ids.shape[-1]) < lengths[..., None]
  return rows._replace(
    input_ids=np.where(kept, rows.input_ids, 0),
    targets=np.full_like(rows.targets, IGNORE_INDEX),
    loss_weight=np.zeros_like(rows.loss_weight),
    positions=np.where(kept, rows.positions, 0),
    segment_ids=np.where(kept, rows.segment_ids, 0),
    image_index=np.where(kept, rows.image_index, np.int32(NO_IMAGE)),
  )
