"""Lines with a conversation, as supervised fine-tuning has them: the default kind of line.

{"image": "a.png", "system": "Be brief.", "conversations": [..., {"from": "gpt", "value": "A cat.", "loss": false}]}
-> {"image": "a.png", "conversations": [{"from": "system", ...}, ..., {"from": "gpt", ..., "loss": False}]}
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from internvl_jax.data.sample import forms, keys, line_keys
from internvl_jax.data.sample.fitting import Limited, Limits, limited
from internvl_jax.data.sample.line_keys import LineKeys, OtherKind
from internvl_jax.data.sample.templates import Template
from internvl_jax.data.sample.tokenize import Chat
from internvl_jax.data.where import Where, shown

_TURN = frozenset(("from", "value"))
_NOWHERE = Where("", "", 0)  # of a line that was read without an error before
_ROLE_NAMES = {"user": "human", "assistant": "gpt"}
_MASK_REMEDY = (
  "what is learned is said in turns by 'loss': true or false (or 1 or 0 under 'loss', 'loss_mask', 'weight'); write it "
  "there, or take the key out"
)
_ROLES_REMEDY = (
  "texts are read from the turns of 'conversations' and from 'system'; move it there, or take the key out"
)
_TURN_MEDIA_REMEDY = (
  "media belong to the line: move it to 'image' or 'video' there, with <image> or <video> in the turn's text"
)
_TURN_REMEDIES = {"media": _TURN_MEDIA_REMEDY, "mask": _MASK_REMEDY, "roles": _ROLES_REMEDY}
# Lines of other formats, known by their keys.
_OTHER_FORM = "and the dataset's first lines have no such form; write all lines of a dataset in one form"
_FORMATS = tuple(
  OtherKind(texts, f"key 'conversations' is missing; {what} (docs/data.md)")
  for texts, what in (
    (("messages",), f"it has 'messages', {_OTHER_FORM}"),
    (("query", "response"), f"it has 'query' and 'response', {_OTHER_FORM}"),
    (("prompt", "completion"), f"it has 'prompt' and 'completion', {_OTHER_FORM}"),
    (("question", "answer"), f"it has 'question' and 'answer', {_OTHER_FORM}"),
    (
      ("instruction", "output"),
      "it has 'instruction' and 'output', as Alpaca: make them turns of 'human' and 'gpt'",
    ),
    (("conversation",), "it has 'conversation'; did you mean 'conversations'?"),
    (("root", "annotation"), "it is an entry of a meta file, which data.meta_path names"),
  )
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversationLines:
  """Lines of one conversation each; see `lines.LineSchema`.

  Attributes:
    others: other kinds of lines that files may hold.
    form: in which lines are written, a key of `forms.CONVERSATION_FORMS`.
  """

  others: tuple[OtherKind, ...] = ()
  form: str = forms.NATIVE

  kind = "conversations"
  names: tuple[str, ...] = ()
  frame_name = "Frame-"
  longest_name = "data.max_seq_length"
  taught_hint = "that the conversations have 'gpt' turns and "

  @property
  def facts(self) -> dict[str, Any]:
    """Nothing: what is kept on disk of conversations has no mark."""
    return {}

  @functools.cached_property
  def keys(self) -> LineKeys:
    """Where its texts are."""
    return LineKeys(
      texts=("conversations",),
      others=self.others,
      formats=_FORMATS,
      mask_remedy=_MASK_REMEDY,
      roles_remedy=_ROLES_REMEDY,
    )

  @property
  def form_name(self) -> str:
    """The form in which its lines are written, in words."""
    return forms.CONVERSATION_FORMS[self.form].name

  def recognized(self, records: Iterable[Any]) -> Self:
    """Lines in the form of a dataset's first records."""
    return dataclasses.replace(self, form=forms.form_of(records, forms.CONVERSATION_FORMS))

  def plain(self, record: Any, where: Where) -> dict[str, Any]:
    """A line with our keys alone, its system message among the turns.

    Raises:
      DataError: see `line_keys.plain_record`; or a turn has something that would change what is seen or learned, or the
        line is of another form.
    """
    record = forms.converted(record, where, self.form, forms.CONVERSATION_FORMS)
    plain = line_keys.plain_record(record, where, self.keys)
    has_system = any(key in record for key in line_keys.SYSTEM_KEYS)
    return plain if _are_plain(plain["conversations"], has_system) else _with_turns(record, plain, where)

  def unread(self, record: Mapping[str, Any], plain: Mapping[str, Any], template: Template) -> Iterator[str]:
    """Yields what of a line is not read, and what else one should know about it."""
    record = forms.converted(record, _NOWHERE, self.form, forms.CONVERSATION_FORMS)
    yield from line_keys.unread_keys(record, self.keys)
    turns = record["conversations"]
    for turn in turns if isinstance(turns, list) else ():
      if isinstance(turn, dict):
        yield from (f"{key!r} of a turn" for key in turn if key not in _TURN and key not in keys.FLAGS)
    if template.alternates and _begins_with_answer(plain["conversations"]):
      yield "an answer before the first question"

  def conversations(self, record: Mapping[str, Any], where: Where) -> list[Any]:
    """The conversation."""
    del where
    return [record["conversations"]]

  def check_places(self, conversations: Sequence[Any], num_images: int, where: Where) -> None:
    """Leaves it to the tokenizer, which compares the places of images with the images."""

  def check_chats(self, chats: Sequence[Chat], where: Where) -> None:
    """Takes any conversation; one that teaches nothing is counted, not refused."""

  def shared_tokens(self, chats: Sequence[Chat], image_tokens: Sequence[int]) -> int:
    """Always 0: there is one conversation."""
    del chats, image_tokens
    return 0

  def limited(
    self,
    chats: Sequence[Chat],
    tiles: Sequence[int],
    tokens_per_tile: int,
    limits: Limits,
    where: Where,
    shared: int,
  ) -> tuple[Limited, ...]:
    """Truncates or splits the conversation to the limits; see `fitting.limited`."""
    del shared
    return (limited(chats[0], tiles, tokens_per_tile, limits, where),)


