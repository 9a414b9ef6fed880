"""Looks at held-out data before a run begins."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Sequence

from absl import logging

from internvl_jax.config import TrainConfig
from internvl_jax.data.load.inspection import decode_all, examine
from internvl_jax.data.load.mixture import Mixture
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.data.source.files import default_cache
from internvl_jax.errors import UserError
from internvl_jax.eval.questions import QuestionFile, open_questions
from internvl_jax.eval.sets import NAME
from internvl_jax.hf.model import (
  Source,
)
from internvl_jax.setup.devices import processes
from internvl_jax.tasks.task import Task

_HELD_OUT_SHOWN = 5
"""Lines named in the message that refuses held-out data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutCheck:
  """A look at held-out data that is under way.

  Attributes:
    questions: gives why lines of `eval.annotation` cannot be asked; None where there are none.
    others: why lines of the task's held-out data cannot be used.
    drops: lines that cannot be used may be left out.
  """

  questions: concurrent.futures.Future[list[str]] | None
  others: list[str]
  drops: bool

  def problems(self) -> list[str]:
    """Waits for it; returns why lines cannot be used, one text each."""
    return [*(self.questions.result() if self.questions is not None else []), *self.others]

  def finish(self) -> None:
    """Waits for it. Refuses held-out data that would end the run when they are read; pairs that may be dropped are told.

    Raises:
      UserError: a line cannot be used.
    """
    found = self.problems()
    if not found:
      return
    shown = " | ".join(found[:_HELD_OUT_SHOWN])
    what = f"{len(found)} lines of the held-out data cannot be used: {shown}"
    if self.drops and not any(NAME in line for line in found):
      logging.warning("%s", what)
      return
    raise UserError(f"{what}; correct them before the run, which would end when it comes to them")


def start_check(config: TrainConfig, source: Source, chat: ChatTokenizer, task: Task) -> HeldOutCheck:
  """Begins to look at the lines of `eval.annotation` on a thread; those of the task's held-out data it has looked at.

  All of their images and videos are decoded, on all cores: what is found here is not found at the end of a run.

  Raises:
    UserError: a file cannot be opened at all.
  """
  questions = None
  if config.eval.annotation is not None:
    sets = open_questions(config.eval, config.data, chat, source.config.tokens_per_tile)
    thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="questions")
    questions = thread.submit(_all_problems, sets)
    thread.shutdown(wait=False)
  # These ask other hosts, which only the main thread may.
  others = pair_problems(config, source, chat, task)
  return HeldOutCheck(questions=questions, others=others, drops=config.loader.on_bad_sample == "drop")


def _all_problems(sets: Sequence[QuestionFile]) -> list[str]:
  return [line for questions in sets for line in questions.problems(os.cpu_count() or 1)]


def pair_problems(config: TrainConfig, source: Source, chat: ChatTokenizer, task: Task) -> list[str]:
  """Why lines of the task's held-out data cannot be used, one text each."""
  found, tokens_per_tile, workers = [], source.config.tokens_per_tile, os.cpu_count() or 1
  for meta_path in filter(None, task.held_out.values()):
    cache = config.loader.cache_dir or default_cache()
    mixture = Mixture(
      dataclasses.replace(config.data, meta_path=meta_path),
      chat,
      tokens_per_tile=tokens_per_tile,
      seed=config.training.seed,
      policy=config.loader.on_over_length,
      cache=cache,
      lines=task.data.lines,
    )
    mixture.index_sizes(cache, workers=workers, quiet=config.training.disable_tqdm, hosts=processes())
    found += [line for report in examine(mixture) for line in report.examples]
    found += decode_all(mixture, packed=config.data.use_packed_ds, workers=workers)
    mixture.close()
  return found
