"""A whole run: reads the data and the weights, trains, saves, exports and scores."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging

from internvl_jax import cli, consistency
from internvl_jax.batch import abstract_batch
from internvl_jax.callbacks import (
  UNMOVED_STEPS,
  Callback,
  Check,
  FirstBatch,
  Profile,
  SkippedSteps,
  StartTimes,
  Unmoved,
)
from internvl_jax.checkpoint.checkpointer import Checkpointer
from internvl_jax.config import TrainConfig, shared_settings
from internvl_jax.config_checks import problems, validate
from internvl_jax.data.load.counters import untaught_samples
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.load.show import show_batch
from internvl_jax.eval.scoring import Evaluation
from internvl_jax.finish import finish, score_answers
from internvl_jax.metrics.run_log import RunLog
from internvl_jax.metrics.trace import Trace
from internvl_jax.optim.learning_rate import make_schedule
from internvl_jax.output_dir import output_dir_held, output_folder
from internvl_jax.outputs import (
  REPORT_FILE,
  Beginning,
  newest_checkpoint,
  write_json,
)
from internvl_jax.parallel import distributed
from internvl_jax.parallel.agreement import agree
from internvl_jax.reporting.page import write_report
from internvl_jax.setup.devices import set_up_jax
from internvl_jax.setup.export import exported_weights
from internvl_jax.setup.progress import Progress, begin_or_go_on, best_params
from internvl_jax.setup.run import Data, Run, open_data, open_run, tell
from internvl_jax.stopwatch import Stopwatch
from internvl_jax.storage.paths import BucketPath
from internvl_jax.tasks.task import Hooks
from internvl_jax.trainer import CompiledSteps, Trainer
from internvl_jax.watchdog import Watchdog

EXPORT_SECONDS = 3600
"""How long processes wait for the first one to write the model: 150 GB to a slow disk."""


def train(config: TrainConfig, stopwatch: Stopwatch | None = None, *, recipe: str | None = None) -> bool:
  """A whole run, from its config to the model in its output directory; on every process of the run alike.

  Args:
    config: of the run.
    stopwatch: has measured the start so far; None: it begins here.
    recipe: what the command line named, to be recorded; None for none.

  Returns:
    Whether the model is there: not where the run was told to stop.
  """
  stopwatch = stopwatch or Stopwatch()
  with distributed.initialized(config.runtime.distributed, cli.report):
    if jax.process_count() > 1:
      cli.set_up_logging(process=jax.process_index())
    # Before `validate`, which would end one process and leave the others waiting for it.
    agree("the settings are read", lambda: shared_start(config), seconds=distributed.JOIN_SECONDS)
    validate(config)
    if distributed.is_first():
      cli.warn_idle(config)
    with (
      Watchdog(distributed.host_name(), config.runtime.hang_seconds, stopwatch=stopwatch) as watchdog,
      output_dir_held(config, watchdog) as beginning,
    ):
      return _run(config, watchdog, beginning, recipe)


def shared_start(config: TrainConfig) -> dict[str, Any]:
  """Returns what must be equal on all hosts when they have connected: settings, their problems, and programs."""
  against = {"what speaks against the configuration": problems(config) or "nothing"}
  return {**shared_settings(config), **against, **consistency.programs()}


def _run(config: TrainConfig, watchdog: Watchdog, beginning: Beginning, recipe: str | None) -> bool:
  set_up_jax(config)
  run = open_run(config, watchdog, recipe)
  # The data are checked before the weights are read: mistakes are likelier there, and cheaper to find.
  data = open_data(run)
  steps = start_compiling(run, data, beginning)
  stop = distributed.StopSignal()
  with contextlib.ExitStack() as opened:
    learned = learn(run, data, steps, beginning, stop, opened)
    if learned is None:
      return False
    with watchdog.phase("export"), contextlib.nullcontext() if learned.saved else stop:
      if not learned.saved:
        stop.listen()  # The model is all that is kept of this run.
      export(run, data, learned)
  tell(*learned.log.remarks())
  return True


def start_compiling(run: Run, data: Data, beginning: Beginning) -> CompiledSteps:
  """The step, which is compiled for the first batch on a thread, while weights are read.

  Its shape is foreseen from sizes; of a run that goes on, it is that of the first batch of all, which is likely, too.
  """
  setup, loader = run.setup, data.loader
  steps = CompiledSteps(
    setup.step,
    setup.mesh,
    xla_options=run.config.runtime.xla_options,
    stopwatch=run.watchdog.stopwatch,
  )
  newest = newest_checkpoint(str(output_folder(run.config))) if beginning == "resume" else 0
  if distributed.first_says((newest or 0) < loader.total_steps):
    with run.watchdog.phase("data"):
      sizes = loader.next_sizes()
    batch = abstract_batch(setup.task.batch, {**sizes, **setup.task.sizes(sizes["S"])}, jax.ShapeDtypeStruct)
    steps.compile_beside(setup.abstract_state(), setup.abstract_frozen(), batch)
  return steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
  """What is left of a run after its last step: the optimizer's moments make room for what the export all-gathers.

  Attributes:
    params: the parameters of the model that the run ends with.
    step: steps that it has taken.
    saved: there is a checkpoint of the last step.
    log: of the run.
  """

  params: dict[str, jax.Array]
  step: int
  saved: bool
  log: RunLog


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
  """A run after its loop.

  Attributes:
    step: steps taken.
    model_step: the step whose model the run ends with.
    trained: the parameters that train; None where those of an earlier step are the best.
    frozen, loader, log, checkpointer: as in `Progress`.
  """

  step: int
  model_step: int
  trained: dict[str, jax.Array] | None
  frozen: dict[str, jax.Array]
  loader: TrainLoader
  log: RunLog
  checkpointer: Checkpointer


def learn(
  run: Run,
  data: Data,
  steps: CompiledSteps,
  beginning: Beginning,
  stop: distributed.StopSignal,
  opened: contextlib.ExitStack,
) -> Learned | None:
  """Trains from the first step, or from the newest checkpoint, to the last; None where it was told to stop before.

  The log stays open until the end of `opened`: results and scores are still to come.
  """
  ended = take_steps(run, data, steps, beginning, stop, opened)
  loader, checkpointer, log = ended.loader, ended.checkpointer, ended.log
  saved = checkpointer.latest_step == ended.step
  tell(untaught_samples(loader.counters()))
  loader.close()
  if ended.step < loader.total_steps or (saved and stop.received and jax.process_count() == 1):
    checkpointer.close()
    distributed.barrier("the run is stopped", seconds=distributed.JOIN_SECONDS)
    logging.warning("Stopped; the same command goes on from step %d", ended.step)
    return None
  params = {
    **ended.frozen,
    **(best_params(run, checkpointer, ended.model_step) if ended.trained is None else ended.trained),
  }
  checkpointer.close()
  log.save_results(num_samples=loader.num_samples)
  return Learned(
    params={path: value for path, value in params.items() if path in run.source.model.shapes},
    step=ended.model_step,
    saved=saved,
    log=log,
  )


def take_steps(
  run: Run,
  data: Data,
  steps: CompiledSteps,
  beginning: Beginning,
  stop: distributed.StopSignal,
  opened: contextlib.ExitStack,
) -> Ended:
  """Runs the loop; the optimizer's moments are gone when it returns."""
  progress = begin_or_go_on(run, data, beginning)
  opened.callback(report_run, run.config)  # Once the log is closed, however the run ends.
  log = opened.enter_context(progress.log)
  run.facts.begin(int(progress.state.step))
  with log.steps(), stop, closed_after_error(progress.loader, progress.checkpointer):
    state = make_trainer(run, data, steps, progress, stop).run(progress.state, progress.frozen)
  steps.close()
  best = progress.log.best_step(progress.checkpointer.steps)
  # There is no room for the last state beside the best one.
  is_last = best is None or best == progress.loader.total_steps
  return Ended(
    step=int(state.step),
    model_step=int(state.step) if best is None else best,
    trained=state.model_params(average=run.config.checkpoint.export_average) if is_last else None,
    frozen=progress.frozen,
    loader=progress.loader,
    log=progress.log,
    checkpointer=progress.checkpointer,
  )


