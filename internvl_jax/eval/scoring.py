"""Scoring a model's greedy answers by exact match."""

import collections
import dataclasses
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from internvl_jax.arguments import DataTrainingArguments, EvalConfig
from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.data.sample.sample import Sample
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.errors import UserError, redacted_json
from internvl_jax.eval.greedy import GreedyDecoder, Prompt
from internvl_jax.eval.questions import Asked, QuestionFile
from internvl_jax.eval.shown import Picture, Shown, chosen_lines
from internvl_jax.hf.model import Source
from internvl_jax.models.internvl import Execution
from internvl_jax.outputs import write_json
from internvl_jax.parallel.distributed import is_first
from internvl_jax.storage.paths import AnyPath, path_of, write_whole


@dataclasses.dataclass(frozen=True)
class Question:
  """A prompt, the answer wanted, and the other entries of its line of the jsonl.

  Attributes:
    prompt: what the model reads.
    answer: the answer as the line has it.
    record: the line.
    learned: the answer as it is read back from its tokens; tokenizers that normalize text do not give it back as it
      was (Qwen's write letters and their accents as one).
    text: the question, as people read it.
    pictures: its images, where it is shown.
  """

  prompt: Prompt
  answer: str
  record: dict[str, Any]
  learned: str | None = None
  text: str = ""
  pictures: tuple[Picture, ...] | None = None


_NO_PROMPT = Prompt(np.zeros(0, np.int32), np.zeros((0, 0, 0, 3), np.uint8))


@dataclasses.dataclass(frozen=True)
class Scores:
  """Exact-match accuracy, in total and by group, every answer given, and the samples that are shown."""

  accuracy: float
  num_questions: int
  by_group: dict[str, dict[str, float | int]]
  predictions: list[dict[str, Any]]
  shown: list[Shown]

  def summary(self) -> dict[str, Any]:
    """Everything but the single answers, for eval_results.json."""
    return {"accuracy": self.accuracy, "num_questions": self.num_questions, "by_group": self.by_group}


def score(questions: Sequence[Question], answers: Sequence[str], *, group_field: str | None) -> Scores:
  """Compares answers with what was wanted, special tokens included, white space around them apart.

  Args:
    questions: what was asked.
    answers: what came back, in the same order.
    group_field: entry of the records to report by, or None.
  """
  groups: dict[str, list[bool]] = collections.defaultdict(list)
  predictions, hits, shown = [], [], []
  for question, answer in zip(questions, answers, strict=True):
    wanted = (question.answer, question.answer if question.learned is None else question.learned)
    hit = answer.strip() in [text.strip() for text in wanted]
    hits.append(hit)
    if group_field is not None:
      groups[str(question.record.get(group_field, "(none)"))].append(hit)
    predictions.append(
      {**question.record, "prediction": answer.strip(), "answer": question.answer, "correct": hit}
    )
    if question.pictures is not None:
      shown.append(
        Shown(
          question=question.text,
          answer=question.answer,
          prediction=answer.strip(),
          scores={"accuracy": float(hit)},
          pictures=question.pictures,
        )
      )
  by_group = {
    name: {"accuracy": float(np.mean(g)), "num_questions": len(g)} for name, g in sorted(groups.items())
  }
  return Scores(float(np.mean(hits)), len(hits), by_group, predictions, shown)