CONVERSATION_LINES = ConversationLines()
"""Conversations, where no other kind of line is expected."""


def _are_plain(turns: Any, has_system: bool) -> bool:
  """Says whether the turns are as they should be, and no system message is beside them; fast."""
  if has_system or not isinstance(turns, list):
    return not isinstance(turns, list)
  for turn in turns:
    if type(turn) is not dict or len(turn) != 2 or "from" not in turn:
      return False
    if turn["from"] == "gpt":
      value = turn.get("value")
      if type(value) is not str or not value or value.isspace():
        return False
  return True


def _with_turns(record: dict[str, Any], plain: dict[str, Any], where: Where) -> dict[str, Any]:
  """A line whose turns have our keys alone, the line's system message among them.

  The tokenizer says what is wrong about turns that are none.
  """
  turns = plain["conversations"]
  changed = [_plain_turn(turn, number, where) for number, turn in enumerate(turns, 1)]
  system = None
  if any(key in record for key in line_keys.SYSTEM_KEYS):
    system = line_keys.system_of(record, where)
  if system is not None:
    first = changed[0] if changed and isinstance(changed[0], dict) else {}
    if first.get("from") != "system":
      changed = [{"from": "system", "value": system}, *changed]
    elif first.get("value") != system:
      raise where.error(
        f"the line has a system message beside the turns, {shown(system)}, and another as turn 1, "
        f"{shown(first.get('value'))}; keep one"
      )
  same = len(changed) == len(turns) and all(new is old for new, old in zip(changed, turns, strict=True))
  return plain if same else {**plain, "conversations": changed}


def _plain_turn(turn: Any, number: int, where: Where) -> Any:
  """A turn of `from`, `value` and, where it is not learned, `"loss": False`."""
  if not isinstance(turn, dict) or not turn.keys() >= _TURN:
    return turn
  learned = True
  if len(turn) > len(_TURN):
    learned = _is_learned(turn, number, where)
    _check_turn(turn, number, where)
    turn = {"from": turn["from"], "value": turn["value"], **({} if learned else {"loss": False})}
  if learned and turn["from"] == "gpt" and isinstance(turn["value"], str) and not turn["value"].strip():
    raise where.error(
      f"turn {number} is an answer without text, which would teach to say nothing; write one, delete the line, or say "
      "'loss': false in the turn"
    )
  return turn


def _is_learned(turn: dict[str, Any], number: int, where: Where) -> bool:
  """Says whether a turn is learned, by whatever flags it has."""
  said = {key: turn[key] for key in keys.FLAGS if key in turn and turn[key] is not None}
  for key, value in said.items():
    if not isinstance(value, bool | int | float) or value not in (0, 1):
      raise where.error(
        f"turn {number}: {key!r} must be true, false, 1 or 0, got {shown(value)}: answers are learned in full or not at "
        "all; correct it or take it out"
      )
  values = {key: bool(value) for key, value in said.items()}
  if len(set(values.values())) > 1:
    raise where.error(f"turn {number}: {', '.join(map(repr, values))} contradict each other; keep one")
  learned = all(values.values())
  asked = [key for key, value in said.items() if value and "weight" not in key]
  if turn["from"] != "gpt" and asked:
    raise where.error(
      f"turn {number}: {asked[0]!r} asks to learn a turn from {turn['from']!r}, and answers from 'gpt' alone are learned; "
      "take it out"
    )
  return learned


def _check_turn(turn: dict[str, Any], number: int, where: Where) -> None:
  """Refuses keys of a turn that are not read and would change what is seen or learned."""
  for key, value in turn.items():
    if key in _TURN or key in keys.FLAGS or value == turn["value"]:
      continue
    if key == "role" and isinstance(value, str) and _ROLE_NAMES.get(value, value) == turn["from"]:
      continue
    change = keys.changes(key, value, "turn", ())
    if change is not None:
      remedy = _TURN_REMEDIES[change]
      raise where.error(line_keys.refusal(f"turn {number}: key {key!r}", key, value, change, "turn", remedy))


def _begins_with_answer(turns: Any) -> bool:
  roles = (
    [turn.get("from") for turn in turns[:2] if isinstance(turn, dict)] if isinstance(turns, list) else []
  )
  return roles[:1] == ["gpt"] or roles == ["system", "gpt"]
