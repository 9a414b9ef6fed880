"""Forms of preference pairs, as other trainers write them; see `data.sample.forms`.

{"prompt": [{"role": "user", "content": "What?"}], "chosen": [{"role": "assistant", "content": "A cat."}],
 "rejected": [{"role": "assistant", "content": "A dog."}]}
-> {"question": "What?", "chosen": "A cat.", "rejected": "A dog."}
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from internvl_jax.data.sample import keys
from internvl_jax.data.sample.forms import NATIVE, Form, PartMedia, as_it_is, read_turns
from internvl_jax.data.where import Where


def _chosen_messages(record: Mapping[str, Any]) -> bool:
  return all(isinstance(record.get(key), list) for key in ("chosen", "rejected"))


def _from_chosen(record: dict[str, Any], where: Where) -> dict[str, Any]:
  """Converts lists of messages: a prompt and two answers, or two conversations of the same prompt."""
  media, both = PartMedia(), []
  prompt = record.get("prompt")
  for key in ("chosen", "rejected"):
    # The prompt is read for the first answer; its media count once.
    seen = PartMedia() if both else media
    before = [] if keys.says_nothing(prompt) else prompt if isinstance(prompt, list) else [_user(prompt)]
    both.append(read_turns([*before, *record[key]], key, seen, where))
  (question, system), (other, other_system) = (_question(turns, where) for turns in both)
  if (question, system) != (other, other_system):
    raise where.error("'chosen' and 'rejected' answer different prompts; correct one or delete the line")
  rest = {key: value for key, value in record.items() if key not in ("prompt", "chosen", "rejected")}
  if system is not None:
    if not keys.says_nothing(rest.get("system")):
      raise where.error("the line has 'system' and a message from 'system'; keep one")
    rest["system"] = system
  answers = {key: turns[-1]["value"] for key, turns in zip(("chosen", "rejected"), both, strict=True)}
  return media.put_into({**rest, "question": question, **answers}, where)


def _user(text: Any) -> dict[str, Any]:
  return {"role": "user", "content": text}


def _question(turns: Sequence[Mapping[str, Any]], where: Where) -> tuple[Any, Any]:
  """The question and the system message before an answer."""
  roles = [turn["from"] for turn in turns]
  if roles not in (["human", "gpt"], ["system", "human", "gpt"]):
    raise where.error(
      f"a pair has one question and one answer, after an optional system message; got turns from {', '.join(roles)}"
    )
  if odd := next(_extras(turns), None):
    raise where.error(f"key {odd!r} of a message is not read; take it out")
  return turns[-2]["value"], turns[0]["value"] if len(turns) > 2 else None


def _extras(turns: Iterable[Mapping[str, Any]]) -> Iterator[str]:
  for turn in turns:
    yield from (
      key for key, value in turn.items() if key not in ("from", "value") and not keys.says_nothing(value)
    )


def _from_prompt_pair(record: dict[str, Any], where: Where) -> dict[str, Any]:
  del where
  rest = {key: value for key, value in record.items() if key != "prompt"}
  return {**rest, "question": record["prompt"]}


PAIR_FORMS: dict[str, Form] = {
  NATIVE: Form(
    name="'question', 'chosen' and 'rejected'",
    matches=lambda record: "question" in record and not _chosen_messages(record),
    convert=as_it_is,
  ),
  "messages": Form(
    name="'chosen' and 'rejected' as messages", matches=_chosen_messages, convert=_from_chosen
  ),
  "prompt": Form(
    name="'prompt', 'chosen' and 'rejected'",
    matches=lambda record: all(isinstance(record.get(key), str) for key in ("prompt", "chosen", "rejected")),
    convert=_from_prompt_pair,
  ),
}
"""Forms of lines with a preference pair."""
