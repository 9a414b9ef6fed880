"""Scoring a model on held-out sets: its greedy answers by metrics, and the loss."""

import collections
import dataclasses
import json
import os
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
from internvl_jax.data.sample.tokenize import ChatTokenizer, ChatTokens
from internvl_jax.errors import UserError, redacted_json
from internvl_jax.eval.greedy import GreedyDecoder, Prompt
from internvl_jax.eval.loss import HeldOutLoss, TokenLoss
from internvl_jax.eval.metrics import LOSS, METRICS
from internvl_jax.eval.metrics.answered import Answered
from internvl_jax.eval.questions import Asked, QuestionFile, open_questions
from internvl_jax.eval.routing import Counts, make_router
from internvl_jax.eval.sets import EvalSet
from internvl_jax.eval.shown import Picture, Shown, chosen_lines
from internvl_jax.hf.model import Source
from internvl_jax.models.internvl import Execution
from internvl_jax.outputs import write_json
from internvl_jax.parallel.distributed import is_first
from internvl_jax.storage.paths import AnyPath, path_of, write_whole


@dataclasses.dataclass(frozen=True)
class Question:
  """A prompt, the answer wanted, and the other entries of its line of the annotation file.

  Attributes:
    prompt: what the model reads.
    answer: the answer as the line has it.
    record: the line.
    learned: the answer as it is read back from its tokens; tokenizers that normalize text do not give it back as it
      was (Qwen's write letters and their accents as one).
    answers: all that are right; empty: the one.
    text: the question, as people read it.
    pictures: its images, where it is shown.
  """

  prompt: Prompt
  answer: str
  record: dict[str, Any]
  learned: str | None = None
  answers: tuple[str, ...] = ()
  text: str = ""
  pictures: tuple[Picture, ...] | None = None

  def answered(self, prediction: str) -> Answered:
    """What metrics see of it, with the model's answer."""
    return Answered(
      prediction=prediction,
      answers=self.answers or (self.answer,),
      question=self.text,
      record=self.record,
      spellings=(self.answer, *([] if self.learned is None else [self.learned])),
    )

  def shown(self, prediction: str, scores: Mapping[str, float]) -> Shown:
    """What is shown of it."""
    return Shown(
      question=self.text,
      answer=list(self.answers) if len(self.answers) > 1 else self.answer,
      prediction=prediction,
      scores=dict(scores),
      pictures=self.pictures or (),
    )


SAVED = "image_tokens_saved"
"""What the share of image tokens that compressed tiles save is called beside the metrics."""

_NO_PROMPT = Prompt(np.zeros(0, np.int32), np.zeros((0, 0, 0, 3), np.uint8))


