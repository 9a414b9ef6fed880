"""From a conversation to token ids and labels."""

import hashlib
import itertools
import pickle
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.data.sample.templates import Template, get_template
from internvl_jax.data.where import DataError, Where, shown
from internvl_jax.errors import did_you_mean

IMAGE_PLACEHOLDER = "<image>"
_ROLES = ("system", "human", "gpt")
# What other trainers call them.
_OTHER_ROLES = {"user": "human", "assistant": "gpt", "bot": "gpt", "model": "gpt", "chatgpt": "gpt"}

# What tokenizers of one vocabulary may still cut differently.
_MANY_KINDS = "What's  in <b>these</b> 12,345.67 images?\n\tÜber café naïve 你好，世界 日本語 한국어 🙂 x_1 = f(y); // A\u00a0B <|im_end|>"

IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"


def supervised(labels: np.ndarray) -> np.ndarray:
  """Which tokens of a segment are supervised: never the first one, since nothing before it could predict it.

  Args:
    labels: int [n], not shifted, `IGNORE_INDEX` where not supervised.

  Returns:
    bool [n].
  """
  found = labels != IGNORE_INDEX
  found[:1] = False
  return found


class ChatTokens(NamedTuple):
  """A tokenized conversation of n tokens.

  Attributes:
    input_ids: int32 [n].
    labels: int32 [n], `IGNORE_INDEX` where not supervised; not shifted.
  """

  input_ids: np.ndarray
  labels: np.ndarray


class Chat(NamedTuple):
  """A tokenized conversation of m tokens in which every image is one token, whatever its size.

  Attributes:
    ids: int32 [m].
    labels: int32 [m], as in `ChatTokens`.
    contexts: int64 [images], the places of the images' tokens. `<img>` comes before each, `</img>` after it.
  """

  ids: np.ndarray
  labels: np.ndarray
  contexts: np.ndarray

  def length(self, image_tokens: Sequence[int]) -> int:
    """How many tokens it has when the images have so many."""
    return len(self.ids) + sum(image_tokens) - len(self.contexts)

  def expand(self, image_tokens: Sequence[int]) -> ChatTokens:
    """The conversation in which the images have so many tokens."""
    # Repeating ids equals tokenizing the repeated text, because special tokens are split off before anything
    # else; it saves tokenizing thousands of them.
    counts = np.ones(len(self.ids), np.int64)
    counts[self.contexts] = image_tokens
    return ChatTokens(np.repeat(self.ids, counts), np.repeat(self.labels, counts))


def common_prompt(conversations: Sequence[tuple[np.ndarray, np.ndarray]]) -> int:
  """How many tokens of conversations, from the first on, are the same and not supervised.

  Args:
    conversations: ids and labels of each, [n] of its own n.
  """
  length = min(len(ids) for ids, _ in conversations)
  first = conversations[0][0][:length]
  ends = np.zeros(length, bool)
  for ids, labels in conversations:
    ends |= (ids[:length] != first) | (labels[:length] != IGNORE_INDEX)
  return int(ends.argmax()) if ends.any() else length


class _Turn(NamedTuple):
  role: str
  value: str
  learned: bool = True


