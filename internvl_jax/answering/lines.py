"""Files of questions: JSON lines in, JSON lines out, in the same order; a command that was stopped goes on."""

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from absl import logging

from internvl_jax.answering.model import How, Model
from internvl_jax.answering.prompts import Prompter, Question
from internvl_jax.data.source.files import is_remote
from internvl_jax.data.where import DataError, Where, shown
from internvl_jax.errors import UserError, suggest
from internvl_jax.eval.greedy import Prompt

_ROLES = {"user": "human", "human": "human", "assistant": "gpt", "gpt": "gpt", "system": "system"}

_SAYINGS = ("question", "messages", "conversations")
_MEDIA = ("image", "images", "video", "videos")
_KEYS = ("id", *_SAYINGS, *_MEDIA, "system")

_DATASET = "--inputs"
"""What errors call a file of questions: the flag that names it."""


class _Asked(NamedTuple):
  """A line: what it is called, and its prompt, or why it has none."""

  name: Any
  prompt: Prompt | None
  error: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerFile:
  """A file of questions that is answered into another.

  Lines have `id` (else their number counts), `question` or `messages` (turns with `role` and `content`, or `from` and
  `value`; the last one is the question), `image` or `images`, `video` or `videos` (a path or a list), and `system`. Answers
  are lines of `id` and `answer`, or `id` and `error` where the question cannot be asked.

  Attributes:
    inputs: the questions.
    output: the answers.
    root: where relative paths of images and videos begin.
    batch_size: questions at once.
    strict: the first line that cannot be asked ends the command.
  """

  inputs: Path
  output: Path
  root: str = ""
  batch_size: int = 8
  strict: bool = False

  def run(self, model: Model, how: How) -> tuple[int, int]:
    """Answers all questions that have no answer yet; returns how many were answered, and how many could not be asked.

    Raises:
      UserError: the output belongs to other questions, or a line is wrong and `strict`.
    """
    prompter = model.prompter(how.max_tiles, how.frames)
    decoder = model.decoder(how, self.batch_size)
    answered = failed = 0
    with self.inputs.open("rb") as lines, self.output.open("a+b") as out:
      done = self._go_on(lines, out)
      numbered = enumerate(lines, done + 1)
      while group := list(itertools.islice(numbered, self.batch_size)):
        asked = [self._ask(line, number, prompter) for number, line in group]
        prompts = [one.prompt for one in asked if one.prompt is not None]
        answers = iter(model.decode(prompts, decoder) if prompts else [])
        for one in asked:
          entry = {"error": one.error} if one.prompt is None else {"answer": next(answers)}
          out.write(json.dumps({"id": one.name, **entry}, ensure_ascii=False).encode() + b"\n")
        out.flush()
        answered, failed = answered + len(prompts), failed + len(asked) - len(prompts)
    return answered, failed

  def _go_on(self, lines: BinaryIO, out: BinaryIO) -> int:
    """Passes over the questions that have an answer, and returns their number; a line that is not complete is taken off.

    Raises:
      UserError: an answer belongs to another question.
    """
    out.seek(0)
    done, end = 0, 0
    for answer in out:
      question = lines.readline()
      if not answer.endswith(b"\n"):
        lines.seek(-len(question), os.SEEK_CUR)
        break
      done, end = done + 1, end + len(answer)
      found, wanted = _name(answer, done), _name(question, done)
      if not question or found != wanted:
        raise UserError(
          f"{self.output}:{done} answers id {shown(found)}, but {self.inputs} has {shown(wanted)} there; name another "
          "--output, or delete the file"
        )
    out.truncate(end)
    if done:
      logging.info("%s has %d answers; going on behind them", self.output, done)
    return done

  def _ask(self, line: bytes, number: int, prompter: Prompter) -> _Asked:
    where = Where(_DATASET, str(self.inputs), number, "--root")
    try:
      return _Asked(
        _name(line, number), prompter.prompt(self._question(line, where), where, number=number), ""
      )
    except DataError as error:
      if self.strict:
        raise
      logging.warning("%s", error)
      return _Asked(_name(line, number), None, str(error))

  def _question(self, line: bytes, where: Where) -> Question:
    """The question of a line.

    Raises:
      DataError: it has none.
    """
    try:
      record = json.loads(line)
    except ValueError as error:
      raise where.error(f"is no JSON ({error}); correct or delete the line") from error
    if not isinstance(record, dict) or sum(key in record for key in _SAYINGS) != 1:
      raise where.error(f"must be an object with one of {', '.join(_SAYINGS)}, got {shown(record)}")
    if unknown := [key for key in record if key not in _KEYS and suggest(key, _KEYS)]:
      raise where.error(f"has the key {unknown[0]!r}{suggest(unknown[0], _KEYS)}")
    images, videos = (self._media(record, kind, where) for kind in ("image", "video"))
    if "question" in record:
      turns = [("human", record["question"])]
    else:
      turns = _turns(record.get("messages", record.get("conversations")), where)
    system = record.get("system")
    if turns[0][0] == "system":
      system = turns.pop(0)[1]
    if not all(isinstance(text, str) for text in [*(text for _, text in turns), system or ""]):
      raise where.error("a question, an answer and a system message are texts; correct or delete the line")
    return _conversation(turns, images, videos, system, where)

  def _media(self, record: dict[str, Any], kind: str, where: Where) -> list[str]:
    """The paths of a line's images or videos."""
    found = record.get(kind, record.get(f"{kind}s"))
    paths = [] if found in (None, "") else found if isinstance(found, list) else [found]
    if not all(isinstance(path, str) and path for path in paths):
      raise where.error(f"{kind!r} must be a path or a list of paths, got {shown(found)}")
    return [path if is_remote(path) else os.path.join(self.root, path) for path in paths]


def _name(line: bytes, number: int) -> Any:
  """The id of a line, or its number."""
  try:
    record = json.loads(line)
  except ValueError:
    return number
  return record.get("id", number) if isinstance(record, dict) else number


def _turns(messages: Any, where: Where) -> list[tuple[str, Any]]:
  """Role and text of each turn."""
  turns = []
  for turn in messages if isinstance(messages, list) else []:
    if not isinstance(turn, dict) or (role := _ROLES.get(str(turn.get("role", turn.get("from"))))) is None:
      raise where.error(f"a turn has a role (user, assistant, system) and a content, got {shown(turn)}")
    turns.append((role, turn.get("content", turn.get("value"))))
  if not turns or turns[-1][0] != "human":
    raise where.error("the last turn must be the user's question; add it, or take the answer out")
  return turns


def _conversation(
  turns: list[tuple[str, str]], images: list[str], videos: list[str], system: str | None, where: Where
) -> Question:
  """The last question, with those before it; images and videos go where the texts have places, else to the first."""
  roles = [role for role, _ in turns]
  if roles != ["human", "gpt"] * (len(turns) // 2) + ["human"]:
    raise where.error(f"user and assistant take turns, got {', '.join(roles)}; join or drop turns")
  questions = []
  for number, (_, text) in enumerate(turns[::2]):
    own = []
    for mark, left in (("<image>", images), ("<video>", videos)):
      somewhere = any(mark in other for _, other in turns[::2])
      count = text.count(mark) if somewhere else (0 if number else len(left))
      own.append(left[:count])
      del left[:count]
    questions.append(Question(text, *own))
  if images or videos:
    raise where.error(f"{len(images) + len(videos)} images or videos more than places in the questions")
  history = tuple((question, answer) for question, (_, answer) in zip(questions, turns[1::2], strict=False))
  return dataclasses.replace(questions[-1], history=history, system=system)
