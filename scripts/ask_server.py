"""Asks a server the questions of a certificate, and compares its greedy answers with ours.

  python scripts/ask_server.py --url http://127.0.0.1:8000/v1 --questions certificate/questions.jsonl

For servers that speak OpenAI's protocol: vLLM, SGLang, LMDeploy, `transformers serve`. Needs nothing but Python. A line of
the questions is

  {"id": "0", "question": "<image>\\nWhat is on the mat?", "pictures": ["pictures/cat.jpg"], "answer": "A cat.",
   "answer_ids": [362, 8251, 13], "prompt_tokens": 301}

with paths from the file's folder; the last entry may be missing. Pictures that no `<image>` of the question stands for come
first. Ends with 0 if all answers are the same, with 1 if some are not, with 2 if the server could not be asked.
"""

import argparse
import base64
import dataclasses
import json
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TYPES = {b"\x89PNG": "image/png", b"RIFF": "image/webp", b"GIF8": "image/gif"}
"""First bytes of a picture -> its type; others are JPEGs."""

EXTRAS = {
  "skip_special_tokens": False,
  "return_token_ids": True,
  "repetition_penalty": 1.0,  # not that of generation_config.json
  "logprobs": True,
  "top_logprobs": 2,
}
"""What not every server takes, and none needs."""

SPECIAL = re.compile(r"<\|[a-z_]+\|>|</?(?:img|quad|ref|box|IMG_CONTEXT)>")
"""Tokens that a server leaves out of its text where it does not take `skip_special_tokens`."""


class CannotAskError(Exception):
  """The file cannot be read, or the server does not answer; one line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
  """A server's answer.

  Attributes:
    text: as the server decoded it.
    ids: its tokens; None where the server does not tell.
    margins: of each token, how much likelier it was than the next best, in nats; empty where the server does not tell.
    stopped: whether it ended by itself, not by its length.
    prompt_tokens: length of the question with its pictures, as the server counts; None where it does not tell.
    has_special: whether special tokens are in the text.
  """

  text: str
  ids: list[int] | None = None
  margins: list[float] = dataclasses.field(default_factory=list)
  stopped: bool = True
  prompt_tokens: int | None = None
  has_special: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
  """A server's answer beside ours.

  Attributes:
    same: whether they are the same.
    place: the first token (or, where the server tells none, character) that differs.
    note: what else there is to say.
  """

  same: bool
  place: int | None = None
  note: str = ""


def read_questions(path: Path) -> list[dict[str, Any]]:
  """The lines of a file of questions.

  Raises:
    CannotAskError: it cannot be read, or lacks what is asked for.
  """
  try:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
  except (OSError, ValueError) as error:
    raise CannotAskError(f"{path}: {error}") from error
  for number, line in enumerate(lines, 1):
    if missing := {"id", "question", "pictures", "answer"} - set(line):
      raise CannotAskError(f"{path}, line {number}: has no {', '.join(sorted(missing))}")
    if absent := [name for name in line["pictures"] if not (path.parent / name).is_file()]:
      raise CannotAskError(f"{path}, line {number}: {path.parent / absent[0]} is not there")
  if not lines:
    raise CannotAskError(f"{path}: is empty")
  return lines


def content_of(question: str, pictures: Sequence[bytes]) -> list[dict[str, Any]]:
  """A user's message: parts of text and pictures, in the order in which training has them."""
  texts = question.split("<image>")
  leading = max(0, len(pictures) - (len(texts) - 1))
  parts = [picture_part(picture) for picture in pictures[:leading]]
  rest = iter(pictures[leading:])
  for number, text in enumerate(texts):
    if number:
      picture = next(rest, None)
      if picture is None:
        raise CannotAskError(f"{question!r} has more <image> than pictures")
      parts.append(picture_part(picture))
      text = text.removeprefix("\n")  # The chat template of an export writes it.
    if text:
      parts.append({"type": "text", "text": text})
  return parts