CHANGE = "_change"
"""What the name of a score ends with that is the difference to the start's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
  """How a set is scored.

  Attributes:
    asked: the set.
    metrics: means over the questions; of the loss, over the tokens that are learned.
    num_questions: of the set.
    by_group: the same of each group.
    predictions: every answer given, as a line of predictions.jsonl.
    shown: the samples that are shown.
    start: scores that they are compared with, those of the model that a run began with, by their names in the log.
    routed: how many tiles a Flash compressed; None where none was routed.
  """

  asked: EvalSet
  metrics: dict[str, float]
  num_questions: int
  by_group: dict[str, dict[str, float | int]]
  predictions: list[dict[str, Any]]
  shown: list[Shown]
  start: Mapping[str, float] = dataclasses.field(default_factory=dict)
  routed: Counts | None = None

  def summary(self) -> dict[str, Any]:
    """Everything but the single answers, for eval_results.json."""
    by_group = {name: {**group, **self._changes(name)} for name, group in self.by_group.items()}
    saved = {} if self.routed is None else {SAVED: self.routed.saved}
    return {
      **self.metrics,
      **self._changes(),
      "num_questions": self.num_questions,
      "by_group": by_group,
      **saved,
    }

  def for_log(self) -> dict[str, float]:
    """The metrics by their names in the log: eval_<set>/<metric>, and eval_<set>/<metric>_<group>.

    Each is followed by its change since the start, where that is known: eval_<set>/<metric>_change.
    """
    found: dict[str, float] = {}
    for name in (None, *self.by_group):
      values = self._values(name)
      found |= {self._logged(metric, name): value for metric, value in values.items()}
      found |= {self._logged(metric, name): value for metric, value in self._changes(name).items()}
    return found if self.routed is None else {**found, self._logged(SAVED, None): self.routed.saved}

  def line(self) -> str:
    """The metrics as a text."""
    parts = [f"{metric} {value:.4f}{self._shown_change(metric)}" for metric, value in self.metrics.items()]
    first = next(iter(self.metrics))
    parts += [
      f"{name} {group[first]:.4f}{self._shown_change(first, name)}" for name, group in self.by_group.items()
    ]
    return ", ".join(parts) + (", in brackets the change since the start" if self._changes() else "")

  def _values(self, group: str | None = None) -> dict[str, float]:
    """The metrics of a group; None: of the set."""
    values = self.metrics if group is None else self.by_group[group]
    return {metric: float(values[metric]) for metric in self.metrics}

  def _changes(self, group: str | None = None) -> dict[str, float]:
    """What became of each metric since the start, by <metric>_change."""
    values = {metric: (value, self._logged(metric, group)) for metric, value in self._values(group).items()}
    return {
      f"{metric}{CHANGE}": value - self.start[name]
      for metric, (value, name) in values.items()
      if name in self.start
    }

  def _logged(self, metric: str, group: str | None) -> str:
    """What the log calls a metric, or the change of one."""
    metric, change = metric.removesuffix(CHANGE), CHANGE if metric.endswith(CHANGE) else ""
    return f"eval_{self.asked.label}{metric}{'' if group is None else f'_{group}'}{change}"

  def _shown_change(self, metric: str, group: str | None = None) -> str:
    change = self._changes(group).get(f"{metric}{CHANGE}")
    return "" if change is None else f" ({change:+.4f})"


def score(
  asked: EvalSet,
  questions: Sequence[Question],
  answers: Sequence[str],
  losses: Sequence[TokenLoss] = (),
  start: Mapping[str, float] | None = None,
) -> Scores:
  """Scores a set.

  Args:
    asked: the set, with its metrics.
    questions: what was asked.
    answers: what came back, in the same order; "" of sets without answers.
    losses: of the same lines; empty where the set has no such metric.
    start: scores of the start by their names in the log, if they are known.
  """
  answers = [answer.strip() for answer in answers]
  answered = [question.answered(answer) for question, answer in zip(questions, answers, strict=True)]
  each = {metric: METRICS[metric](answered) for metric in asked.metrics if metric != LOSS}
  groups: dict[str, list[int]] = collections.defaultdict(list)
  if asked.group_field is not None:
    for i, question in enumerate(questions):
      groups[str(question.record.get(asked.group_field, "(none)"))].append(i)

  def means(chosen: Sequence[int]) -> dict[str, float]:
    found = {metric: float(np.mean([values[i] for i in chosen])) for metric, values in each.items()}
    return found | ({LOSS: TokenLoss.mean([losses[i] for i in chosen])} if losses else {})

  predictions, shown = [], []
  for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
    scores = {metric: values[i] for metric, values in each.items()}
    scores |= {LOSS: losses[i].mean([losses[i]])} if losses else {}
    predictions.append(_prediction(asked, question, answer, scores))
    if question.pictures is not None:
      shown.append(question.shown(answer, scores))
  return Scores(
    asked=asked,
    metrics=means(range(len(questions))),
    num_questions=len(questions),
    by_group={name: {**means(lines), "num_questions": len(lines)} for name, lines in sorted(groups.items())},
    predictions=predictions,
    shown=shown,
    start=start or {},
  )


def _prediction(
  asked: EvalSet, question: Question, answer: str, scores: Mapping[str, float]
) -> dict[str, Any]:
  """A line of predictions.jsonl."""
  line = {**question.record, "prediction": answer, "answer": question.answer, "scores": dict(scores)}
  if asked.label:
    line["set"] = asked.name
  return line | ({"correct": bool(scores["accuracy"])} if "accuracy" in scores else {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
  """Held-out sets, ready to be scored.

  Attributes:
    sets: their questions.
    tokenizer: reads the answers.
    decoder: answers.
    loss: computes the loss.
    shown_lines: of each set, numbers of the questions that are shown at every evaluation.
  """

  sets: tuple[QuestionFile, ...]
  tokenizer: ChatTokenizer
  decoder: GreedyDecoder
  loss: HeldOutLoss
  shown_lines: tuple[frozenset[int], ...]

  def check(self) -> None:
    """Refuses questions that cannot be asked, before any is.

    Raises:
      UserError: with all that is wrong, a line each.
    """
    found = [line for questions in self.sets for line in questions.problems(os.cpu_count() or 1)]
    if found:
      raise UserError("\n".join([f"{len(found)} lines cannot be scored:", *found] if found[1:] else found))

  def run(self, params: Mapping[str, jax.Array], start: Mapping[str, float] | None = None) -> list[Scores]:
    """Scores all sets, each question asked alone.

    Args:
      params: the model's, by path.
      start: scores of the model that a run began with, by their names in the log; None: they are not known.
    """
    return [
      self._run(questions, shown, dict(params), start)
      for questions, shown in zip(self.sets, self.shown_lines, strict=True)
    ]

  def _run(
    self,
    file: QuestionFile,
    shown: frozenset[int],
    params: dict[str, jax.Array],
    start_scores: Mapping[str, float] | None,
  ) -> Scores:
    questions, answers, ids, losses = list[Question](), list[str](), list[np.ndarray](), list[TokenLoss]()
    start = time.perf_counter()
    for lines in self._batches(file):
      asked = [file.read(line) for line in lines]
      group = [self._question(file, line, each, shown) for line, each in zip(lines, asked, strict=True)]
      if file.asked.generates:
        tokens = self.decoder(params, [question.prompt for question in group])
        ids += tokens
        answers += [self.tokenizer.decode_answer(row) for row in tokens]
      else:
        answers += [""] * len(group)
      if LOSS in file.asked.metrics:
        losses += self.loss(params, [each.sample for each in asked])
      # Only what the report needs is kept: the tiles of a large set would not fit.
      questions += [dataclasses.replace(question, prompt=_NO_PROMPT) for question in group]
    scores = score(file.asked, questions, answers, losses, start_scores)
    if (router := self.decoder.router) and (counts := router.take_counts()):
      logging.info("%s", counts.line())
      scores = dataclasses.replace(scores, routed=counts)
    name = f" of {file.asked.name}" if file.asked.label else ""
    seconds = time.perf_counter() - start
    logging.info("Scored %d questions%s in %.0f s: %s", len(questions), name, seconds, scores.line())
    for line in self.decoder.unusual_ends(ids):
      logging.warning("%s", line)
    return scores

  def write(self, scores: Sequence[Scores], folder: str | AnyPath) -> None:
    """Writes eval_results.json and predictions.jsonl."""
    folder = path_of(folder)
    write_json(folder / "eval_results.json", summary(scores))
    predictions = (line for of_set in scores if of_set.asked.generates for line in of_set.predictions)
    lines = (json.dumps(redacted_json(line), ensure_ascii=False) + "\n" for line in predictions)
    write_whole(folder / "predictions.jsonl", "".join(lines).encode())

  def _batches(self, file: QuestionFile) -> Iterator[range]:
    """The numbers of a set's questions in batches, behind a bar of how far it is."""
    starts = range(0, file.limit, self.decoder.batch_size)
    for start in tqdm(starts, unit="batch", desc="scoring", leave=False, disable=not is_first()):
      yield range(start, min(start + self.decoder.batch_size, file.limit))

  def _question(self, file: QuestionFile, line: int, asked: Asked, shown: frozenset[int]) -> Question:
    prompt, learned = _NO_PROMPT, None
    if file.asked.generates:
      prompt = Prompt(prompt_ids(asked.sample), asked.sample.tiles)
      learned = self.decoder.cut(asked.sample.input_ids[len(prompt.input_ids) :])
      learned = self.tokenizer.decode_answer(learned)
    return Question(
      prompt=prompt,
      answer=asked.answer,
      record=asked.record,
      learned=learned,
      answers=asked.answers,
      text=asked.question,
      pictures=tuple(file.pictures(line)) if line in shown and is_first() else None,
    )


