"""The weights and the state that a run begins with, or goes on with."""

import dataclasses
from collections.abc import Callable, Collection

import jax
from absl import logging

from internvl_jax.arguments import TrainingArguments
from internvl_jax.checkpoint.checkpointer import Checkpointer
from internvl_jax.config import to_json
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.errors import UserError
from internvl_jax.eval.sets import first_score
from internvl_jax.intervals import best_of
from internvl_jax.metrics import mfu
from internvl_jax.metrics.gauges import Gauges
from internvl_jax.metrics.run_log import RunLog
from internvl_jax.metrics.writers import TrackedRun, open_writers
from internvl_jax.models.base_weights import as_kernels
from internvl_jax.output_dir import begin_output, output_folder
from internvl_jax.outputs import (
  Beginning,
  read_from,
  write_config,
)
from internvl_jax.parallel import distributed
from internvl_jax.parallel.replicas import check_replicas
from internvl_jax.setup.run import Data, Run
from internvl_jax.setup.step import log_parameters
from internvl_jax.state import TrainState

OPEN_SECONDS = 3600
"""How long processes wait for the last one to read its weights: 150 GB from a slow disk."""


@dataclasses.dataclass(kw_only=True)
class Progress:
  """Where a run is.

  Attributes:
    state: what trains, and its step.
    frozen: the parameters that do not, and copies that the task needs.
    loader: before the batch that comes next.
    log: of what was logged so far.
    checkpointer: of the run's directory.
  """

  state: TrainState
  frozen: dict[str, jax.Array]
  loader: TrainLoader
  log: RunLog
  checkpointer: Checkpointer


def begin_or_go_on(run: Run, data: Data, beginning: Beginning) -> Progress:
  """The weights, and the state of the newest checkpoint where there is one; the output directory is begun.

  Raises:
    UserError: the weights cannot be read, or the checkpoint is of another run.
  """
  log_parameters(run.setup)
  resumes = distributed.first_says(beginning == "resume")
  data.hooks.before_weights(data.loader)
  params = read_weights(run, all_of_it=not resumes or data.hooks.needs_start)
  with run.watchdog.phase("held-out data"):
    data.held_out.finish()
  begin_output(run.config, beginning)
  data.hooks.prepare(params, data.loader, resumes=resumes)
  with run.watchdog.phase("state"):
    frozen = {path: value for path, value in params.items() if path not in run.setup.trainable}
    frozen |= run.setup.copies(params)
    state = None if resumes else run.setup.create_state(params)
  if state is not None:
    return begin(run, data, frozen, state)
  # What trains is in the checkpoint, and there is no room for it twice.
  params.clear()
  return go_on(run, data, frozen)


def begin(run: Run, data: Data, frozen: dict[str, jax.Array], state: TrainState) -> Progress:
  """Begins at the first step."""
  log = open_log(run, data.loader)
  return Progress(
    state=state,
    frozen=frozen,
    loader=data.loader,
    log=log,
    checkpointer=open_checkpointer(run, log.best_step),
  )


def go_on(run: Run, data: Data, frozen: dict[str, jax.Array]) -> Progress:
  """Goes on from the newest checkpoint.

  Raises:
    UserError: the checkpoint is of another run.
  """
  loader, logs = data.loader, list[RunLog]()

  def best_step(steps: Collection[int]) -> int | None:
    return logs[0].best_step(steps)  # The log is opened once nothing speaks against going on.

  checkpointer = open_checkpointer(run, best_step)
  with run.watchdog.phase("restore"):
    state, loader_state, log_state = checkpointer.restore(run.setup.abstract_state())
    with read_from(checkpointer.folder / str(int(state.step)), "loader"):
      loader.set_state(loader_state)
  check_length(run.config.training, int(state.step), loader.total_steps)
  logging.info("Resuming from the checkpoint of step %d", int(state.step))
  logs.append(open_log(run, loader))
  with read_from(checkpointer.folder, "trainer"):
    logs[0].restore(log_state)
  if distributed.is_first():
    write_config(output_folder(run.config), to_json(run.config))
  return Progress(state=state, frozen=frozen, loader=loader, log=logs[0], checkpointer=checkpointer)


def open_checkpointer(run: Run, best_step: Callable[[Collection[int]], int | None]) -> Checkpointer:
  """The checkpoints of the run's directory, which keeps the best one where the config says so."""
  training = run.config.training
  return Checkpointer(
    output_folder(run.config),
    keep=training.save_total_limit,
    spare=best_step if training.load_best_model_at_end else None,
  )


def read_weights(run: Run, *, all_of_it: bool) -> dict[str, jax.Array]:
  """The parameters by path, sharded: all of them, or those alone that do not train."""
  config, setup = run.config, run.setup
  with run.watchdog.phase("weights"):
    params = setup.source.load(
      setup.shapes,
      setup.places.params,
      seed=config.training.seed,
      paths=None if all_of_it else setup.shapes.keys() - setup.trainable,
    )
    distributed.barrier("the weights are read", seconds=OPEN_SECONDS)
    check_replicas(params, str(config.model.model_name_or_path or "model.vision_path and model.llm_path"))
  return params


def best_params(run: Run, checkpointer: Checkpointer, step: int) -> dict[str, jax.Array]:
  """The parameters that train, from the checkpoint of the step whose model has the best score."""
  logging.info("The best model is that of step %d", step)
  with run.watchdog.phase("restore"):
    state, _, _ = checkpointer.restore(run.setup.abstract_state(), step=step)
    return state.model_params(average=run.config.checkpoint.export_average)


def open_log(run: Run, loader: TrainLoader) -> RunLog:
  """The log of a run, which knows what a step needs and what the devices could do."""
  config, setup, source = run.config, run.setup, run.source
  folder, writers = output_folder(config), []
  if distributed.is_first():
    tracked = TrackedRun(
      training=config.training, output_dir=folder, config=to_json(config), tags=config.runtime.tags
    )
    writers = open_writers(tracked, total_steps=loader.total_steps, terms=run.setup.task.shown_terms)
  return RunLog(
    config.training,
    folder,
    total_steps=loader.total_steps,
    epoch_of=loader.epoch_of,
    gauges=Gauges(
      useful=mfu.useful_flops(
        source.config, as_kernels(source.model.shapes), setup.trainable, twice=setup.task.twice
      ),
      peak=mfu.peak_flops(jax.devices()),
      devices=jax.local_devices(),
    ),
    best=best_of(config.training, first=first_score(config.eval)),
    writers=writers,
  )


def check_length(training: TrainingArguments, taken: int, total: int) -> None:
  """Refuses to go on with a run that would have ended before its checkpoint.

  Raises:
    UserError: it would.
  """
  if taken > total:
    raise UserError(
      f"the newest checkpoint in {training.output_dir} is of step {taken}, but the run is to end after step {total} "
      f"(training.max_steps={training.max_steps}, training.num_train_epochs={training.num_train_epochs:g}); raise it, or "
      "begin anew with another output_dir or training.overwrite_output_dir=True"
    )
