"""Lines as other trainers write them, made lines of ours; what would be lost or changed by that is refused.

    {"images": ["a.png"], "system": "Be brief.", "conversations": [..., {"from": "gpt", "value": "A cat.", "loss": false}]}
    -> {"image": ["a.png"], "conversations": [{"from": "system", ...}, ..., {"from": "gpt", ..., "loss": False}]}

docs/data.md has the table of what is honoured. `keys` says what other keys mean.
"""

import functools
from collections.abc import Iterator
from typing import Any

from internvl_jax.data.sample import keys, preference
from internvl_jax.data.where import Where, shown

SYSTEM_KEYS = preference.SYSTEM_KEYS

_MEDIA = ("image", "video")
_SIZES = ("width", "height", "width_list", "height_list")
_OURS = frozenset((*_MEDIA, *_SIZES, "clip", "conversations"))
_OURS_OF_PAIRS = frozenset((*_MEDIA, *_SIZES, "clip", *preference.KEYS, *SYSTEM_KEYS))
_READ = frozenset((*_MEDIA, *_SIZES, "clip", "images", "videos", *SYSTEM_KEYS))
_SYSTEM = frozenset(SYSTEM_KEYS)
# Keys that mean something by their value, of those that are notes else.
_SPECIAL = frozenset(("label", "objects", "margin", "images", "videos", *SYSTEM_KEYS, *keys.CUTS))
_BOTH = frozenset(("conversations", *preference.KEYS))
_TURN = frozenset(("from", "value"))

_REMEDIES: dict[str, str] = {
  "media": "an image is read from 'image' or 'images', a video from 'video' or 'videos'; rename the key or take it out",
  "mask": (
    "what is learned is said in turns by 'loss': true or false (or 1 or 0 under 'loss', 'loss_mask', 'weight'); write it "
    "there, or take the key out"
  ),
  "roles": "texts are read from the turns of 'conversations' and from 'system'; move it there, or take the key out",
}
_PAIR_ROLES = (
  "texts are read from 'question', 'chosen', 'rejected' and 'system'; move it there, or take the key out"
)
# Marks that ms-swift replaces by what 'objects' says.
_OBJECT_MARKS = ("<ref-object>", "<bbox>")

# Keys by which a line of another format is known, and what it is.
_FORMATS: tuple[tuple[set[str], str], ...] = (
  (
    {"messages"},
    "it has 'messages', as OpenAI, ms-swift and TRL write them: name them 'conversations', and in turns 'role' 'from' "
    "('user' is 'human', 'assistant' 'gpt') and 'content' 'value'",
  ),
  (
    {"query", "response"},
    "it has 'query' and 'response', as ms-swift writes them: make them turns of 'human' and 'gpt'",
  ),
  (
    {"instruction", "output"},
    "it has 'instruction' and 'output', as Alpaca: make them turns of 'human' and 'gpt'",
  ),
  (
    {"prompt", "completion"},
    "it has 'prompt' and 'completion', as TRL: make them turns of 'human' and 'gpt'",
  ),
  ({"conversation"}, "it has 'conversation'; did you mean 'conversations'?"),
  ({"root", "annotation"}, "it is an entry of a meta file, which data.meta_path names"),
)


def plain_record(record: Any, where: Where, *, is_pair: bool = False) -> dict[str, Any]:
  """Returns a line with our keys alone; the line itself is left as it is.

  Args:
    record: the parsed line.
    where: where it stands, for errors.
    is_pair: it is to be a preference pair.

  Raises:
    DataError: it is none, or something in it would change what is seen or learned and is not read.
  """
  if not isinstance(record, dict):
    raise where.error(f"expected a JSON object, got {type(record).__name__}")
  if is_pair:
    preference.check_keys(record, where)
  elif "conversations" not in record:
    raise where.error(_without_conversations(record))
  plain, looked_at = record, _looked_at(tuple(record), is_pair)
  if looked_at:
    plain = {key: record[key] for key in (_OURS_OF_PAIRS if is_pair else _OURS) & record.keys()}
    plain |= _media(record, where)
    _check_others(record, looked_at, plain, where, is_pair=is_pair)
  if plain.get("clip") and not plain.get("video") and not isinstance(plain["clip"], float | int):
    raise where.error(
      f"'clip' {shown(plain['clip'])} cuts a video, but the line has none; take it out or name it"
    )
  return (
    plain if is_pair or _are_plain(plain["conversations"], looked_at) else _with_turns(record, plain, where)
  )


