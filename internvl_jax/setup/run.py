"""Opens a run: its model, and then its data."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from transformers import PreTrainedTokenizerBase

from internvl_jax import consistency
from internvl_jax.callbacks import (
  idle_on_text,
)
from internvl_jax.config import TrainConfig
from internvl_jax.data.load.fingerprint import files_digest
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.load.settings import Shards
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.eval.scoring import Evaluation, make_evaluation
from internvl_jax.eval.sets import read_sets
from internvl_jax.hf.model import Source
from internvl_jax.open_model import open_model
from internvl_jax.optim.learning_rate import warmup_remark
from internvl_jax.output_dir import output_folder
from internvl_jax.parallel import distributed
from internvl_jax.parallel import mesh as meshes
from internvl_jax.parallel.agreement import agree
from internvl_jax.serving import Export
from internvl_jax.setup.balance import run_row_cost
from internvl_jax.setup.devices import open_mesh, processes
from internvl_jax.setup.export import average_remark, open_export
from internvl_jax.setup.facts import RunFacts
from internvl_jax.setup.held_out import HeldOutCheck, start_check
from internvl_jax.setup.step import Setup, idle_on, set_up
from internvl_jax.tasks.task import Hooks, RunContext
from internvl_jax.watchdog import Watchdog

OPEN_SECONDS = 3600
"""How long processes wait for the last one to read its data and weights: 150 GB from a slow disk."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """What a run has opened before its data.

  Attributes:
    config: all of its settings.
    watchdog: is told what it is at.
    source: the model's checkpoint, opened.
    tokenizer: the checkpoint's.
    chat: the same, as conversations are tokenized.
    export: how the final model will be exported and served.
    setup: mesh, objective, optimizer and step.
    facts: what is recorded of it beside its metrics.
  """

  config: TrainConfig
  watchdog: Watchdog
  source: Source
  tokenizer: PreTrainedTokenizerBase
  chat: ChatTokenizer
  export: Export
  setup: Setup
  facts: RunFacts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """What a run learns from.

  Attributes:
    loader: at the first batch.
    hooks: what the task does at certain moments of the run.
    without_images: it has none, and is told so: see `idle_on_text`.
    evaluation: answers that are scored during the run and at its end; None for none.
    held_out: a look at what it will be scored on; `begin_or_go_on` waits for it.
  """

  held_out: HeldOutCheck
  loader: TrainLoader
  hooks: Hooks
  without_images: bool
  evaluation: Evaluation | None


def open_run(config: TrainConfig, watchdog: Watchdog, recipe: str | None = None) -> Run:
  """Opens the model's checkpoint and sets up how it trains; reads no weights.

  Args:
    config: of the run.
    watchdog: is told what it is at.
    recipe: what the command line named, to be recorded.

  Raises:
    UserError: it cannot train so.
  """
  with watchdog.phase("model"):
    source, tokenizer = open_model(config)
  chat = ChatTokenizer(tokenizer, config.data.conv_style, rows=source.config.text.vocab_size)
  with watchdog.phase("devices"):
    mesh = open_mesh(config, model=source.model)
  with watchdog.phase("set up"):
    setup = set_up(config, source, mesh)
  export = open_export(config, source, tokenizer, chat, setup.task)
  tell(*idle_on(config, source), average_remark(config, setup))
  return Run(
    config=config,
    watchdog=watchdog,
    source=source,
    tokenizer=tokenizer,
    chat=chat,
    export=export,
    setup=setup,
    facts=RunFacts(output_folder(config), config, recipe),
  )


def open_data(run: Run) -> Data:
  """The data of a run, on all hosts at once; tells what there is.

  Raises:
    UserError: the data cannot be used, are not the same on all hosts, or their rows do not suit the mesh.
  """
  config, setup, watchdog = run.config, run.setup, run.watchdog
  with watchdog.phase("data"):
    hooks, make_loader = open_loader(run)
    loader = hooks.source(make_loader())
  meshes.check_lengths(loader.sequence_sizes, setup.mesh)
  logging.info("Data:\n%s", "\n".join(loader.dataset_lines()))
  logging.info(
    "%d steps of %d rows, %d to an epoch", loader.total_steps, loader.global_batch, loader.steps_per_epoch
  )
  # What follows talks over the devices, where nobody waits for long.
  with watchdog.phase("barrier"):
    agree("the data are opened", lambda: shared_files(run, loader), seconds=OPEN_SECONDS)
  without_images = idle_on_text(setup.trainable, loader.has_images)
  tell(warmup_remark(config.training, loader.total_steps), without_images)
  with watchdog.phase("data"):
    held_out = start_check(config, run.source, run.chat, setup.task)
  return Data(
    held_out=held_out,
    loader=loader,
    hooks=hooks,
    without_images=without_images is not None,
    evaluation=make_evaluation(
      config.eval, config.data, run.source, run.chat, setup.how, seed=config.training.seed
    ),
  )


def open_loader(run: Run) -> tuple[Hooks, Callable[..., TrainLoader]]:
  """The task's hooks, and what makes the loader of the run's data."""
  config, setup = run.config, run.setup
  shards = host_shards(setup.mesh)
  make = functools.partial(
    TrainLoader, tokenizer=run.chat, tokens_per_tile=run.source.config.tokens_per_tile, shards=shards
  )
  context = RunContext(
    config=config,
    source=run.source,
    tokenizer=run.tokenizer,
    objective=setup.objective,
    mesh=setup.mesh,
    make_loader=make,
    chat=run.chat,
    watchdog=run.watchdog,
  )
  hooks = setup.task.hooks(context)
  balanced = dataclasses.replace(shards, row_cost=run_row_cost(config, run.source, setup.task))
  settings = config.data, config.training, config.loader
  return hooks, functools.partial(make, *settings, task=hooks.data, shards=balanced)


def shared_files(run: Run, loader: TrainLoader) -> dict[str, Any]:
  """What must be equal on all hosts when the data are opened: lines, order, tokenizer, weights, what is scored."""
  sets = read_sets(run.config.eval)
  annotations = {asked.spec().name: asked.spec().annotation for asked in sets}
  scored = files_digest(annotations, run.setup.task.held_out, run.config.loader.cache_dir)
  named = {"the sets of eval.annotation": [dataclasses.asdict(asked) for asked in sets]}
  return {**loader.shared_facts(), **scored, **named, **consistency.weights(run.source)}


def host_shards(mesh: jax.sharding.Mesh) -> Shards:
  """What the loader has to know of the hosts: the data shards, those of them that this one feeds, and how to sum."""
  shards, parts = meshes.data_parallel_size(mesh), meshes.data_parts(mesh)
  part, each = parts[jax.process_index()], shards // (max(parts) + 1)
  return Shards(
    count=shards,
    mine=range(part * each, (part + 1) * each),
    hosts=processes(),
    all_sum=functools.partial(distributed.sum_over, parts),
  )


def tell(*lines: str | None) -> None:
  """Logs what the user did not ask for, a line each, once for all hosts; None is nothing to tell."""
  for line in lines:
    if line is not None and distributed.is_first():
      logging.warning("%s", line)