def for_log(scores: Scores) -> dict[str, float]:
  """The scores of a run in progress, by their names in the log."""
  return {"eval_accuracy": scores.accuracy} | {
    f"eval_accuracy_{name}": float(group["accuracy"]) for name, group in scores.by_group.items()
  }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
  """A jsonl of questions, ready to be asked.

  Attributes:
    config: what to score.
    questions: its lines.
    tokenizer: reads the answers.
    decoder: answers.
    shown_lines: numbers of the questions that are shown at every evaluation.
  """

  config: EvalConfig
  questions: QuestionFile
  tokenizer: ChatTokenizer
  decoder: GreedyDecoder
  shown_lines: frozenset[int] = frozenset()

  def check(self) -> None:
    """Refuses questions that cannot be asked, before any is.

    Raises:
      UserError: with all that is wrong, a line each.
    """
    if found := self.questions.problems(os.cpu_count() or 1):
      raise UserError("\n".join([f"{len(found)} lines cannot be scored:", *found] if found[1:] else found))

  def run(self, params: Mapping[str, jax.Array]) -> Scores:
    """Asks every question alone and scores the answers."""
    questions: list[Question] = []
    answers: list[str] = []
    ids: list[np.ndarray] = []
    start = time.perf_counter()
    for group in self._groups():
      tokens = self.decoder(dict(params), [question.prompt for question in group])
      answers += [self.tokenizer.decode_answer(row) for row in tokens]
      ids += tokens
      # Only what the report needs is kept: the tiles of a large set would not fit.
      questions += [dataclasses.replace(question, prompt=_NO_PROMPT) for question in group]
    scores = score(questions, answers, group_field=self.config.group_field)
    logging.info(
      "Scored %d questions in %.0f s: accuracy %.4f%s",
      *(scores.num_questions, time.perf_counter() - start, scores.accuracy),
      "".join(f", {name} {group['accuracy']:.4f}" for name, group in scores.by_group.items()),
    )
    for line in self.decoder.unusual_ends(ids):
      logging.warning("%s", line)
    return scores

  @property
  def name(self) -> str:
    """The set's name: its file's, without the suffix."""
    return re.sub(r"[^\w.+-]", "_", self.questions.file.path.rpartition("/")[2].partition(".")[0]) or "eval"

  def write(self, scores: Scores, folder: str | AnyPath) -> None:
    """Writes eval_results.json and predictions.jsonl."""
    folder = path_of(folder)
    write_json(folder / "eval_results.json", scores.summary())
    lines = (json.dumps(redacted_json(line), ensure_ascii=False) + "\n" for line in scores.predictions)
    write_whole(folder / "predictions.jsonl", "".join(lines).encode())

  def _groups(self) -> Iterator[list[Question]]:
    """The questions in batches, read as they are needed."""
    total = self.questions.limit
    starts = range(0, total, self.decoder.batch_size)
    for start in tqdm(starts, unit="batch", desc="scoring", leave=False, disable=not is_first()):
      lines = range(start, min(start + self.decoder.batch_size, total))
      yield [self._question(line, self.questions.read(line)) for line in lines]

  def _question(self, line: int, asked: Asked) -> Question:
    prompt = prompt_ids(asked.sample)
    learned = self.tokenizer.decode_answer(self.decoder.cut(asked.sample.input_ids[len(prompt) :]))
    return Question(
      prompt=Prompt(prompt, asked.sample.tiles),
      answer=asked.answer,
      record=asked.record,
      learned=learned,
      text=asked.question,
      pictures=tuple(self.questions.pictures(line)) if line in self.shown_lines and is_first() else None,
    )


def prompt_ids(sample: Sample) -> np.ndarray:
  """The token ids of a sample up to where its last answer begins."""
  supervised = sample.labels != IGNORE_INDEX
  end = np.flatnonzero(supervised)[-1] + 1
  before = np.flatnonzero(~supervised[:end])
  return sample.input_ids[: before[-1] + 1]


def make_evaluation(
  config: EvalConfig,
  data: DataTrainingArguments,
  source: Source,
  tokenizer: ChatTokenizer,
  how: Execution,
  *,
  stop_ids: tuple[int, ...] = (),
  seed: int = 0,
) -> Evaluation | None:
  """The evaluation that a config asks for; None if it names no annotation.

  Args:
    config: what to score.
    data: tile, length and pixel settings of the questions.
    source: the model's definition.
    tokenizer: of prompts and answers.
    how: how forward passes are computed.
    stop_ids: ids that end an answer beside the template's; a run's model learns to end by that one.
    seed: chooses the questions that are shown.
  """
  if config.annotation is None:
    return None
  decoder = GreedyDecoder(
    model=source.model,
    how=how,
    normalize_type=data.normalize_type,
    image_token_id=tokenizer.image_token_id,
    stop_ids=tuple(dict.fromkeys((tokenizer.stop_token_id, *stop_ids))),
    max_new_tokens=config.max_new_tokens,
    batch_size=config.batch_size,
  )
  questions = QuestionFile.open(config, data, tokenizer, source.config.tokens_per_tile)
  return Evaluation(
    config=config,
    questions=questions,
    tokenizer=tokenizer,
    decoder=decoder,
    shown_lines=chosen_lines(questions.limit, config.show, seed),
  )
