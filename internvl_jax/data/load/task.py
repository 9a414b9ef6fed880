"""The data interface of a task: its kind of line, and how samples are collated into a batch.

The tasks are in `tasks/`; `data/` knows none of them but the default, conversations.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from internvl_jax.data.load import batching
from internvl_jax.data.load.batching import MicroBatch, Padding
from internvl_jax.data.sample.conversations import CONVERSATION_LINES
from internvl_jax.data.sample.lines import LineSchema


class DataTask(Protocol):
  """A way to learn, as far as data go; it stays in the main process, but for its `lines`."""

  @property
  def lines(self) -> LineSchema:
    """The schema of the lines that it reads."""
    ...

  @property
  def conversations(self) -> int:
    """J, how many conversations, and so segments of a row, a line becomes."""
    ...

  def assemble(self, micro_batches: Sequence[MicroBatch], padding: Padding) -> Any:
    """The batch of an optimizer step, of numpy arrays.

    Args:
      micro_batches: A of them, each with R rows.
      padding: the shapes to pad to.
    """
    ...


class Conversations(NamedTuple):
  """Samples of one conversation each, for next-token prediction."""

  lines: LineSchema = CONVERSATION_LINES
  conversations: int = 1

  def assemble(self, micro_batches: Sequence[MicroBatch], padding: Padding) -> Any:
    """A batch of tokens; see `batching.assemble`."""
    return batching.assemble(micro_batches, padding)


CONVERSATIONS = Conversations()
"""The default of a loader."""