class ChatTokenizer:
  """Writes conversations by a template, tokenizes them and marks what is supervised.

  Holds its own copy of the `tokenizers` object below the transformers tokenizer: worker processes then need
  not import transformers, and no call elsewhere can switch padding or truncation on underneath. (Calling the
  transformers object would also cost about 1 ms a time.)

  Attributes:
    template: how turns are written.
    image_token_id: id of `<IMG_CONTEXT>`, at whose places the features of the image go.
    stop_token_id: id that ends an answer.
    pad_token_id: id that the tokenizer fills with; None if it has none.
  """

  def __init__(self, tokenizer: Any, template: Template | str, *, rows: int | None = None):
    """Copies the tokenizer and looks up the tokens it must have.

    Args:
      tokenizer: a fast transformers tokenizer that has the three image tokens.
      template: a template or its name.
      rows: ids that the model can look up; texts that have others are refused. None: all.

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
    known = self._backend.get_vocab()
    self._beyond = {i: token for token, i in known.items() if rows is not None and i >= rows}
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
    self.pad_token_id: int | None = getattr(tokenizer, "pad_token_id", None)
    # SentencePiece's vocabularies put a space before each text, also before one that follows a special token; their
    # decoders take off the first one only.
    probe = IMAGE_START + "a" + IMAGE_END + "a"
    self._pads_texts = (
      self.decode(self._backend.encode(probe, add_special_tokens=False).ids, special=True) != probe
    )

  @property
  def leading_ids(self) -> list[int]:
    """The start of every conversation: the bos token, or nothing."""
    return list(self._start)

  def lay_out(self, conversations: Sequence[Mapping[str, str]], num_images: int, where: Where) -> Chat:
    r"""Tokenizes a conversation, with one token for each image.

    The template says whether the whole text is tokenized at once or each turn on its own. `<image>` in a
    human turn becomes `<img>`, the image's token and `</img>`; in other turns it is plain text. A first
    system turn takes the place of the template's. Supervised are the answers and the token that closes them,
    found by the characters from which tokens come, so no count of tokens can go wrong. For `internvl2_5`:

        [human "<image>\nHi", gpt "Yo"]
        -> system turn, <|im_start|>user\n<img><IMG_CONTEXT></img>\nHi<|im_end|>\n
           <|im_start|>assistant\n[Yo<|im_end|>]\n        with what is in [] as labels

    Args:
      conversations: turns as `{"from": "system" | "human" | "gpt", "value": text}`; an answer with `"loss": False` is
        not supervised. Left as they are.
      num_images: images of the sample.
      where: the line of the conversation, for errors.

    Raises:
      DataError: a turn is malformed, or `<image>` and images differ in number.
    """
    turns = self._arranged(_checked_turns(conversations, where), where)
    found = sum(turn.value.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "human")
    if found != num_images:
      others = sum(turn.value.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role != "human")
      note = f" ({others} more in other turns, where it is plain text)" if others else ""
      raise where.error(
        f"{found} {IMAGE_PLACEHOLDER} in the human turns{note} but {num_images} images; make the numbers equal"
      )
    texts = [turns] if self.template.whole else [[turn] for turn in turns]
    ids, labels = zip(*(self._tokenize(text, last=text is texts[-1]) for text in texts), strict=True)
    start = np.array(self._start, np.int32)
    chat_ids = np.concatenate([start, *ids])
    for index in self._beyond.keys() & set(chat_ids.tolist()) if self._beyond else ():
      raise where.error(
        f"the text has {self._beyond[index]!r}, token {index} of the tokenizer, which the model has no row for; take "
        "it out"
      )
    contexts = np.flatnonzero(chat_ids == self.image_token_id)
    if len(contexts) != num_images:
      raise where.error(
        f"{len(contexts)} {IMAGE_CONTEXT} tokens for {num_images} images: the text itself contains "
        f"{IMAGE_CONTEXT}; take it out"
      )
    return Chat(chat_ids, np.concatenate([np.full_like(start, IGNORE_INDEX), *labels]), contexts)

  def encode(
    self, conversations: Sequence[Mapping[str, str]], image_tokens: Sequence[int], where: Where
  ) -> ChatTokens:
    """Tokenizes a conversation whose images take so many tokens, in order; see `lay_out`."""
    return self.lay_out(conversations, len(image_tokens), where).expand(image_tokens)

  def fingerprint(self) -> str:
    """A hash of all that ids depend on."""
    text = f"{self._backend.to_str()} {self.template} {self._start}{sorted(self._beyond) or ''}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  def vocabulary(self) -> str:
    """A hash of the tokens, and of the ids of a text of many kinds: it outlives a library's new version.

    `fingerprint` is of the backend as the library writes it, which is exact, but not the same in all versions.
    """
    tokens = sorted(self._backend.get_vocab(with_added_tokens=True).items())
    ids = self._backend.encode(_MANY_KINDS, add_special_tokens=False).ids
    return hashlib.sha256(repr((tokens, ids, self._start)).encode()).hexdigest()[:16]

  def decode(self, ids: Sequence[int] | np.ndarray, *, special: bool = False) -> str:
    """The text of token ids, with or without the special tokens' names."""
    return self._backend.decode([int(i) for i in ids], skip_special_tokens=not special)

  def decode_answer(self, ids: Sequence[int] | np.ndarray) -> str:
    """The text of an answer that was generated, as data would write it.

    Special tokens (`<ref>`, `<box>`, `<think>`, ...) are a part of it. What the template puts before an answer is left
    out, and padding at its ends.

    Args:
      ids: the answer's, without the token that ended it.
    """
    opening = self._backend.encode(self.template.answer_opening, add_special_tokens=False).ids
    ids = [int(i) for i in ids]
    ends = [i for i in range(len(opening), len(ids) + 1) if ids[i - len(opening) : i] == opening]
    ids = ids[ends[-1] :] if opening and ends else ids
    while ids and ids[-1] == self.pad_token_id:
      ids.pop()
    while ids and ids[0] == self.pad_token_id:
      ids.pop(0)
    if not self._pads_texts:
      return self.decode(ids, special=True)
    runs = itertools.groupby(ids, key=self._backend.get_added_tokens_decoder().__contains__)
    return "".join(self.decode(list(run), special=True) for _, run in runs)

  def _leading_ids(self, tokenizer: Any) -> list[int]:
    """The bos token where conversations begin with one."""
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

  def _arranged(self, turns: list[_Turn], where: Where) -> list[_Turn]:
    """The turns that are written, the system's first."""
    template = self.template
    if template.alternates:
      for number, (turn, following) in enumerate(itertools.pairwise(turns), 1):
        if turn.role == following.role:
          raise where.error(
            f"turns {number} and {number + 1} are both from {turn.role!r}, but in template {template.name!r} human and "
            "gpt take turns; join the two or drop one"
          )
    if turns[0].role != "system" and template.system_message is not None:
      turns = [_Turn("system", template.system_message), *turns]
    first = int(turns[0].role == "system")
    if template.alternates and turns[first:] and turns[first].role == "gpt":
      del turns[first]
    return [turn._replace(value=turn.value.strip()) for turn in turns] if template.strips else turns

  def _tokenize(self, turns: Sequence[_Turn], *, last: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of turns tokenized as one text, where an image has one context token.

    Args:
      turns: of the text.
      last: whether the conversation ends with them.
    """
    template = self.template
    parts: list[str] = []
    answers: list[tuple[int, int]] = []  # The characters of each, closing included.
    end = 0
    for number, (role, value, learned) in enumerate(turns, 1):
      if role == "human":
        value = value.replace(IMAGE_PLACEHOLDER, IMAGE_START + IMAGE_CONTEXT + IMAGE_END)
      opening, closing = template.openings[role], template.closings[role]
      if role == "gpt" and last and number == len(turns) and template.last_closing is not None:
        closing = template.last_closing
      begin = end + len(opening.removesuffix(template.answer_opening).rstrip(" "))
      parts += (opening, value, closing)
      end += sum(map(len, parts[-3:]))
      if role == "gpt" and learned:
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


def with_placeholder(conversations: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
  """The turns with `<image>` and a line break before the first human one, if no human turn has it.

  The reference looks at the first turn whatever its role; where that is not the human's, its `<image>` would
  stay plain text, so ours goes where an image can be.
  """
  turns = list(conversations)
  texts = human_texts(turns)
  if texts and not any(IMAGE_PLACEHOLDER in text for text in texts.values()):
    first = min(texts)
    turns[first] = {**turns[first], "value": f"{IMAGE_PLACEHOLDER}\n{texts[first]}"}
  return turns


def human_texts(turns: Sequence[Any]) -> dict[int, str]:
  """The texts of the human turns by their number from 0.

  Turns without a text are left out, and as they are: they are named when the conversation is tokenized.
  """
  return {
    number: turn["value"]
    for number, turn in enumerate(turns)
    if isinstance(turn, Mapping) and turn.get("from") == "human" and isinstance(turn.get("value"), str)
  }


def _checked_turns(conversations: Any, where: Where) -> list[_Turn]:
  if not isinstance(conversations, Sequence) or isinstance(conversations, str) or not conversations:
    found = "an empty list" if isinstance(conversations, list) else type(conversations).__name__
    raise where.error(f"'conversations' must be a list of at least one turn, got {found}")
  turns = []
  for number, turn in enumerate(conversations, 1):
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str) or "from" not in turn:
      foreign = isinstance(turn, Mapping) and {"role", "content"} & turn.keys()
      hint = "; name 'role' 'from' and 'content' 'value'" if foreign else ""
      raise where.error(f'turn {number} must be {{"from": role, "value": text}}, got {shown(turn)}{hint}')
    role = turn["from"]
    if role not in _ROLES:
      meant = _OTHER_ROLES.get(role) if isinstance(role, str) else None
      hint = f"; did you mean {meant!r}?" if meant else did_you_mean(str(role)[:40], _ROLES)
      raise where.error(f"turn {number} is from {shown(role, repr)}{hint}")
    if role == "system" and number > 1:
      raise where.error(f"turn {number} is from 'system', which must be turn 1; move it")
    check_characters(turn["value"], f"turn {number}", where)
    turns.append(_Turn(role, turn["value"], turn.get("loss") is not False))
  return turns


def check_characters(text: str, name: str, where: Where) -> None:
  """Refuses a text that cannot be encoded.

  Raises:
    DataError: it has half of a surrogate pair.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise where.error(
      f"{name}: character {error.start + 1} is {error.object[error.start]!r}, half of a surrogate pair; "
      "write the character whole"
    ) from None
