r"""The lines of preference data, and the two conversations that each becomes.

    {"image": "cat.jpg", "question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
    -> [human "<image>\nWhat is it?", gpt "A cat."], [human "<image>\nWhat is it?", gpt "A dog."]

Images are named as for supervised fine-tuning and belong to the question, so both conversations show the same. A
line may have a system message beside, in place of the template's: `system`, or `system_prompt` as InternVL3.5's data.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from internvl_jax.data.sample import forms, line_keys
from internvl_jax.data.sample.fitting import Limited, Limits
from internvl_jax.data.sample.line_keys import LineKeys, OtherKind
from internvl_jax.data.sample.templates import Template
from internvl_jax.data.sample.tokenize import IMAGE_PLACEHOLDER, Chat, common_prompt, supervised
from internvl_jax.data.where import Where
from internvl_jax.tasks.preference.fitting import limited_pair
from internvl_jax.tasks.preference.forms import PAIR_FORMS

KEYS = ("question", "chosen", "rejected")
"""What a line must have; `image` and `video` beside them are as in other lines."""

FRAME_NAME = "Frame"
"""The text before a frame's number: the reference writes `Frame1` here, and `Frame-1` in fine-tuning."""


_MISSING = "and preference.loss_type needs 'question', 'chosen', 'rejected'"

PAIRS = OtherKind(
  KEYS,
  "key 'conversations' is missing; the line is a preference pair, of 'chosen' and 'rejected', which needs "
  "preference.loss_type, such as 'sigmoid'; set it, or give lines with 'conversations'",
)
"""Pairs, to tasks whose lines are others."""

_CONVERSATIONS = OtherKind(
  ("conversations",),
  "the line has 'conversations' for supervised fine-tuning, but preference.loss_type is set; unset it, or give a "
  "line with 'question', 'chosen', 'rejected'",
)