def passed_over(record: dict[str, Any], *, is_pair: bool = False) -> Iterator[str]:
  """Yields what of a line that `plain_record` takes is not read, as a key or something like it in quotes.

  Args:
    record: the parsed line.
    is_pair: it is a preference pair.
  """
  read = _READ.union(preference.KEYS if is_pair else ("conversations",))
  yield from (f"{key!r}" for key in record if key not in read)
  if is_pair:
    return
  turns = record["conversations"]
  for turn in turns if isinstance(turns, list) else ():
    if isinstance(turn, dict):
      yield from (f"{key!r} of a turn" for key in turn if key not in _TURN and key not in keys.FLAGS)


@functools.lru_cache(maxsize=1024)
def _looked_at(names: tuple[str, ...], is_pair: bool) -> tuple[str, ...]:
  """Returns the keys of a line that are not simply read or passed over; lines of a file have few sets of keys."""
  ours = _OURS_OF_PAIRS if is_pair else _OURS
  both = _BOTH if set(names) >= _BOTH else frozenset()  # The setting says which of the two is meant.
  return tuple(
    name
    for name in names
    if name not in ours and name not in both and (name in _SPECIAL or not keys.is_note(name))
  )


def _are_plain(turns: Any, looked_at: tuple[str, ...]) -> bool:
  """Says whether the turns are as they should be, and no system message stands beside them; fast."""
  if (looked_at and not _SYSTEM.isdisjoint(looked_at)) or not isinstance(turns, list):
    return not isinstance(turns, list)
  for turn in turns:
    if type(turn) is not dict or len(turn) != 2 or "from" not in turn:
      return False
    if turn["from"] == "gpt":
      value = turn.get("value")
      if type(value) is not str or not value or value.isspace():
        return False
  return True


def _media(record: dict[str, Any], where: Where) -> dict[str, Any]:
  """Returns `image` and `video` as other trainers' plural keys say them."""
  found = {}
  for key in _MEDIA:
    several = f"{key}s"
    value = record.get(several)
    if keys.says_nothing(value):
      continue
    if not keys.says_nothing(record.get(key)):
      raise where.error(f"the line has both {key!r} and {several!r}; keep one")
    entries = [_path_of(entry, several, where) for entry in (value if isinstance(value, list) else [value])]
    if key == "video" and len(entries) > 1:
      raise where.error(f"'videos' has {len(entries)} videos, and a line may have one; write a line for each")
    found[key] = entries[0] if key == "video" else entries
  return found


def _path_of(entry: Any, key: str, where: Where) -> Any:
  """Returns what an entry of `images` or `videos` names: a path, or the frames of a video."""
  if isinstance(entry, dict) and not keys.says_nothing(entry.get("path")):
    rest = {name: value for name, value in entry.items() if name != "path" and not keys.says_nothing(value)}
    entry = entry if rest else entry["path"]
  frames = key == "videos" and isinstance(entry, list) and entry and all(isinstance(x, str) for x in entry)
  if frames or (isinstance(entry, str) and entry):
    return entry
  raise where.error(
    f"{key!r} must be a list of paths, got {shown(entry)}; write what it holds into a file, and the file's path here"
  )