def picture_part(picture: bytes) -> dict[str, Any]:
  """A picture as a part of a message: its bytes as they are."""
  kind = TYPES.get(picture[:4], "image/jpeg")
  return {
    "type": "image_url",
    "image_url": {"url": f"data:{kind};base64,{base64.b64encode(picture).decode()}"},
  }


class Server:
  """A server that speaks OpenAI's protocol."""

  def __init__(
    self, url: str, *, model: str | None, key: str | None, timeout: float, extra: Mapping[str, Any]
  ):
    self.url = url.rstrip("/")
    self.key, self.timeout, self.extra = key, timeout, extra
    self.extras = dict(EXTRAS)
    self.model = model or self._first_model()

  def _first_model(self) -> str:
    models = self._call("models").get("data") or []
    if not models:
      raise CannotAskError(f"{self.url}/models names no model: name one by --model")
    return models[0]["id"]

  def ask(self, content: list[dict[str, Any]], max_tokens: int) -> Reply:
    """The greedy answer to a message of a user.

    Raises:
      CannotAskError: there is none.
    """
    body = {
      "model": self.model,
      "messages": [{"role": "user", "content": content}],
      "temperature": 0,
      "max_tokens": max_tokens,
      **self.extra,
    }
    if self.extras:
      try:
        return parse(self._call("chat/completions", body | self.extras))
      except RefusedError:
        reply = self._call("chat/completions", body)  # If it refuses this, too, the extras are not to blame.
      print(f"The server takes not all of {', '.join(EXTRAS)}: texts are compared, without special tokens")
      self.extras = {}
    else:
      reply = self._call("chat/completions", body)
    return dataclasses.replace(parse(reply), has_special=False)

  def _call(self, name: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    if self.key:
      headers["Authorization"] = f"Bearer {self.key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{self.url}/{name}", data, headers)
    try:
      with urllib.request.urlopen(request, timeout=self.timeout) as response:
        return json.load(response)
    except urllib.error.HTTPError as error:
      said = error.read().decode(errors="replace")[:500]
      kind = RefusedError if error.code in (400, 422) else CannotAskError
      raise kind(f"{self.url}/{name} answers {error.code}: {said}") from error
    except (OSError, ValueError) as error:
      raise CannotAskError(f"{self.url}/{name}: {error}") from error


class RefusedError(CannotAskError):
  """The server does not take the request."""


def parse(response: dict[str, Any]) -> Reply:
  """A response to `chat/completions`."""
  try:
    choice = response["choices"][0]
    text = choice["message"]["content"] or ""
  except (KeyError, IndexError, TypeError) as error:
    raise CannotAskError(f"the response has no answer: {json.dumps(response)[:300]}") from error
  margins = []
  for token in (choice.get("logprobs") or {}).get("content") or []:
    best = sorted((other["logprob"] for other in token.get("top_logprobs") or []), reverse=True)
    margins.append(best[0] - best[1] if len(best) > 1 else float("inf"))
  return Reply(
    text=text,
    ids=choice.get("token_ids"),
    margins=margins,
    stopped=choice.get("finish_reason") != "length",
    prompt_tokens=(response.get("usage") or {}).get("prompt_tokens"),
  )


def compare(question: dict[str, Any], reply: Reply, max_tokens: int) -> Verdict:
  """A server's answer beside ours, token by token where both are known, else by their texts."""
  notes = []
  counted = question.get("prompt_tokens")
  if None not in (counted, reply.prompt_tokens) and counted != reply.prompt_tokens:
    notes.append(f"prompt of {reply.prompt_tokens} tokens, ours {counted}: template or tiles differ")
  ours, theirs = question.get("answer_ids"), reply.ids
  if ours is None or theirs is None:
    ours, theirs = question["answer"], reply.text
    if not reply.has_special:
      ours, theirs = SPECIAL.sub("", ours), SPECIAL.sub("", theirs)
    ours, theirs = ours.strip(), theirs.strip()
    ended = question.get("answer_ids") is not None and len(question["answer_ids"]) < max_tokens
  else:
    ended = len(ours) < max_tokens
    if reply.stopped and len(theirs) == len(ours) + 1:
      theirs = theirs[:-1]  # the token that ended it
  place = first_difference(ours, theirs)
  if place is None and ended and not reply.stopped:
    place = len(ours)
    notes.append("goes on where ours ends")
  if place is not None and reply.ids is not None and place < len(reply.margins):
    notes.append(f"its token there was likelier than the next by {reply.margins[place]:.2g} nats")
  return Verdict(same=place is None, place=place, note="; ".join(notes))


