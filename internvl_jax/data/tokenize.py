"""From a conversation to token ids and labels."""

import hashlib
import itertools
import pickle
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.data.errors import DataError, Where, did_you_mean
from internvl_jax.data.templates import Template, get_template

IMAGE_PLACEHOLDER = "<image>"
IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"


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
    self._start = self._leading_ids(tokenizer)
    stop = self._backend.encode(self.template.stop_token, add_special_tokens=False).ids
    if len(stop) != 1:
      raise DataError(
        f"template {self.template.name!r} ends answers by {self.template.stop_token!r}, which the tokenizer "
        f"writes as {len(stop)} tokens; add it as a special token and resize the embeddings, or choose another "
        "data.conv_style"
      )
    self.stop_token_id: int = stop[0]

  def encode(
    self,
    conversations: Sequence[Mapping[str, str]],
    image_tokens: Sequence[int],
    max_length: int,
    where: Where,
  ) -> ChatTokens:
    r"""Tokenises a conversation.

    The template says whether the whole text is tokenised at once or each turn on its own. `<image>` in a
    human turn becomes `<img>`, the image's tokens and `</img>`; in other turns it is plain text. A first
    system turn takes the place of the template's. Supervised are the answers and the token that closes them,
    found by the characters from which tokens come, so no count of tokens can go wrong. For `internvl2_5`:

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
    turns = self._arranged(_checked_turns(conversations, where), where)
    found = sum(value.count(IMAGE_PLACEHOLDER) for role, value in turns if role == "human")
    if found != len(image_tokens):
      others = sum(value.count(IMAGE_PLACEHOLDER) for role, value in turns if role != "human")
      note = f" ({others} more in other turns, where it is plain text)" if others else ""
      raise where.error(
        f"{found} {IMAGE_PLACEHOLDER} in the human turns{note} but {len(image_tokens)} images; "
        "make the numbers equal"
      )
    texts = [turns] if self.template.whole else [[turn] for turn in turns]
    ids, labels = zip(*(self._tokenize(text, last=text is texts[-1]) for text in texts), strict=True)
    start = np.array(self._start, np.int32)
    return self._expand(
      np.concatenate([start, *ids]),
      np.concatenate([np.full_like(start, IGNORE_INDEX), *labels]),
      image_tokens,
      max_length,
      where,
    )

  def fingerprint(self) -> str:
    """Returns a hash of all that ids depend on."""
    text = f"{self._backend.to_str()} {self.template} {self._start}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  def decode(self, ids: Sequence[int] | np.ndarray, *, special: bool = False) -> str:
    """Returns the text of token ids, with or without the special tokens' names."""
    return self._backend.decode([int(i) for i in ids], skip_special_tokens=not special)

  def decode_answer(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text of an answer that was generated, without what the template puts before it."""
    opening = self._backend.encode(self.template.answer_opening, add_special_tokens=False).ids
    ids = [int(i) for i in ids]
    ends = [i for i in range(len(opening), len(ids) + 1) if ids[i - len(opening) : i] == opening]
    return self.decode(ids[ends[-1] :] if opening and ends else ids)

  def _leading_ids(self, tokenizer: Any) -> list[int]:
    """Returns the bos token where conversations begin with one."""
    if getattr(tokenizer, "add_bos_token", False):
      if tokenizer.bos_token_id is None:
        raise DataError("the tokenizer has add_bos_token=True but no bos_token; set one of them right")
      return [tokenizer.bos_token_id]
    # Some tokenizers know it only from their post-processor, which the reference runs on whole dialogues; on
    # single turns it would put the token before each.
    unsaid = "add_bos_token" not in getattr(tokenizer, "init_kwargs", {})
    if self.template.whole and unsaid and tokenizer.bos_token_id is not None:
      return [i for i in self._backend.encode("").ids[:1] if i == tokenizer.bos_token_id]
    return []

  def _arranged(self, turns: list[tuple[str, str]], where: Where) -> list[tuple[str, str]]:
    """Returns the turns that are written, the system's first."""
    template = self.template
    if template.alternates:
      for number, ((role, _), (following, _)) in enumerate(itertools.pairwise(turns), 1):
        if role == following:
          raise where.error(
            f"turns {number} and {number + 1} are both from {role!r}, but in template {template.name!r} human and "
            "gpt take turns; join the two or drop one"
          )
    if turns[0][0] != "system":
      turns = [("system", template.system_message), *turns]
    if template.alternates and turns[1:] and turns[1][0] == "gpt":
      del turns[1]
    return [(role, value.strip() if template.strips else value) for role, value in turns]

  def _tokenize(self, turns: Sequence[tuple[str, str]], *, last: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and labels of turns tokenised as one text, where an image has one context token.

    Args:
      turns: pairs of role and value.
      last: whether the conversation ends with them.
    """
    template = self.template
    parts: list[str] = []
    answers: list[tuple[int, int]] = []  # The characters of each, closing included.
    end = 0
    for number, (role, value) in enumerate(turns, 1):
      if role == "human":
        value = value.replace(IMAGE_PLACEHOLDER, IMAGE_START + IMAGE_CONTEXT + IMAGE_END)
      opening, closing = template.openings[role], template.closings[role]
      if role == "gpt" and last and number == len(turns) and template.last_closing is not None:
        closing = template.last_closing
      begin = end + len(opening.removesuffix(template.answer_opening).rstrip(" "))
      parts += (opening, value, closing)
      end += sum(map(len, parts[-3:]))
      if role == "gpt":
        answers.append((begin, end))
    encoding = self._backend.encode("".join(parts), add_special_tokens=False)
    ids = np.array(encoding.ids, np.int32)
    labels = np.full_like(ids, IGNORE_INDEX)
    if answers:
      # A token belongs to where its first character is: a line break of the opening that merges with those of
      # the answer is not supervised, nor is an opening's special token that takes white space after it in.
      firsts = np.array([first for first, _ in encoding.offsets])
      for begin, end in np.searchsorted(firsts, answers):
        taught = slice(begin, max(begin, end - template.unsupervised_tail))
        labels[taught] = ids[taught]
    return ids, labels

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
  texts = human_texts(turns)
  if texts and not any(IMAGE_PLACEHOLDER in text for text in texts.values()):
    first = min(texts)
    turns[first] = {**turns[first], "value": f"{IMAGE_PLACEHOLDER}\n{texts[first]}"}
  return turns


def human_texts(turns: Sequence[Any]) -> dict[int, str]:
  """Returns the texts of the human turns by their number from 0.

  Turns without a text are left out, and as they are: they are named when the conversation is tokenised.
  """
  return {
    number: turn["value"]
    for number, turn in enumerate(turns)
    if isinstance(turn, Mapping) and turn.get("from") == "human" and isinstance(turn.get("value"), str)
  }


def _checked_turns(conversations: Any, where: Where) -> list[tuple[str, str]]:
  """Returns (role, value) pairs."""
  if not isinstance(conversations, Sequence) or isinstance(conversations, str) or not conversations:
    found = "an empty list" if isinstance(conversations, list) else type(conversations).__name__
    raise where.error(f"'conversations' must be a list of at least one turn, got {found}")
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
    try:
      turn["value"].encode()
    except UnicodeEncodeError as error:
      raise where.error(
        f"turn {number}: character {error.start + 1} is {error.object[error.start]!r}, half of a surrogate pair; "
        "write the character whole"
      ) from None
    turns.append((role, turn["value"]))
  return turns