_LINE_KEYS = LineKeys(
  texts=KEYS,
  extra=line_keys.SYSTEM_KEYS,
  others=(_CONVERSATIONS,),
  needs=f", {_MISSING}",
  refused=(("margin", "no loss has a margin of the line's"),),
  mask_remedy="both answers of a pair are judged in full; take the key out, or delete the line",
  roles_remedy=(
    "texts are read from 'question', 'chosen', 'rejected' and 'system'; move it there, or take the key out"
  ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairLines:
  """Lines of preference pairs; see `lines.LineSchema`.

  Attributes:
    share_prompts: the tokens that both conversations of a pair begin with are in the row once.
    form: in which lines are written, a key of `forms.PAIR_FORMS`.
  """

  share_prompts: bool = False
  form: str = forms.NATIVE

  kind = "preference"
  names = KEYS
  frame_name = FRAME_NAME
  longest_name = "twice data.max_seq_length, for the two answers of a pair"
  taught_hint = ""

  @property
  def facts(self) -> dict[str, Any]:
    """That lines are pairs, and that prompts are shared where they are."""
    return {self.kind: True} | ({"share_prompts": True} if self.share_prompts else {})

  @property
  def form_name(self) -> str:
    """The form in which its lines are written, in words."""
    return PAIR_FORMS[self.form].name

  def recognized(self, records: Iterable[Any]) -> Self:
    """Lines in the form of a dataset's first records."""
    return dataclasses.replace(self, form=forms.form_of(records, PAIR_FORMS))

  def plain(self, record: Any, where: Where) -> dict[str, Any]:
    """Returns a line with our keys alone.

    Raises:
      DataError: see `line_keys.plain_record` and `pair_of`.
    """
    record = forms.converted(record, where, self.form, PAIR_FORMS)
    plain = line_keys.plain_record(record, where, _LINE_KEYS)
    pair_of(plain, where)
    return plain

  def unread(self, record: Mapping[str, Any], plain: Mapping[str, Any], template: Template) -> Iterator[str]:
    """Yields the keys of a line that nobody reads."""
    del plain, template
    record = forms.converted(record, Where("", "", 0), self.form, PAIR_FORMS)
    return line_keys.unread_keys(record, _LINE_KEYS)

  def conversations(self, record: Mapping[str, Any], where: Where) -> list[list[dict[str, str]]]:
    """Returns the question with the chosen answer, and with the rejected one."""
    return pair_of(record, where).conversations()

  def check_places(self, conversations: Sequence[Any], num_images: int, where: Where) -> None:
    """Refuses a question that does not have a place for each image.

    Raises:
      DataError: the numbers differ.
    """
    check_places(conversations[0][-2]["value"], num_images, where)

  def check_chats(self, chats: Sequence[Chat], where: Where) -> None:
    """Refuses conversations that teach no preference; see `check_chats`."""
    check_chats(chats, where)

  def shared_tokens(self, chats: Sequence[Chat], image_tokens: Sequence[int]) -> int:
    """Returns how many tokens of the prompt are in the row once; see `shared_tokens`."""
    # Conversations are cut within their answers only, so this is true of what the limits leave as well.
    return shared_tokens(chats, image_tokens) if self.share_prompts else 0

  def limited(
    self,
    chats: Sequence[Chat],
    tiles: Sequence[int],
    tokens_per_tile: int,
    limits: Limits,
    where: Where,
    shared: int,
  ) -> tuple[Limited, ...]:
    """Truncates a pair to the limits, one piece of each conversation; see `limited_pair`."""
    return limited_pair(chats, tiles, tokens_per_tile, limits, where, shared=shared)


class Pair(NamedTuple):
  """The texts of a line."""

  question: str
  chosen: str
  rejected: str
  system: str | None = None

  def conversations(self) -> list[list[dict[str, str]]]:
    """Returns the question with the chosen answer, and with the rejected one."""
    system = [] if self.system is None else [{"from": "system", "value": self.system}]
    return [
      [*system, {"from": "human", "value": self.question}, {"from": "gpt", "value": answer}]
      for answer in (self.chosen, self.rejected)
    ]


def pair_of(record: Mapping[str, Any], where: Where) -> Pair:
  """Returns the texts of a line.

  Raises:
    DataError: a text is missing, is none or cannot be encoded, or the answers are equal or have an image.
  """
  question, chosen, rejected = (line_keys.checked_text(record, key, where) for key in KEYS)
  pair = Pair(question, chosen, rejected, line_keys.system_of(record, where))
  if pair.chosen == pair.rejected:
    raise where.error(
      f"'chosen' and 'rejected' are the same text {pair.chosen[:80]!r}, which prefers nothing; correct one or delete "
      "the line"
    )
  for key in KEYS[1:]:
    if count := record[key].count(IMAGE_PLACEHOLDER):
      raise where.error(
        f"{count} {IMAGE_PLACEHOLDER} in {key!r}, but only the question shows images; take it out or move it there"
      )
  return pair


def check_places(question: str, num_images: int, where: Where) -> None:
  """Refuses a question that does not have a place for each image.

  Args:
    question: with the place that may be left out.
    num_images: images of the line.
    where: the line.

  Raises:
    DataError: the numbers differ.
  """
  if (found := question.count(IMAGE_PLACEHOLDER)) != num_images:
    raise where.error(
      f"{found} {IMAGE_PLACEHOLDER} in 'question' but {num_images} images; make the numbers equal"
    )


def check_chats(chats: Sequence[Chat], where: Where) -> None:
  """Refuses conversations that teach no preference.

  Raises:
    DataError: an answer has no supervised token, or both answers have the same tokens.
  """
  for key, chat in zip(KEYS[1:], chats, strict=True):
    if not supervised(chat.labels).any():
      raise where.error(f"{key!r} becomes no supervised token; write a text or delete the line")
  if np.array_equal(chats[0].ids, chats[1].ids):
    raise where.error(
      f"'chosen' and 'rejected' become the same {len(chats[0].ids)} tokens, which prefers nothing; correct one or "
      "delete the line"
    )


def shared_tokens(chats: Sequence[Chat], image_tokens: Sequence[int]) -> int:
  """Returns how many tokens of a pair's first conversation its second one can share; 0 if none.

  All that the prompts have in common but the last such token: it is the one that predicts what comes next, in each
  conversation something else, so each has it for itself. Conversations with an image behind it share nothing.

  Args:
    chats: of the chosen and of the rejected answer.
    image_tokens: of each image.
  """
  one, other = chats
  shared = common_prompt([one[:2], other[:2]]) - 1
  if shared < 1 or (one.contexts >= shared).any():
    return 0
  return shared + sum(image_tokens) - len(one.contexts)