def _check_others(
  record: dict[str, Any], looked_at: tuple[str, ...], plain: dict[str, Any], where: Where, *, is_pair: bool
) -> None:
  """Refuses keys that are not read and would change what is seen or learned."""
  media = [path for key in _MEDIA for path in _paths(plain.get(key))]
  has_video = not keys.says_nothing(plain.get("video"))
  for key in looked_at:
    value = record[key]
    if key in _READ:
      continue
    kind = keys.changes(key, value, "line", media)
    if kind is not None:
      raise where.error(_refusal(f"key {key!r}", key, value, kind, "line", is_pair=is_pair))
    if has_video and key in keys.CUTS and not keys.says_nothing(value):
      raise where.error(
        f"key {key!r} {shown(value)} is not read, and the line has a video; write 'clip': [start, end] in seconds"
      )
    if key == "objects" and not keys.says_nothing(value):
      _check_objects(record, where)
    if key == "margin" and is_pair and value:
      raise where.error(
        f"key 'margin' {shown(value)} is not read: no loss has a margin of the line's; take it out"
      )
    if key == "label" and value is False:
      raise where.error("key 'label' is false: the line is not to be learned as it stands; delete the line")


def _check_objects(record: dict[str, Any], where: Where) -> None:
  texts = json_text(record)
  for mark in _OBJECT_MARKS:
    if mark in texts:
      raise where.error(
        f"{mark} in the texts stands for what 'objects' says, which is not read; write names and boxes into the texts, "
        "as <ref>name</ref><box>[[x1, y1, x2, y2]]</box>"
      )


def json_text(record: dict[str, Any]) -> str:
  """Returns the texts of a line that are seen or learned, end to end."""
  turns = record.get("conversations")
  values = [turn.get("value") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
  return "\n".join(str(text) for text in [*values, *(record.get(key) for key in preference.KEYS)])


def _with_turns(record: dict[str, Any], plain: dict[str, Any], where: Where) -> dict[str, Any]:
  """Returns a line whose turns have our keys alone, the line's system message among them.

  The tokenizer says what is wrong about turns that are none.
  """
  turns = plain["conversations"]
  changed = [_plain_turn(turn, number, where) for number, turn in enumerate(turns, 1)]
  system = None
  if any(key in record for key in SYSTEM_KEYS):
    system = preference.system_of(record, where)
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
  """Returns a turn of `from`, `value` and, where it is not learned, `"loss": False`."""
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
    kind = keys.changes(key, value, "turn", ())
    if kind is not None:
      raise where.error(_refusal(f"turn {number}: key {key!r}", key, value, kind, "turn"))


_ROLE_NAMES = {"user": "human", "assistant": "gpt"}


def _refusal(
  blame: str, key: str, value: Any, kind: keys.Kind, place: keys.Place, *, is_pair: bool = False
) -> str:
  near = keys.nearest(key, place)
  hint = f"; did you mean {near!r}?" if near else ""
  remedy = _PAIR_ROLES if is_pair and kind == "roles" else _REMEDIES[kind]
  if is_pair and kind == "mask":
    remedy = "both answers of a pair are judged in full; take the key out, or delete the line"
  if place == "turn" and kind == "media":
    remedy = "media belong to the line: move it to 'image' or 'video' there, with <image> or <video> in the turn's text"
  return f"{blame} {shown(value)} is not read, and would change what is {_CHANGED[kind]}{hint}; {remedy}"


_CHANGED: dict[str, str] = {"media": "seen", "mask": "learned", "roles": "said"}


def _without_conversations(record: dict[str, Any]) -> str:
  """Says what is wrong about a line without conversations."""
  if record.keys() >= set(preference.KEYS):
    return (
      "key 'conversations' is missing; the line is a preference pair, of 'chosen' and 'rejected', which needs "
      "preference.loss_type, such as 'sigmoid'; set it, or give lines with 'conversations'"
    )
  for known, what in _FORMATS:
    if record.keys() >= known:
      return f"key 'conversations' is missing; {what} (docs/data.md)"
  return f"key 'conversations' is missing; the line has {_shown_keys(record)}"


def _shown_keys(record: dict[str, Any]) -> str:
  return (
    ", ".join(map(repr, list(record)[:20])) + (", ..." if len(record) > 20 else "") if record else "no key"
  )


def _paths(value: Any) -> list[str]:
  return [path for path in (value if isinstance(value, list) else [value]) if isinstance(path, str) and path]