def summary(scores: Sequence[Scores]) -> dict[str, Any]:
  """The content of eval_results.json: the scores of the only set, or those of each set by its name."""
  if len(scores) == 1 and not scores[0].asked.label:
    return scores[0].summary()
  return {of_set.asked.name: of_set.summary() for of_set in scores}


def prompt_ids(sample: Sample | ChatTokens) -> np.ndarray:
  """The token ids of a sample or a conversation up to where its last answer begins."""
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
    config: what to score, and which tiles a Flash compresses.
    data: tile, length and pixel settings of the questions.
    source: the model's definition.
    tokenizer: of prompts and answers.
    how: how forward passes are computed.
    stop_ids: ids that end an answer beside the template's; a run's model learns to end by that one.
    seed: chooses the questions that are shown.
  """
  if config.annotation is None:
    return None
  forward: dict[str, Any] = {
    "model": source.model,
    "how": how,
    "normalize_type": data.normalize_type,
    "image_token_id": tokenizer.image_token_id,
    "batch_size": config.batch_size,
  }
  router = make_router(
    source.config, config.compress, **{name: value for name, value in forward.items() if name != "batch_size"}
  )
  stops = tuple(dict.fromkeys((tokenizer.stop_token_id, *stop_ids)))
  sets = open_questions(config, data, tokenizer, source.config.tokens_per_tile)
  return Evaluation(
    sets=sets,
    tokenizer=tokenizer,
    decoder=GreedyDecoder(**forward, stop_ids=stops, max_new_tokens=config.max_new_tokens, router=router),
    loss=HeldOutLoss(**forward),
    shown_lines=tuple(chosen_lines(questions.limit, config.show, seed) for questions in sets),
  )
