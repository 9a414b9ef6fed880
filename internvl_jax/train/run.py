"""A whole run: reads the data and the weights, trains, saves, exports and scores."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
from absl import logging
from transformers import PreTrainedTokenizerBase

from internvl_jax import cli, consistency
from internvl_jax.arguments import TrainingArguments
from internvl_jax.assembly import (
  Setup,
  check_held_out,
  data_task,
  idle_on,
  log_parameters,
  open_export,
  open_mesh,
  processes,
  reference_copies,
  set_up,
  set_up_jax,
)
from internvl_jax.callbacks import (
  UNMOVED_STEPS,
  Callback,
  Check,
  FirstBatch,
  Profile,
  SkippedSteps,
  Unmoved,
  idle_on_text,
)
from internvl_jax.checkpoint.checkpointer import Checkpointer
from internvl_jax.config import TrainConfig, shared_settings, to_json
from internvl_jax.config_checks import problems, validate
from internvl_jax.data.load.counters import untaught_samples
from internvl_jax.data.load.fingerprint import files_digest
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.load.settings import Shards
from internvl_jax.data.load.show import show_batch
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.errors import UserError
from internvl_jax.eval.scoring import Evaluation, make_evaluation
from internvl_jax.finish import finish
from internvl_jax.hf.model import Source
from internvl_jax.intervals import best_of
from internvl_jax.metrics import mfu
from internvl_jax.metrics.gauges import Gauges
from internvl_jax.metrics.run_log import RunLog
from internvl_jax.metrics.trace import Trace
from internvl_jax.metrics.writers import open_writers
from internvl_jax.objectives import PreferenceOptimization, SupervisedFineTuning
from internvl_jax.open_model import open_model
from internvl_jax.optim.learning_rate import make_schedule, warmup_remark
from internvl_jax.output_dir import begin_output, output_dir_held, output_folder
from internvl_jax.outputs import (
  Beginning,
  read_from,
  write_config,
  write_json,
)
from internvl_jax.parallel import distributed
from internvl_jax.parallel import mesh as meshes
from internvl_jax.parallel.agreement import agree
from internvl_jax.parallel.replicas import check_replicas
from internvl_jax.preference import PreferenceRun
from internvl_jax.serving import Export
from internvl_jax.state import TrainState
from internvl_jax.trainer import CompiledSteps, Trainer
from internvl_jax.watchdog import Watchdog

OPEN_SECONDS = EXPORT_SECONDS = 3600
"""How long processes wait for the last one to read its weights, and for the first one to write the model: 150 GB from
or to a slow disk."""


def train(config: TrainConfig) -> bool:
  """A whole run, from its config to the model in its output directory; on every process of the run alike.

  Returns:
    Whether the model is there: not where the run was told to stop.
  """
  with distributed.initialized(config.runtime.distributed, cli.report):
    if jax.process_count() > 1:
      cli.set_up_logging(process=jax.process_index())
    # Before `validate`, which would end one process and leave the others waiting for it.
    agree("the settings are read", lambda: shared_start(config), seconds=distributed.JOIN_SECONDS)
    validate(config)
    if distributed.is_first():
      cli.warn_idle(config)
    with (
      Watchdog(distributed.host_name(), config.runtime.hang_seconds) as watchdog,
      output_dir_held(config, watchdog) as beginning,
    ):
      return _run(config, watchdog, beginning)


def shared_start(config: TrainConfig) -> dict[str, Any]:
  """What must be equal on all hosts when they have joined: settings, what speaks against them, and programs."""
  against = {"what speaks against the configuration": problems(config) or "nothing"}
  return {**shared_settings(config), **against, **consistency.programs()}


def shared_files(config: TrainConfig, source: Source, loader: TrainLoader) -> dict[str, Any]:
  """What must be equal on all hosts when the data are opened: lines, order, tokenizer, weights, what is scored."""
  annotations = {"eval.annotation": config.eval.annotation}
  metas = {"preference.eval_meta_path": config.preference.eval_meta_path}
  scored = files_digest(annotations, metas, config.loader.cache_dir)
  return {**loader.shared_facts(), **scored, **consistency.weights(source)}


def _run(config: TrainConfig, watchdog: Watchdog, beginning: Beginning) -> bool:
  set_up_jax(config)
  run = open_run(config, watchdog)
  # The data are looked at before the weights are read: mistakes are likelier there, and cheaper to find.
  loader, data = open_data(run)
  checkpointer, log, progress = begin_or_go_on(run, data, loader, beginning)
  del loader  # A run that goes on has another.
  asked_to_stop = distributed.StopSignal()
  with log, asked_to_stop, closed_after_error(progress.loader, checkpointer):
    trainer = make_trainer(run, data, progress.loader, checkpointer, log, asked_to_stop)
    progress.state = trainer.run(progress.state, progress.frozen)
  saved = checkpointer.latest_step == int(progress.state.step)
  tell(untaught_samples(progress.loader.counters()))
  progress.loader.close()
  if stops_here(progress, asked_to_stop, saved=saved):
    checkpointer.close()
    distributed.barrier("the run is stopped", seconds=distributed.JOIN_SECONDS)
    logging.warning("Stopped; the same command goes on from step %d", int(progress.state.step))
    return False
  params = final_params(run, progress, checkpointer, log)
  checkpointer.close()
  log.save_results(num_samples=progress.loader.num_samples)
  del progress  # The optimizer's moments make room for the layers that the export brings together.
  with watchdog.phase("export"), contextlib.nullcontext() if saved else asked_to_stop:
    if not saved:
      asked_to_stop.listen()  # The model is all that is kept of this run.
    write_results(run, data, params)
  tell(log.skipped_remark())
  return True


@contextlib.contextmanager
def closed_after_error(loader: TrainLoader, checkpointer: Checkpointer) -> Iterator[None]:
  """Where the body fails, ends the workers and completes the checkpoint that is being written; the error goes on."""
  try:
    yield
  except Exception:
    loader.close()
    if jax.process_count() == 1:  # Others would be waited for, and may be what failed.
      try:
        checkpointer.close()
      except Exception as later:
        logging.debug("The checkpoint under way failed, too: %s", later)
    raise


def tell(*lines: str | None) -> None:
  """Logs what the user did not ask for, a line each, once for all hosts; None is nothing to tell."""
  for line in lines:
    if line is not None and distributed.is_first():
      logging.warning("%s", line)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """What a run has opened before its data.

  Attributes:
    config: all of its settings.
    watchdog: is told what it is at.
    source: the model's checkpoint, looked at.
    tokenizer: the checkpoint's.
    chat: the same, as conversations are tokenized.
    looked_at: how the final model will be asked.
    setup: mesh, objective, optimizer and step.
  """

  config: TrainConfig
  watchdog: Watchdog
  source: Source
  tokenizer: PreTrainedTokenizerBase
  chat: ChatTokenizer
  looked_at: Export
  setup: Setup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """What a run learns from.

  Attributes:
    make: makes its loader, at the first batch.
    pairs: what preferences need beside it; None without.
    without_images: it has none, and is told so: see `idle_on_text`.
    evaluation: answers that are scored during the run and at its end; None for none.
  """

  make: Callable[..., TrainLoader]
  pairs: PreferenceRun | None
  without_images: bool
  evaluation: Evaluation | None


@dataclasses.dataclass(kw_only=True)
class Progress:
  """Where a run is.

  Attributes:
    state: what trains, and its step.
    frozen: the parameters that do not.
    loader: before the batch that comes next.
  """

  state: TrainState
  frozen: dict[str, jax.Array]
  loader: TrainLoader


def open_run(config: TrainConfig, watchdog: Watchdog) -> Run:
  """Looks at the model, and sets up how it trains; reads no weights.

  Raises:
    UserError: it cannot train so.
  """
  with watchdog.phase("model"):
    source, tokenizer = open_model(config)
  chat = ChatTokenizer(tokenizer, config.data.conv_style, rows=source.config.text.vocab_size)
  looked_at = open_export(config, source, tokenizer, chat)
  setup = set_up(config, source, open_mesh(config, model=source.model))
  tell(*idle_on(config, source))
  return Run(
    config=config,
    watchdog=watchdog,
    source=source,
    tokenizer=tokenizer,
    chat=chat,
    looked_at=looked_at,
    setup=setup,
  )


def open_data(run: Run) -> tuple[TrainLoader, Data]:
  """The data of a run and their loader at the first batch, on all hosts at once; tells what there is.

  Raises:
    UserError: the data cannot be used, are not the same on all hosts, or their rows do not suit the mesh.
  """
  config, source, setup, watchdog = run.config, run.source, run.setup, run.watchdog
  open_loader = functools.partial(
    TrainLoader,
    tokenizer=run.chat,
    tokens_per_tile=source.config.tokens_per_tile,
    shards=host_shards(setup.mesh),
  )
  pairs, task = None, data_task(config, source)
  if isinstance(setup.objective, PreferenceOptimization):
    pairs = PreferenceRun(config, source, setup.objective, setup.mesh, open_loader, task, watchdog)
  if pairs is not None:
    task = pairs.with_lookup(task)
  make = functools.partial(open_loader, config.data, config.training, config.loader, task=task)
  with watchdog.phase("data"):
    loader = make()
  meshes.check_lengths(loader.sequence_sizes, setup.mesh)
  logging.info("Data:\n%s", "\n".join(loader.describe()))
  logging.info(
    "%d steps of %d rows, %d to an epoch", loader.total_steps, loader.global_batch, loader.steps_per_epoch
  )
  # What follows talks over the devices, where nobody waits for long.
  with watchdog.phase("barrier"):
    agree("the data are opened", lambda: shared_files(config, source, loader), seconds=OPEN_SECONDS)
  without_images = idle_on_text(setup.trainable, loader.has_images)
  tell(warmup_remark(config.training, loader.total_steps), without_images)
  with watchdog.phase("data"):
    check_held_out(config, source, run.chat)
  return loader, Data(
    make=make,
    pairs=pairs,
    without_images=without_images is not None,
    evaluation=make_evaluation(config.eval, config.data, source, run.chat, setup.how),
  )


def begin_or_go_on(
  run: Run, data: Data, loader: TrainLoader, beginning: Beginning
) -> tuple[Checkpointer, RunLog, Progress]:
  """The weights, and the state of the newest checkpoint where there is one; the output directory is begun.

  Raises:
    UserError: the weights cannot be read, or the checkpoint is of another run.
  """
  config, setup = run.config, run.setup
  log_parameters(setup)
  resumes = distributed.first_says(beginning == "resume")
  # A checkpoint has what trains: there is no room for it twice. Preferences need it as it was at the start, too.
  params = read_weights(config, setup, run.watchdog, all_of_it=not resumes or data.pairs is not None)
  begin_output(config, beginning)

  def best_of(steps: Collection[int]) -> int | None:
    return log.best_step(steps)  # The log is opened once nothing speaks against going on.

  checkpointer = Checkpointer(
    output_folder(config),
    keep=config.training.save_total_limit,
    spare=best_of if config.training.load_best_model_at_end else None,
  )
  if data.pairs is not None:
    data.pairs.prepare(params, loader, resumes=resumes)
  frozen = {path: value for path, value in params.items() if path not in setup.trainable}
  frozen |= reference_copies(config, run.source, params, setup.trainable)
  log_state = None
  if resumes:
    del params
    state, loader, log_state = go_on(run, checkpointer, data.make)
  else:
    state = setup.create_state(params)
    del params
  # Nothing speaks against going on any more.
  log = open_log(config, setup, loader)
  if log_state is not None:
    with read_from(checkpointer.folder, "trainer"):
      log.restore(log_state)
    if distributed.is_first():
      write_config(output_folder(config), to_json(config))
  return checkpointer, log, Progress(state=state, frozen=frozen, loader=loader)


def make_trainer(
  run: Run,
  data: Data,
  loader: TrainLoader,
  checkpointer: Checkpointer,
  log: RunLog,
  asked_to_stop: distributed.StopSignal,
) -> Trainer:
  """The loop of a run."""
  config, setup = run.config, run.setup
  return Trainer(
    training=config.training,
    steps=CompiledSteps(setup.step, setup.mesh, xla_options=config.runtime.xla_options),
    schedule=make_schedule(config.training, loader.total_steps),
    loader=loader,
    checkpointer=checkpointer,
    log=log,
    watchdog=run.watchdog,
    stop=asked_to_stop,
    evaluate=joint_metrics(data.evaluation, data.pairs),
    callbacks=make_callbacks(run, data, loader, log),
  )


def make_callbacks(run: Run, data: Data, loader: TrainLoader, log: RunLog) -> list[Callback]:
  """What watches the loop of a run."""
  runtime = run.config.runtime
  trained = {path.partition(".")[0] for path in run.setup.trainable}
  # Of data without images it was told what learns from images alone.
  told = {"vision_model", "mlp1"} if data.without_images else set()
  traced = runtime.profile_steps if distributed.is_first() else ()
  return [
    FirstBatch(lambda batch: show_batch(batch, run.chat)),
    *([Check(data.pairs.check)] if data.pairs is not None else []),
    Profile(Trace(output_folder(run.config) / "profile", traced)),
    Unmoved(trained - told, min(UNMOVED_STEPS, loader.total_steps)),
    SkippedSteps(log, loader.describe_batch, limit=runtime.max_nonfinite_steps),
  ]


def stops_here(progress: Progress, asked_to_stop: distributed.StopSignal, *, saved: bool) -> bool:
  """Whether a run ends before its model is written: the same command goes on."""
  if int(progress.state.step) < progress.loader.total_steps:
    return True
  return saved and asked_to_stop.received and jax.process_count() == 1


def final_params(
  run: Run, progress: Progress, checkpointer: Checkpointer, log: RunLog
) -> dict[str, jax.Array]:
  """The parameters of the model that a run ends with: the last one's, or the best one's."""
  best = log.best_step(checkpointer.steps)
  if best is not None and best != progress.loader.total_steps:
    del progress.state  # There is no room for it twice.
    progress.state = best_state(run, checkpointer, best)
  params = {**progress.frozen, **progress.state.model_params()}
  return {path: value for path, value in params.items() if path in run.source.model.shapes}


def write_results(run: Run, data: Data, params: dict[str, jax.Array]) -> None:
  """Writes how held-out pairs are judged, the final model, and how its answers score."""
  judged = data.pairs.metrics(params) if data.pairs is not None else {}
  if judged and distributed.is_first():
    write_json(output_folder(run.config) / "preference_results.json", judged)
    logging.info("Held-out pairs: %s", judged)
  finish(run.config, run.source, run.tokenizer, run.chat, run.looked_at, params, data.evaluation)
  distributed.barrier("the model is saved", seconds=EXPORT_SECONDS)


def read_weights(
  config: TrainConfig, setup: Setup, watchdog: Watchdog, *, all_of_it: bool
) -> dict[str, jax.Array]:
  """The parameters by path, where they lie: all of them, or those alone that do not train."""
  with watchdog.phase("weights"):
    params = setup.source.load(
      setup.shapes,
      setup.places.params,
      seed=config.training.seed,
      paths=None if all_of_it else setup.shapes.keys() - setup.trainable,
    )
    distributed.barrier("the weights are read", seconds=OPEN_SECONDS)
    check_replicas(params, str(config.model.model_name_or_path or "model.vision_path and model.llm_path"))
  return params


def go_on(
  run: Run, checkpointer: Checkpointer, make_loader: Callable[..., TrainLoader]
) -> tuple[TrainState, TrainLoader, dict[str, Any]]:
  """The state of the newest checkpoint, the loader before the batch that comes next, and the log's state.

  Raises:
    UserError: the checkpoint is of another run.
  """
  with run.watchdog.phase("restore"):
    state, loader_state, log_state = checkpointer.restore(run.setup.abstract_state())
    with read_from(checkpointer.folder / str(int(state.step)), "loader"):
      loader = make_loader()
      loader.set_state(loader_state)
  check_length(run.config.training, int(state.step), loader.total_steps)
  logging.info("Resuming from the checkpoint of step %d", int(state.step))
  return state, loader, log_state


def best_state(run: Run, checkpointer: Checkpointer, step: int) -> TrainState:
  """The state of the checkpoint whose model has the best score."""
  logging.info("The best model is that of step %d", step)
  with run.watchdog.phase("restore"):
    return checkpointer.restore(run.setup.abstract_state(), step=step)[0]


def open_log(config: TrainConfig, setup: Setup, loader: TrainLoader) -> RunLog:
  """The log of a run, which knows what a step needs and what the devices could do."""
  source, twice = setup.source, parts_run_twice(setup.objective)
  folder, writers = output_folder(config), []
  if distributed.is_first():
    writers = open_writers(config.training, folder, total_steps=loader.total_steps)
  return RunLog(
    config.training,
    folder,
    total_steps=loader.total_steps,
    epoch_of=loader.epoch_of,
    gauges=Gauges(
      useful=mfu.useful_flops(source.config, source.model.shapes, setup.trainable, twice=twice),
      peak=mfu.peak_flops(jax.devices()),
      devices=jax.local_devices(),
    ),
    best=best_of(config.training, answers=config.eval.annotation is not None),
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


def parts_run_twice(objective: SupervisedFineTuning | PreferenceOptimization) -> tuple[str, ...]:
  """The parts of the model that a reference policy in memory runs as well."""
  is_preference = isinstance(objective, PreferenceOptimization)
  return objective.reference.parts if is_preference and objective.reference else ()


def joint_metrics(
  evaluation: Evaluation | None, pairs: PreferenceRun | None
) -> Callable[[dict[str, jax.Array], int], dict[str, float]] | None:
  """What scores the model during a run: its answers, and how it judges held-out pairs; None if neither is asked for."""
  if evaluation is None and (pairs is None or not pairs.evaluates):
    return None

  def metrics(params: dict[str, jax.Array], step: int) -> dict[str, float]:
    answers = evaluation.metrics(params, step) if evaluation else {}
    return answers | (pairs.metrics(params) if pairs else {})

  return metrics


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
