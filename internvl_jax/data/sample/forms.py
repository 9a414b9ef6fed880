r"""Forms of a conversation, as other trainers write it, and what each is in the reference's form.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
                  {"role": "assistant", "content": "A cat."}]}
    -> {"image": ["a.png"], "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]}

The form is that of a dataset, told by the shape of its first records. What is converted is then read as any other line, so
that all keys that a form does not say are honored, refused or passed over as elsewhere.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from internvl_jax.data.sample import keys
from internvl_jax.data.where import Where, shown

NATIVE = "conversations"
"""The reference's form."""

_ROLES = {
  **dict.fromkeys(("human", "user"), "human"),
  **dict.fromkeys(("gpt", "assistant", "bot", "model", "chatgpt"), "gpt"),
  **dict.fromkeys(("system", "developer"), "system"),
}
# What vision formats of messages say of an image beside it, for models that scale it otherwise.
_SCALING = frozenset(("min_pixels", "max_pixels", "resized_height", "resized_width", "detail"))
_VALUES = ("image", "image_url", "video", "video_url", "url", "path", "bytes", "base64", "data")
_ONE_FORM = "write all lines of a dataset in one form"

Convert = Callable[[dict[str, Any], Where], dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
  """A form of a record.

  Attributes:
    name: in words.
    matches: whether a record is of it, by its shape.
    convert: what a record is in the reference's form; the record stays as it is.
  """

  name: str
  matches: Callable[[Mapping[str, Any]], bool]
  convert: Convert


def form_of(records: Iterable[Any], forms: Mapping[str, Form]) -> str:
  """The form that the first of some records has which has one; the reference's if none has."""
  for record in records:
    if isinstance(record, dict):
      for key, form in forms.items():
        if form.matches(record):
          return key
  return NATIVE


def converted(record: Any, where: Where, form: str, forms: Mapping[str, Form]) -> Any:
  """A record in the reference's form.

  Args:
    record: as it was read.
    where: its file and line, for errors.
    form: of its dataset.
    forms: all that there are.

  Raises:
    DataError: it is of another form, or has something that the reference's form cannot say.
  """
  if form == NATIVE or not isinstance(record, dict):
    return record  # Whoever reads it says what is wrong.
  if not forms[form].matches(record):
    names = ", ".join(map(repr, list(record)[:20])) or "no key"
    raise where.error(
      f"it is not of the form of the dataset's first line, {forms[form].name}: it has {names}; {_ONE_FORM}"
    )
  return forms[form].convert(record, where)


# --- Turns --------------------------------------------------------------------------------------------------


class PartMedia:
  """The images and videos that the parts of a record's messages bring along, in order.

  Attributes:
    found: those that parts say, by their kind.
    places: how many parts there are of each kind.
  """

  def __init__(self):
    self.found: dict[str, list[Any]] = {"image": [], "video": []}
    self.places = {"image": 0, "video": 0}

  def put_into(self, record: dict[str, Any], where: Where) -> dict[str, Any]:
    """The record with them; where parts are places alone, those beside the messages are meant.

    Raises:
      DataError: some parts say what they are and others do not, or the line says it as well.
    """
    for kind, values in self.found.items():
      if not values:
        continue
      if len(values) < self.places[kind]:
        raise where.error(
          f"{len(values)} of {self.places[kind]} parts of type {kind!r} say which {kind} they are; let all of them, or none"
        )
      key = next((key for key in (kind, f"{kind}s") if not keys.says_nothing(record.get(key))), None)
      if key is not None:
        raise where.error(
          f"parts of type {kind!r} say which {kind} they are, and {key!r} of the line does, too; keep one"
        )
      record[kind] = values
    return record


def read_turns(messages: Any, name: str, media: PartMedia, where: Where) -> list[dict[str, Any]]:
  """Turns of `from` and `value`, with what else the messages say.

  Args:
    messages: of `from` and `value`, or of `role` and `content`.
    name: of their key, for errors.
    media: gets what their parts bring along.
    where: the line, for errors.

  Raises:
    DataError: they are no list of messages, or one is of a role or has a part that is not read.
  """
  if not isinstance(messages, list) or not messages:
    raise where.error(f"{name!r} must be a list of at least one message, got {shown(messages)}; correct it")
  return [_turn(message, number, media, where) for number, message in enumerate(messages, 1)]


def _turn(message: Any, number: int, media: PartMedia, where: Where) -> dict[str, Any]:
  if not isinstance(message, dict):
    raise where.error(f"turn {number} must be an object, got {shown(message)}; correct it")
  names = ("from", "value") if "from" in message else ("role", "content")
  missing = [name for name in names if name not in message]
  if missing:
    raise where.error(f"turn {number} has no {missing[0]!r}: {shown(message)}; {_ONE_FORM}")
  said, content = message[names[0]], message[names[1]]
  role = _ROLES.get(said) if isinstance(said, str) else None
  if role is None:
    raise where.error(
      f"turn {number} is from {shown(said, repr)}: turns are from {', '.join(_ROLES)}; there is no template here for others, "
      "so write it into a turn of these, or delete the line"
    )
  rest = {key: value for key, value in message.items() if key not in names}
  return {"from": role, "value": _text(content, number, media, where), **rest}


def _text(content: Any, number: int, media: PartMedia, where: Where) -> Any:
  """The text of a turn; an image or a video among its parts is a placeholder and a line break."""
  if not isinstance(content, list):
    return "" if content is None else content
  return "".join(_part(part, number, media, where) for part in content)


def _part(part: Any, number: int, media: PartMedia, where: Where) -> str:
  if isinstance(part, str):
    return part
  said = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
  kind = str(said.get("type", "text" if "text" in said else "")).removesuffix("_url")
  others = said.keys() - {"type"} - _SCALING
  if kind == "text" and others == {"text"} and isinstance(said["text"], str):
    return said["text"]
  values = [said[key] for key in _VALUES if key in others]
  # Tables have all fields in every part: an empty text beside an image says nothing.
  others -= {"text"} if not said.get("text") else set()
  if kind not in media.found or len(values) > 1 or not others <= set(_VALUES):
    raise where.error(
      f"turn {number} has a part that is not read: {shown(part)}; parts are of type 'text', 'image' or 'video'"
    )
  media.places[kind] += 1
  media.found[kind] += [_source(value) for value in values]
  return f"<{kind}>\n"


def _source(value: Any) -> Any:
  if isinstance(value, dict) and "url" in value and value.keys() - _SCALING == {"url"}:
    value = value["url"]
  return value.removeprefix("file://") if isinstance(value, str) else value


# --- Forms of conversations ---------------------------------------------------------------------------------


def _has_native_turns(record: Mapping[str, Any]) -> bool:
  turns = record.get("conversations")
  if not isinstance(turns, list):
    return "conversations" in record
  native = ("human", "gpt", "system")
  return all(isinstance(turn, dict) and turn.get("from") in native and "value" in turn for turn in turns)


def _has(*names: str) -> Callable[[Mapping[str, Any]], bool]:
  return lambda record: all(name in record for name in names) and "conversations" not in record


def _from_list(name: str) -> Convert:
  """Converts a record whose turns are under a name."""

  def convert(record: dict[str, Any], where: Where) -> dict[str, Any]:
    media = PartMedia()
    turns = read_turns(record[name], name, media, where)
    rest = {key: value for key, value in record.items() if key != name}
    return media.put_into({**rest, "conversations": turns}, where)

  return convert


def _from_query(record: dict[str, Any], where: Where) -> dict[str, Any]:
  """Converts query and response, with earlier pairs of both as `history`."""
  rest = {key: value for key, value in record.items() if key not in ("query", "response", "history")}
  history = [] if keys.says_nothing(record.get("history")) else record["history"]
  if not isinstance(history, list) or any(not isinstance(p, list) or len(p) != 2 for p in history):
    raise where.error(f"'history' must be a list of [query, response], got {shown(history)}; correct it")
  pairs = [*history, [record["query"], record["response"]]]
  return {**rest, "conversations": [turn for pair in pairs for turn in _pair(*pair)]}


def _from_pair(question: str, answer: str) -> Convert:
  """Converts a record of one question and one answer."""

  def convert(record: dict[str, Any], where: Where) -> dict[str, Any]:
    del where
    rest = {key: value for key, value in record.items() if key not in (question, answer)}
    return {**rest, "conversations": _pair(record[question], record[answer])}

  return convert


def _from_prompt(record: dict[str, Any], where: Where) -> dict[str, Any]:
  """Converts prompt and completion: texts, or lists of messages, of which the completion's alone are learned."""
  prompt, completion = record["prompt"], record["completion"]
  if not isinstance(prompt, list) and not isinstance(completion, list):
    return _from_pair("prompt", "completion")(record, where)
  media = PartMedia()
  turns = read_turns(prompt, "prompt", media, where)
  turns = [{**turn, "loss": False} if turn["from"] == "gpt" else turn for turn in turns]
  turns += read_turns(completion, "completion", media, where)
  rest = {key: value for key, value in record.items() if key not in ("prompt", "completion")}
  return media.put_into({**rest, "conversations": turns}, where)


def _pair(question: Any, answer: Any) -> list[dict[str, Any]]:
  return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def as_it_is(record: dict[str, Any], where: Where) -> dict[str, Any]:
  """The record itself, of the reference's form."""
  del where
  return record


CONVERSATION_FORMS: dict[str, Form] = {
  NATIVE: Form(name="'conversations' of 'from' and 'value'", matches=_has_native_turns, convert=as_it_is),
  "sharegpt": Form(
    name="'conversations' with roles of ShareGPT",
    matches=lambda record: isinstance(record.get("conversations"), list),
    convert=_from_list("conversations"),
  ),
  "messages": Form(
    name="'messages' of 'role' and 'content'", matches=_has("messages"), convert=_from_list("messages")
  ),
  "query": Form(name="'query' and 'response'", matches=_has("query", "response"), convert=_from_query),
  "prompt": Form(
    name="'prompt' and 'completion'", matches=_has("prompt", "completion"), convert=_from_prompt
  ),
  "question": Form(
    name="'question' and 'answer'",
    matches=_has("question", "answer"),
    convert=_from_pair("question", "answer"),
  ),
}
"""Forms of lines with one conversation, in the order in which they are tried."""
