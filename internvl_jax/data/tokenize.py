"""From a conversation to token ids and labels."""

import pickle
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.data.errors import DataError, Where, did_you_mean
from internvl_jax.data.templates import Template, get_template

IMAGE_PLACEHOLDER = "<image>"
IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"

# Tokens at the end of an answer that are not supervised: the line break after the closing token.
_UNSUPERVISED_TAIL = 1


class ChatTokens(NamedTuple):
  """A tokenised conversation of n tokens.

  Attributes:
    input_ids: int32 [n].
    labels: int32 [n], `IGNORE_INDEX` where not supervised; not shifted.
    truncated: the conversation was longer than allowed and lost its end.
  """

  input_ids: np.ndarray
  labels: np.ndarray
  truncated: bool


class ChatTokenizer:
  """Writes conversations by a template, tokenises them and marks what is supervised.

  Holds its own copy of the `tokenizers` object below the transformers tokenizer: worker processes then need
  not import transformers, and no call elsewhere can switch padding or truncation on underneath. (Calling the
  transformers object would also cost about 1 ms a time.)

  Attributes:
    template: how turns are written.
    image_token_id: id of `<IMG_CONTEXT>`, at whose places the features of the image go.
    answer_opening: ids that stand before an answer: a prompt for generation is the turns before, then these.
    stop_token_id: id that ends an answer.
  """

  def __init__(self, tokenizer: Any, template: Template | str):
    """Copies the tokenizer and looks up the tokens it must have.

    Args:
      tokenizer: a fast transformers tokenizer that has the three image tokens.
      template: a template or its name.

    Raises:
      DataError: the tokenizer is not a fast one or lacks a token, or the template is unknown.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
      raise DataError(
        f"tokenizer {type(tokenizer).__name__} has no tokenizers backend; save it with a tokenizer.json"
      )
    self.template = get_template(template) if isinstance(template, str) else template
    self._backend = pickle.loads(pickle.dumps(backend))
    self._backend.no_truncation()
    self._backend.no_padding()
    missing = [t for t in (IMAGE_START, IMAGE_END, IMAGE_CONTEXT) if self._backend.token_to_id(t) is None]
    if missing:
      raise DataError(
        f"the tokenizer lacks {' '.join(missing)}; add them as special tokens and resize the embeddings"
      )
    self.image_token_id: int = self._backend.token_to_id(IMAGE_CONTEXT)
    self._start: list[int] = []
    if getattr(tokenizer, "add_bos_token", False):
      if tokenizer.bos_token_id is None:
        raise DataError("the tokenizer has add_bos_token=True but no bos_token; set one of them right")
      self._start = [tokenizer.bos_token_id]
    self.answer_opening: list[int] = self._encode(self.template.openings["gpt"])
    self.stop_token_id: int = self._encode(self.template.closing)[0]
    self._default_system = self._encode_turn("system", self.template.system_message)

  def encode(
    self,
    conversations: Sequence[Mapping[str, str]],
    image_tokens: Sequence[int],
    max_length: int,
    where: Where,
  ) -> ChatTokens:
    r"""Tokenises a conversation.

    Each turn is tokenised on its own and the pieces are joined. `<image>` in a human turn becomes `<img>`,
    the image's tokens and `</img>`; in other turns it is plain text. A first system turn takes the place of
    the template's. Supervised are the answers and the token that closes them.

        [human "<image>\nHi", gpt "Yo"] with image_tokens=[2]
        -> system turn, <|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT></img>\nHi<|im_end|>\n
           <|im_start|>assistant\n[Yo<|im_end|>]\n        with what stands in [] as labels

    Args:
      conversations: turns as `{"from": "system" | "human" | "gpt", "value": text}`; left as they are.
      image_tokens: how many tokens each image takes, in order.
      max_length: longer conversations are cut to so many tokens.
      where: the line of the conversation, for errors.

    Raises:
      DataError: a turn is malformed, `<image>` and images differ in number, or the cut goes through an image.
    """
    turns = _checked_turns(conversations, where)
    found = sum(value.count(IMAGE_PLACEHOLDER) for role, value in turns if role == "human")
    if found != len(image_tokens):
      raise where.error(
        f"{found} {IMAGE_PLACEHOLDER} in the human turns but {len(image_tokens)} images; make the numbers equal"
      )
    ids, labels = list(self._start), [IGNORE_INDEX] * len(self._start)
    if turns[0][0] != "system":
      ids += self._default_system
      labels += [IGNORE_INDEX] * len(self._default_system)
    for role, value in turns:
      turn = self._encode_turn(role, value)
      ids += turn
      labels += self._labels(role, turn)
    return self._expand(np.array(ids, np.int32), np.array(labels, np.int32), image_tokens, max_length, where)

  def decode(self, ids: Sequence[int] | np.ndarray, *, special: bool = False) -> str:
    """Returns the text of token ids, with or without the special tokens' names."""
    return self._backend.decode([int(i) for i in ids], skip_special_tokens=not special)

  def _encode(self, text: str) -> list[int]:
    return self._backend.encode(text, add_special_tokens=False).ids

  def _encode_turn(self, role: str, value: str) -> list[int]:
    """Returns a turn's ids, where an image of any size has one context token."""
    if role == "human":
      value = value.replace(IMAGE_PLACEHOLDER, IMAGE_START + IMAGE_CONTEXT + IMAGE_END)
    return self._encode(self.template.openings[role] + value + self.template.closing)

  def _labels(self, role: str, ids: list[int]) -> list[int]:
    if role != "gpt":
      return [IGNORE_INDEX] * len(ids)
    # As many tokens as the opening has on its own, whatever it merges to before this answer.
    opening = len(self.answer_opening)
    return [IGNORE_INDEX] * opening + ids[opening:-_UNSUPERVISED_TAIL] + [IGNORE_INDEX] * _UNSUPERVISED_TAIL

  def _expand(
    self, ids: np.ndarray, labels: np.ndarray, image_tokens: Sequence[int], max_length: int, where: Where
  ) -> ChatTokens:
    """Repeats each image's one context token to the image's length, and cuts to max_length."""
    contexts = np.flatnonzero(ids == self.image_token_id)
    if len(contexts) != len(image_tokens):
      raise where.error(
        f"{len(contexts)} {IMAGE_CONTEXT} tokens for {len(image_tokens)} images: the text itself contains "
        f"{IMAGE_CONTEXT}; take it out"
      )
    # Repeating ids equals tokenising the repeated text, because special tokens are split off before anything
    # else; it saves tokenising thousands of them.
    counts = np.ones(len(ids), np.int64)
    counts[contexts] = image_tokens
    length = int(counts.sum())
    if length > max_length and len(contexts):
      needed = int(counts[: contexts[-1] + 2].sum())  # up to the last </img>
      if needed > max_length:
        raise where.error(
          f"images need the first {needed} of {length} tokens but data.max_seq_length={max_length} cuts them; "
          "raise it or lower max_dynamic_patch"
        )
    return ChatTokens(
      np.repeat(ids, counts)[:max_length], np.repeat(labels, counts)[:max_length], length > max_length
    )