def report_run(config: TrainConfig) -> None:
  """Writes the report page; that it cannot be written is a warning, since the run is more than its report."""
  if not (config.runtime.report and distributed.is_first()):
    return
  folder = output_folder(config)
  # Who stops a run gives it some seconds, and a bucket may be slow.
  if isinstance(folder, BucketPath) and not (folder / "train_results.json").exists():
    return
  try:
    logging.info("The run on a page: %s", write_report(folder, folder / REPORT_FILE, ended=True))
  except Exception as error:  # Whatever it is: files of any kind are read.
    logging.warning("The report could not be written (%s: %s)", type(error).__name__, error)


def export(run: Run, data: Data, learned: Learned) -> None:
  """Writes how held-out samples are scored, the final model, and how its answers score."""
  scores = data.hooks.evaluate(learned.params)
  if scores and distributed.is_first():
    write_json(output_folder(run.config) / f"{run.setup.task.name}_results.json", scores)
    logging.info("Held-out samples: %s", scores)
  weights_from = exported_weights(run.config, run.setup, learned.step)
  finish(run.config, run.source, run.tokenizer, run.chat, run.export, learned.params, weights_from)
  if data.evaluation is not None:
    score_answers(run.config, data.evaluation, learned.params, learned.step, learned.log.start_scores)
  distributed.barrier("the model is saved", seconds=EXPORT_SECONDS)


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


