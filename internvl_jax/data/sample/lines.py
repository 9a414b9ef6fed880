"""The schema of a kind of line: which keys it has, and which conversations it becomes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

from internvl_jax.data.sample.fitting import Limited, Limits
from internvl_jax.data.sample.templates import Template
from internvl_jax.data.sample.tokenize import Chat
from internvl_jax.data.where import Where


class LineSchema(Protocol):
  """A kind of line. It goes to worker processes: it can be pickled, and its module imports no JAX.

  A line becomes J conversations about the same images and videos, each a segment of the sample's row. J is the same for
  all lines of a kind.
  """

  @property
  def kind(self) -> str:
    """Its name, in what is kept on disk."""
    ...

  @property
  def names(self) -> tuple[str, ...]:
    """Names of the prompt and of each of several answers; () for a kind of one conversation."""
    ...

  @property
  def frame_name(self) -> str:
    """The text before the number of a video's frame."""
    ...

  @property
  def longest_name(self) -> str:
    """The name of the longest sample, J times data.max_seq_length, in messages."""
    ...

  @property
  def taught_hint(self) -> str:
    """The hint where nothing is supervised, on what to check: "that ... and ", or ""."""
    ...

  @property
  def facts(self) -> Mapping[str, Any]:
    """Facts that make other samples of a line than those of a conversation: JSON values that are true, by name."""
    ...

  @property
  def form_name(self) -> str:
    """The form in which its lines are written, in words; see `forms.Form`."""
    ...

  def recognized(self, records: Iterable[Any]) -> Self:
    """This kind of line in the form of a dataset.

    Args:
      records: its first ones, parsed.
    """
    ...

  def plain(self, record: Any, where: Where) -> dict[str, Any]:
    """A parsed line with our keys alone, in the reference's form.

    Raises:
      DataError: something about its texts is wrong, or is not read and would change what is seen or learned.
    """
    ...

  def unread(self, record: Mapping[str, Any], plain: Mapping[str, Any], template: Template) -> Iterator[str]:
    """Yields what of a line is not read and harmless, and what else one should know about it.

    Args:
      record: the parsed line.
      plain: what `plain` made of it.
      template: how its turns are written.
    """
    ...

  def conversations(self, record: Mapping[str, Any], where: Where) -> Sequence[Any]:
    """The turns of each conversation of a plain line."""
    ...

  def check_places(self, conversations: Sequence[Any], num_images: int, where: Where) -> None:
    """Refuses conversations whose places for images are not as many as the images, as far as the tokenizer does not.

    Raises:
      DataError: the numbers differ.
    """
    ...

  def check_chats(self, chats: Sequence[Chat], where: Where) -> None:
    """Refuses conversations from which nothing can be learned, once they are tokenized.

    Raises:
      DataError: why not.
    """
    ...

  def shared_tokens(self, chats: Sequence[Chat], image_tokens: Sequence[int]) -> int:
    """How many tokens of the first conversation all others share; 0 if none.

    Args:
      chats: the conversations.
      image_tokens: of each image.
    """
    ...

  def limited(
    self,
    chats: Sequence[Chat],
    tiles: Sequence[int],
    tokens_per_tile: int,
    limits: Limits,
    where: Where,
    shared: int,
  ) -> tuple[Limited, ...]:
    """Truncates or splits each conversation to the limits, all in as many pieces and of the same images.

    Args:
      chats: the conversations.
      tiles: of each image.
      tokens_per_tile: image tokens of one tile.
      limits: see `Limits`.
      where: the line, for errors.
      shared: tokens of the prompt that are in the row once.

    Raises:
      OverLengthError: the sample is lost, by the policy or because an image is too large.
      UnsupervisedError: nothing that could be learned is left.
    """
    ...
