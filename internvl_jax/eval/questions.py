"""The questions of a held-out set: opened, checked before a run begins, and read one by one."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from internvl_jax.arguments import DataTrainingArguments, EvalConfig
from internvl_jax.data.sample.conversations import CONVERSATION_LINES
from internvl_jax.data.sample.fitting import Limits
from internvl_jax.data.sample.sample import Sample, SampleMaker
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.data.source.interface import Records
from internvl_jax.data.source.media import described
from internvl_jax.data.source.records import first_read, open_records
from internvl_jax.data.source.workers import map_items
from internvl_jax.data.where import DataError, OverLengthError, Where, shown
from internvl_jax.eval.sets import EvalSet, read_sets
from internvl_jax.eval.shown import MOST_PICTURES, Picture, without_marks

# Lines checked by a worker at a time.
_GROUP = 64


class Asked(NamedTuple):
  """A line with a question.

  Attributes:
    record: as it is in the file, media that it has as bytes by their names.
    sample: its tokens and tiles.
    question: the turns before the last one, without the marks of images.
    answer: the one that is wanted, of the last turn.
    answers: all that are right: those of the line's `answers`, or the wanted one.
  """

  record: dict[str, Any]
  sample: Sample
  question: str
  answer: str
  answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionFile:
  """The questions of a held-out set in the training format. It goes to worker processes.

  Attributes:
    asked: the set.
    file: the questions.
    maker: makes samples of its lines.
    limit: lines that are asked, the first ones.
  """

  asked: EvalSet
  file: Records
  maker: SampleMaker
  limit: int

  @classmethod
  def open(
    cls,
    asked: EvalSet,
    data: DataTrainingArguments,
    tokenizer: ChatTokenizer,
    tokens_per_tile: int,
    limit: int | None = None,
  ) -> "QuestionFile":
    """Opens a set.

    Args:
      asked: the set.
      data: tile, length and pixel settings of the questions.
      tokenizer: of prompts and answers.
      tokens_per_tile: image tokens of one tile.
      limit: lines that are asked at most, the first ones; None: all.

    Raises:
      DataError: the file is missing, of another form or empty.
    """
    spec = asked.spec()
    root = "the set's root" if asked.label else "eval.root"
    file = open_records(spec.annotation, spec.name, key=spec.key, root=root)
    maker = SampleMaker(
      spec=spec,
      data=data,
      tokenizer=tokenizer,
      tokens_per_tile=tokens_per_tile,
      limits=Limits(data.max_seq_length, policy="error"),
      lines=CONVERSATION_LINES.recognized(first_read(file)),
    )
    lines = spec.lines_used(len(file))
    return cls(asked=asked, file=file, maker=maker, limit=min(lines, limit or lines))

  def read(self, line: int) -> Asked:
    """Returns a question with its images or frames.

    Raises:
      DataError: the line or its media cannot be read, or it has no answer at its end to be scored by.
    """
    record, where = self.file.read(line), self.file.where(line)
    try:
      sample = self.maker.make(record, where)
    except OverLengthError as error:
      # Questions are not shortened as samples are.
      what = str(error).partition("; raise it")[0]
      raise OverLengthError(f"{what}; raise data.max_seq_length or delete the line") from error
    *before, last = self.maker.lines.plain(record, where)["conversations"]
    question = question_of(before)
    if not self.asked.generates and not sample.fully_masked:
      return Asked(described(record), sample, question, last["value"], (last["value"],))
    if last["from"] != "gpt":
      raise where.error(
        "the conversation does not end with an answer from 'gpt'; it cannot be scored; write the answer that is right, "
        "or delete the line"
      )
    if last.get("loss") is False or sample.fully_masked:
      raise where.error(
        "no token of its last answer would be learned, so it cannot be scored; correct or delete the line"
      )
    return Asked(
      described(record), sample, question, last["value"], right_answers(record, last["value"], where)
    )

  def pictures(self, line: int) -> list[Picture]:
    """Returns the first images of a question, or frames of its video, to be looked at.

    Raises:
      DataError: they cannot be read.
    """
    record, where = self.file.read(line), self.file.where(line)
    return [Picture.of(image) for image in self.maker.pictures(record, where, MOST_PICTURES)]

  def problems(self, workers: int) -> list[str]:
    """Returns why lines cannot be asked, in order; all images and videos are decoded.

    Args:
      workers: processes.
    """
    groups = [range(start, min(start + _GROUP, self.limit)) for start in range(0, self.limit, _GROUP)]
    found = dict(map_items(_Problems(self), groups, workers))
    self.file.close()
    return [error for group in groups for error in found[group]]


def open_questions(
  config: EvalConfig, data: DataTrainingArguments, tokenizer: ChatTokenizer, tokens_per_tile: int
) -> tuple[QuestionFile, ...]:
  """Opens all sets that a config names; see `QuestionFile.open`.

  Raises:
    DataError: a set is wrong, or a file of it.
  """
  return tuple(
    QuestionFile.open(asked, data, tokenizer, tokens_per_tile, config.limit) for asked in read_sets(config)
  )


def question_of(turns: Sequence[Mapping[str, str]]) -> str:
  """The text of the turns before an answer, without the system's and without the marks of images."""
  return "\n".join(without_marks(turn["value"]) for turn in turns if turn["from"] != "system")


def right_answers(record: Mapping[str, Any], answer: str, where: Where) -> tuple[str, ...]:
  """All answers to a line that are right: its `answers`, texts or VQA's objects with an 'answer', or the wanted one.

  Raises:
    DataError: `answers` are none.
  """
  given = record.get("answers")
  if given in (None, []):
    return (answer,)
  texts = (
    [each.get("answer") if isinstance(each, dict) else each for each in given]
    if isinstance(given, list)
    else [given]
  )
  if not all(isinstance(text, str | int | float) for text in texts):
    raise where.error(
      f"'answers' must be a list of texts, or of objects with a text 'answer', got {shown(given)}; correct it"
    )
  return tuple(map(str, texts))


@dataclasses.dataclass(frozen=True)
class _Problems:
  """Why lines of a group cannot be asked."""

  questions: QuestionFile

  def __call__(self, lines: range) -> list[str]:
    errors = []
    for line in lines:
      try:
        self.questions.read(line)
      except DataError as error:
        errors.append(str(error))
    return errors