def first_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> int | None:
  """The first place at which two sequences differ; None if they are the same."""
  for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
    if a != b:
      return place
  return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def row(question: dict[str, Any], reply: Reply, verdict: Verdict) -> str:
  """A line of the table."""
  known = question.get("answer_ids") is not None and reply.ids is not None
  length = len(question["answer_ids"]) if known else len(question["answer"].strip())
  what = f"{length:4} {'tokens' if known else 'characters'}"
  result = "same" if verdict.same else f"differs at {verdict.place}"
  texts = (
    "" if verdict.same else f"  ours {short(question['answer'])}, the server's {short(reply.text.strip())}"
  )
  note = f"  ({verdict.note})" if verdict.note else ""
  return f"{question['id']!s:12} {what:16} {result}{texts}{note}"


def short(text: str, length: int = 60) -> str:
  """A text, quoted and cut."""
  return repr(text if len(text) <= length else text[: length - 1] + "…")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument(
    "--url", required=True, help="Where the server is, with its version: http://host:8000/v1"
  )
  parser.add_argument("--questions", type=Path, required=True, help="The questions, with our answers.")
  parser.add_argument("--model", help="The model's name there; the first that the server names if unset.")
  parser.add_argument(
    "--max_tokens", type=int, help="Longest answer; that of the longest of ours if unset, 128 without ids."
  )
  parser.add_argument(
    "--extra",
    type=json.loads,
    default={},
    help='More entries of each request, as JSON: {"max_dynamic_patch": 6}.',
  )
  parser.add_argument(
    "--least", type=float, default=1.0, help="The share of answers that have to be the same."
  )
  parser.add_argument("--output", type=Path, help="A jsonl for the server's answers.")
  parser.add_argument(
    "--timeout", type=float, default=600, help="The longest wait for an answer, in seconds."
  )
  return parser.parse_args(argv)


def run(flags: argparse.Namespace) -> int:
  """Asks all questions and prints the table."""
  questions = read_questions(flags.questions)
  key = os.environ.get("OPENAI_API_KEY")
  server = Server(flags.url, model=flags.model, key=key, timeout=flags.timeout, extra=flags.extra)
  # As long as ours may have been: of these, only the longest may have been cut.
  longest = max((len(question.get("answer_ids") or ()) for question in questions), default=0)
  max_tokens = flags.max_tokens or longest or 128
  print(
    f"{len(questions)} questions to {server.model} at {server.url}, greedy, of at most {max_tokens} tokens"
  )
  same, records = 0, []
  for question in questions:
    pictures = [(flags.questions.parent / name).read_bytes() for name in question["pictures"]]
    reply = server.ask(content_of(question["question"], pictures), max_tokens)
    verdict = compare(question, reply, max_tokens)
    print(row(question, reply, verdict), flush=True)
    same += verdict.same
    records.append(
      {"id": question["id"], "same": verdict.same, "answer": reply.text, "answer_ids": reply.ids}
    )
  if flags.output:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    flags.output.write_text("".join(lines), encoding="utf-8")
  print(f"{same} of {len(questions)} answers are the same")
  return 0 if same >= flags.least * len(questions) else 1


def main(argv: Sequence[str] | None = None) -> int:
  """Asks, and says why if that is impossible."""
  try:
    return run(arguments(argv))
  except CannotAskError as error:
    print(f"cannot ask: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
  sys.exit(main())