def with_placeholder(conversations: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
  """Returns the turns with `<image>` and a line break before the first human one, if no human turn has it.

  The reference looks at the first turn whatever its role; where that is not the human's, its `<image>` would
  stay plain text, so ours goes where an image can stand.
  """
  turns = list(conversations)
  human = [i for i, turn in enumerate(turns) if isinstance(turn, Mapping) and turn.get("from") == "human"]
  texts = [str(turns[i].get("value")) for i in human]
  if human and not any(IMAGE_PLACEHOLDER in text for text in texts):
    turns[human[0]] = {**turns[human[0]], "value": f"{IMAGE_PLACEHOLDER}\n{texts[0]}"}
  return turns


def _checked_turns(conversations: Any, where: Where) -> list[tuple[str, str]]:
  """Returns (role, value) pairs."""
  if not isinstance(conversations, Sequence) or isinstance(conversations, str) or not conversations:
    raise where.error("'conversations' must be a list of at least one turn")
  turns = []
  for number, turn in enumerate(conversations, 1):
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str) or "from" not in turn:
      raise where.error(f'turn {number} must be {{"from": role, "value": text}}, got {str(turn)[:80]!r}')
    role = turn["from"]
    if role not in ("system", "human", "gpt"):
      hint = did_you_mean(str(role), ("system", "human", "gpt"))
      raise where.error(f"turn {number} is from {role!r}{hint}")
    if role == "system" and number > 1:
      raise where.error(f"turn {number} is from 'system', which must be turn 1; move it")
    turns.append((role, turn["value"]))
  return turns
