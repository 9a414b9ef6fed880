r"""The lines of preference data, and the two conversations that each becomes.

    {"image": "cat.jpg", "question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
    -> [human "<image>\nWhat is it?", gpt "A cat."], [human "<image>\nWhat is it?", gpt "A dog."]

Images are named as for supervised fine-tuning and belong to the question, so both conversations show the same. A
line may have a system message beside, in place of the template's: `system`, or `system_prompt` as InternVL3.5's data.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.data.sample.tokenize import IMAGE_PLACEHOLDER, Chat, check_characters
from internvl_jax.data.where import Where, shown

KEYS = ("question", "chosen", "rejected")
"""What a line must have; `image` and `video` beside them are as in other lines."""

SYSTEM_KEYS = ("system", "system_prompt")
"""Names of a line's own system message."""

FRAME_NAME = "Frame"
"""What stands before a frame's number: the reference writes `Frame1` here, and `Frame-1` in fine-tuning."""


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


def check_keys(record: dict[str, Any], where: Where) -> None:
  """Refuses a line that has not all texts of a pair.

  Raises:
    DataError: one is missing.
  """
  missing = [key for key in KEYS if key not in record]
  if missing and "conversations" in record:
    raise where.error(
      f"the line has 'conversations' for supervised fine-tuning, but preference.loss_type is set; unset it, or give a "
      f"line with {_listed(KEYS)}"
    )
  if missing:
    raise where.error(
      f"key {_listed(missing)} is missing; the line has {_listed(record) or 'no key'}, and preference.loss_type needs "
      f"{_listed(KEYS)}"
    )


def system_of(record: dict[str, Any], where: Where) -> str | None:
  """Returns the system message that stands in a line beside its texts; None if there is none.

  Raises:
    DataError: there are two, or it is no text.
  """
  given = [key for key in SYSTEM_KEYS if record.get(key) not in (None, "")]
  if len(given) > 1:
    raise where.error(f"the line has both {_listed(given)}; leave one system message")
  return _checked_text(record, given[0], where) if given else None


def pair_of(record: dict[str, Any], where: Where) -> Pair:
  """Returns the texts of a line.

  Raises:
    DataError: a text is missing, is none or cannot be encoded, or the answers are equal or have an image.
  """
  check_keys(record, where)
  question, chosen, rejected = (_checked_text(record, key, where) for key in KEYS)
  pair = Pair(question, chosen, rejected, system_of(record, where))
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


def _checked_text(record: dict[str, Any], key: str, where: Where) -> str:
  text = record[key]
  if not isinstance(text, str) or not text.strip():
    raise where.error(
      f"{key!r} must be a text that is not empty, got {shown(text, json.dumps)}; write one or delete the line"
    )
  check_characters(text, repr(key), where)
  return text


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
    # The first token has nothing before it that could predict it.
    if (chat.labels[1:] == IGNORE_INDEX).all():
      raise where.error(f"{key!r} becomes no supervised token; write a text or delete the line")
  if np.array_equal(chats[0].ids, chats[1].ids):
    raise where.error(
      f"'chosen' and 'rejected' become the same {len(chats[0].ids)} tokens, which prefers nothing; correct one or "
      "delete the line"
    )


def common_prompt(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> int:
  """Returns how many tokens of two conversations, from the first on, are the same and not supervised.

  Args:
    one: its ids and labels, [n].
    other: those of the other, [m].
  """
  length = min(len(one[0]), len(other[0]))
  ends = one[0][:length] != other[0][:length]
  for _, labels in (one, other):
    ends |= labels[:length] != IGNORE_INDEX
  return int(ends.argmax()) if ends.any() else length


def shared_tokens(chats: Sequence[Chat], image_tokens: Sequence[int]) -> int:
  """Returns how many tokens of a pair's first conversation can stand for those of its second, too; 0 if none.

  All that the prompts have in common but the last such token: it is the one that predicts what comes next, in each
  conversation something else, so each has it for itself. Conversations with an image behind it share nothing.

  Args:
    chats: of the chosen and of the rejected answer.
    image_tokens: of each image.
  """
  one, other = chats
  shared = common_prompt(one[:2], other[:2]) - 1
  if shared < 1 or (one.contexts >= shared).any():
    return 0
  return shared + sum(image_tokens) - len(one.contexts)


def _listed(keys: Any) -> str:
  return ", ".join(map(repr, keys))