def make_trainer(
  run: Run, data: Data, steps: CompiledSteps, progress: Progress, stop: distributed.StopSignal
) -> Trainer:
  """The loop of a run."""
  config, loader = run.config, progress.loader
  return Trainer(
    training=config.training,
    steps=steps,
    schedule=make_schedule(config.training, loader.total_steps),
    source=loader,
    checkpointer=progress.checkpointer,
    log=progress.log,
    watchdog=run.watchdog,
    stop=stop,
    evaluate=joint_metrics(data.evaluation, data.hooks, progress.log),
    scores_average=config.checkpoint.export_average,
    callbacks=make_callbacks(run, data, loader, progress.log),
  )


def make_callbacks(run: Run, data: Data, loader: TrainLoader, log: RunLog) -> list[Callback]:
  """What watches the loop of a run."""
  runtime, stopwatch = run.config.runtime, run.watchdog.stopwatch
  trained = {path.partition(".")[0] for path in run.setup.trainable}
  # Of data without images it was told what learns from images alone.
  told = {"vision_model", "mlp1"} if data.without_images else set()
  traced = runtime.profile_steps if distributed.is_first() else ()
  return [
    StartTimes(
      stopwatch,
      prints=runtime.timings,
      record=lambda: run.facts.after_first_step(stopwatch, loader),
    ),
    FirstBatch(lambda batch: show_batch(batch, run.chat)),
    Check(data.hooks.first_batch),
    Profile(Trace(output_folder(run.config) / "profile", traced)),
    Unmoved(trained - told, min(UNMOVED_STEPS, loader.total_steps)),
    SkippedSteps(log, loader.batch_samples, limit=runtime.max_nonfinite_steps),
    *data.hooks.callbacks(log),
  ]


def joint_metrics(
  evaluation: Evaluation | None, hooks: Hooks, log: RunLog
) -> Callable[[dict[str, jax.Array], int], dict[str, float]] | None:
  """What scores the model during a run: its answers, and the task's held-out samples; None for neither."""
  if evaluation is None and not hooks.evaluates:
    return None

  def metrics(params: dict[str, jax.Array], step: int) -> dict[str, float]:
    answers: dict[str, float] = {}
    if evaluation is not None:
      for scores in evaluation.run(params, log.start_scores):
        answers |= scores.for_log()
        if scores.shown:
          log.add_predictions(step, scores.asked.name, scores.shown)
    return answers | hooks.evaluate(params)

  return metrics
