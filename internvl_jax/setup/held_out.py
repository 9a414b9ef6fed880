"""Looks at held-out data before a run begins."""

import dataclasses
import os

from absl import logging

from internvl_jax.config import TrainConfig
from internvl_jax.data.load.inspection import decode_all, examine
from internvl_jax.data.load.mixture import Mixture
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.data.source.files import default_cache
from internvl_jax.errors import UserError
from internvl_jax.eval.questions import NAME, QuestionFile
from internvl_jax.hf.model import (
  Source,
)
from internvl_jax.setup.devices import processes
from internvl_jax.tasks.task import Task

_HELD_OUT_SHOWN = 5
"""Lines named in the message that refuses held-out data."""


def held_out_problems(config: TrainConfig, source: Source, chat: ChatTokenizer, task: Task) -> list[str]:
  """Why lines of `eval.annotation` and of the task's held-out data cannot be used, one text each.

  All of their images and videos are decoded, on all cores: what is found here is not found at the end of a run.

  Raises:
    UserError: a file cannot be opened at all.
  """
  found, tokens_per_tile, workers = [], source.config.tokens_per_tile, os.cpu_count() or 1
  if config.eval.annotation is not None:
    found += QuestionFile.open(config.eval, config.data, chat, tokens_per_tile).problems(workers)
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


def check_held_out(config: TrainConfig, source: Source, chat: ChatTokenizer, task: Task) -> None:
  """Refuses held-out data that would end the run when they are read; pairs that may be dropped are told.

  Raises:
    UserError: a line cannot be used.
  """
  found = held_out_problems(config, source, chat, task)
  if not found:
    return
  shown = " | ".join(found[:_HELD_OUT_SHOWN])
  what = f"{len(found)} lines of the held-out data cannot be used: {shown}"
  if config.loader.on_bad_sample == "drop" and not any(NAME in line for line in found):
    logging.warning("%s", what)
    return
  raise UserError(f"{what}; correct them before the run, which would end when it comes to them")
