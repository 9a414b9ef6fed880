"""Trains InternVL.

  python -m internvl_jax.train --config configs/quickstart.py [--config.training.learning_rate=1e-5 ...]

The command starts a run, or goes on with it from its newest checkpoint; at the end `training.output_dir` holds
a model that stands alone. docs/training.md describes what else it leaves there.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from transformers import PreTrainedTokenizerBase

from internvl_jax import facts, frontdoor, lease, mfu, optim, signals
from internvl_jax.adapters import merge_and_check
from internvl_jax.arguments import TrainingArguments
from internvl_jax.assembly import (
  Setup,
  check_held_out,
  idle_on,
  log_parameters,
  open_export,
  open_mesh,
  open_model,
  reference_copies,
  set_up,
  set_up_jax,
  shares_prompts,
)
from internvl_jax.checkpoint import Checkpointer
from internvl_jax.config import TrainConfig, problems, shared_settings, to_json, validate
from internvl_jax.data.fingerprint import files_digest
from internvl_jax.data.pipeline import TrainLoader
from internvl_jax.data.show import show_batch
from internvl_jax.data.tally import untaught_samples
from internvl_jax.data.tokenize import ChatTokenizer
from internvl_jax.due import best_of
from internvl_jax.errors import UserError
from internvl_jax.eval.scoring import Evaluation, make_evaluation
from internvl_jax.hf import config as layouts
from internvl_jax.hf import export, peft
from internvl_jax.hf.model import Source, base_name
from internvl_jax.metrics import Gauges, RunLog, Trace
from internvl_jax.objectives import PreferenceOptimization, SupervisedFineTuning
from internvl_jax.outputs import LEASE_FILE, Beginning, begin_run, check_output_dir, write_config, write_json
from internvl_jax.parallel import distributed
from internvl_jax.parallel import mesh as meshes
from internvl_jax.parallel.agreement import agree
from internvl_jax.preference import PreferenceRun
from internvl_jax.serving import Export
from internvl_jax.state import TrainState
from internvl_jax.stated import recorded_settings
from internvl_jax.trainer import CompiledSteps, Trainer
from internvl_jax.watchdog import Watchdog

OPEN_SECONDS = EXPORT_SECONDS = 3600
"""How long processes wait for the last one to read its weights, and for the first one to write the model: 150 GB from
or to a slow disk."""

_CONFIG = frontdoor.define_config_flag()


def main(argv: Sequence[str]) -> int:
  """Checks the config, then trains, saves and scores; returns the exit code."""
  del argv
  frontdoor.set_up_logging()
  return 0 if train(_CONFIG.value) else signals.STOPPED


def train(config: TrainConfig) -> bool:
  """A whole run, from its config to the model in its output directory; on every process of the run alike.

  Returns:
    Whether the model is there: not where the run was told to stop.
  """
  with distributed.joined(config.runtime.distributed, frontdoor.report):
    if jax.process_count() > 1:
      frontdoor.set_up_logging(process=jax.process_index())
    # Before `validate`, which would end one process and leave the others waiting for it.
    agree("the settings are read", lambda: shared_start(config), seconds=distributed.JOIN_SECONDS)
    validate(config)
    if distributed.is_first():
      frontdoor.warn_idle(config)
    with (
      Watchdog(distributed.host_name(), config.runtime.hang_seconds) as watchdog,
      output_dir_held(config, watchdog) as beginning,
    ):
      return _run(config, watchdog, beginning)


def shared_start(config: TrainConfig) -> dict[str, Any]:
  """What must be equal on all hosts when they have joined: settings, what speaks against them, and programs."""
  against = {"what speaks against the configuration": problems(config) or "nothing"}
  return {**shared_settings(config), **against, **facts.programs()}


def shared_files(config: TrainConfig, source: Source, loader: TrainLoader) -> dict[str, Any]:
  """What must be equal on all hosts when the data are opened: lines, order, tokenizer, weights, what is scored."""
  scored = files_digest(config.eval.annotation, config.preference.eval_meta_path, config.loader.cache_dir)
  return {**loader.shared_facts(), **scored, **facts.weights(source)}


def _run(config: TrainConfig, watchdog: Watchdog, beginning: Beginning) -> bool:
  set_up_jax(config)
  with watchdog.phase("model"):
    source, tokenizer = open_model(config)
  chat = ChatTokenizer(tokenizer, config.data.conv_style, rows=source.config.text.vocab_size)
  looked_at = open_export(config, source, tokenizer, chat)
  setup = set_up(config, source, open_mesh(config, model=source.model))
  if distributed.is_first():
    tell(*idle_on(config, source))

  open_loader = functools.partial(
    TrainLoader,
    tokenizer=chat,
    tokens_per_tile=source.config.tokens_per_tile,
    preference=isinstance(setup.objective, PreferenceOptimization),
    share_prompts=shares_prompts(config, source),
    **host_shards(setup.mesh),
  )
  pairs = None
  if isinstance(setup.objective, PreferenceOptimization):
    pairs = PreferenceRun(config, source, setup.objective, setup.mesh, open_loader, watchdog)
  lookup = pairs.lookup if pairs else None
  make_loader = functools.partial(open_loader, config.data, config.training, config.loader, reference=lookup)
  # The data are looked at before the weights are read: mistakes are likelier there, and cheaper to find.
  loader = open_data(make_loader, setup.mesh, watchdog, functools.partial(shared_files, config, source))
  if distributed.is_first():
    tell(optim.warmup_remark(config.training, loader.total_steps))
  with watchdog.phase("data"):
    check_held_out(config, source, chat)

  log_parameters(setup)
  resumes = distributed.first_says(beginning == "resume")
  # A checkpoint has what trains: there is no room for it twice. Preferences need it as it was at the start, too.
  params = read_weights(config, setup, watchdog, all_of_it=not resumes or pairs is not None)
  begin_output(config, beginning)

  def best_of(steps: Collection[int]) -> int | None:
    return log.best_step(steps)  # The log is opened once nothing speaks against going on.

  checkpointer = Checkpointer(
    output_folder(config),
    keep=config.training.save_total_limit,
    spare=best_of if config.training.load_best_model_at_end else None,
  )
  if pairs is not None:
    pairs.prepare(params, loader, resumes=resumes)
  frozen = {path: value for path, value in params.items() if path not in setup.trainable}
  frozen |= reference_copies(config, source, params, setup.trainable)
  log_state = None
  if resumes:
    del params
    state, loader, log_state = go_on(config.training, setup, checkpointer, make_loader, watchdog)
  else:
    state = setup.create_state(params)
    del params
  # Nothing speaks against going on any more.
  log = open_log(config, setup, loader)
  if log_state is not None:
    log.restore(log_state)
    if distributed.is_first():
      write_config(output_folder(config), to_json(config))
  evaluation = make_evaluation(config.eval, config.data, source, chat, setup.how)
  traced = config.runtime.profile_steps if distributed.is_first() else ()
  asked_to_stop = distributed.StopSignal()
  with log, asked_to_stop, closed_after_error(loader, checkpointer):
    trainer = Trainer(
      training=config.training,
      runtime=config.runtime,
      steps=CompiledSteps(setup.step, setup.mesh, xla_options=config.runtime.xla_options),
      schedule=optim.make_schedule(config.training, loader.total_steps),
      loader=loader,
      checkpointer=checkpointer,
      log=log,
      watchdog=watchdog,
      trace=Trace(output_folder(config) / "profile", traced),
      total_steps=loader.total_steps,
      show=lambda batch: show_batch(batch, chat),
      asked_to_stop=asked_to_stop,
      worth_saving=asked_to_stop.listen,
      evaluate=joint_metrics(evaluation, pairs),
      check=pairs.check if pairs else None,
    )
    state = trainer.run(state, frozen)
  saved = checkpointer.latest_step == int(state.step)
  untaught = untaught_samples(loader.counters())
  if distributed.is_first():
    tell(untaught)
  loader.close()
  stops = int(state.step) < loader.total_steps
  if stops or (saved and asked_to_stop.received and jax.process_count() == 1):
    checkpointer.close()
    distributed.barrier("the run is stopped", seconds=distributed.JOIN_SECONDS)
    logging.warning("Stopped; the same command goes on from step %d", int(state.step))
    return False
  best = log.best_step(checkpointer.steps)
  if best is not None and best != loader.total_steps:
    del state  # There is no room for it twice.
    state = best_state(setup, checkpointer, best, watchdog)
  checkpointer.close()
  log.write_train_results(num_samples=loader.num_samples)
  params = {path: value for path, value in {**frozen, **state.params}.items() if path in source.model.shapes}
  del state, frozen  # The optimizer's moments make room for the layers that the export brings together.
  with watchdog.phase("export"), contextlib.nullcontext() if saved else asked_to_stop:
    if not saved:
      asked_to_stop.listen()  # The model is all that is kept of this run.
    if pairs is not None and (judged := pairs.metrics(params)) and distributed.is_first():
      write_json(output_folder(config) / "preference_results.json", judged)
      logging.info("Held-out pairs: %s", judged)
    finish(config, source, tokenizer, chat, looked_at, params, evaluation)
    distributed.barrier("the model is saved", seconds=EXPORT_SECONDS)
  log.tell_skipped()
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
  """Logs what the user did not ask for, a line each; None is nothing to tell."""
  for line in lines:
    if line is not None:
      logging.warning("%s", line)


def open_data(
  make_loader: Callable[..., TrainLoader],
  mesh: jax.sharding.Mesh,
  watchdog: Watchdog,
  shared: Callable[[TrainLoader], Mapping[str, Any]],
) -> TrainLoader:
  """The loader of a run at its start, on all hosts at once; tells what there is.

  Args:
    make_loader: makes it.
    mesh: what its rows are sharded over.
    watchdog: of the run.
    shared: what must be equal on all hosts; see `agree`.

  Raises:
    UserError: the data cannot be used, are not the same on all hosts, or their rows do not suit the mesh.
  """
  with watchdog.phase("data"):
    loader = make_loader()
  meshes.check_lengths(loader.sequence_sizes, mesh)
  logging.info("Data:\n%s", "\n".join(loader.describe()))
  logging.info(
    "%d steps of %d rows, %d to an epoch", loader.total_steps, loader.global_batch, loader.steps_per_epoch
  )
  # What follows talks over the devices, where nobody waits for long.
  with watchdog.phase("barrier"):
    agree("the data are opened", lambda: shared(loader), seconds=OPEN_SECONDS)
  return loader


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
  return params


def go_on(
  training: TrainingArguments,
  setup: Setup,
  checkpointer: Checkpointer,
  make_loader: Callable[..., TrainLoader],
  watchdog: Watchdog,
) -> tuple[TrainState, TrainLoader, dict[str, Any]]:
  """The state of the newest checkpoint, the loader before the batch that comes next, and the log's state.

  Raises:
    UserError: the checkpoint is of another run.
  """
  with watchdog.phase("restore"):
    state, loader_state, log_state = checkpointer.restore(setup.describe_state())
    loader = make_loader(state=loader_state)
  check_length(training, int(state.step), loader.total_steps)
  logging.info("Resuming from the checkpoint of step %d", int(state.step))
  return state, loader, log_state


def best_state(setup: Setup, checkpointer: Checkpointer, step: int, watchdog: Watchdog) -> TrainState:
  """The state of the checkpoint whose model has the best score."""
  logging.info("The best model is that of step %d", step)
  with watchdog.phase("restore"):
    return checkpointer.restore(setup.describe_state(), step=step)[0]


def open_log(config: TrainConfig, setup: Setup, loader: TrainLoader) -> RunLog:
  """The log of a run, which knows what a step needs and what the devices could do."""
  source, twice = setup.source, parts_run_twice(setup.objective)
  return RunLog(
    config.training,
    output_folder(config),
    total_steps=loader.total_steps,
    epoch_of=loader.epoch_of,
    gauges=Gauges(
      useful=mfu.useful_flops(source.config, source.model.shapes, setup.trainable, twice=twice),
      peak=mfu.peak_flops(jax.devices()),
      devices=jax.local_devices(),
    ),
    best=best_of(config.training, answers=config.eval.annotation is not None),
    writes=distributed.is_first(),
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


def host_shards(mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """What the loader has to know of the hosts: the data shards, those of them that this one feeds, and how to sum."""
  shards, parts = meshes.data_parallel_size(mesh), meshes.data_parts(mesh)
  part, each = parts[jax.process_index()], shards // (max(parts) + 1)
  return {
    "data_shards": shards,
    "my_shards": range(part * each, (part + 1) * each),
    "alone": jax.process_count() == 1,
    "all_sum": functools.partial(distributed.sum_over, parts),
  }


def output_folder(config: TrainConfig) -> Path:
  """The run's directory, which `validate` has made sure is named."""
  assert config.training.output_dir is not None
  return Path(config.training.output_dir)


@contextlib.contextmanager
def output_dir_held(config: TrainConfig, watchdog: Watchdog) -> Iterator[Beginning]:
  """Keeps other runs out of the output directory; how this one begins there. Nothing in it is changed.

  The first process does; the others wait for it.

  Raises:
    UserError: another run writes to the directory, it must not be written to, or not all hosts see it.
  """
  folder, name = output_folder(config), f"training.output_dir={config.training.output_dir!r}"
  with contextlib.ExitStack() as stack:
    beginning: Beginning = "new"
    if distributed.is_first():
      place = lease.Folder(folder)
      stack.enter_context(signals.cleaned_up(place.release))
      stack.enter_context(lease.held(place, name))
      beginning = check_output_dir(config.training)
    with watchdog.phase("barrier"):
      distributed.barrier("the output directory is prepared", seconds=distributed.JOIN_SECONDS)
    if not (folder / LEASE_FILE).exists():
      raise UserError(
        f"{name}: {distributed.host_name()} does not see what process 0 wrote there; name a folder of a file system that "
        "all hosts share"
      )
    yield beginning


def begin_output(config: TrainConfig, beginning: Beginning) -> None:
  """Makes room for a new run where the config says so, and says what it is made with, once nothing speaks against it."""
  if distributed.is_first() and beginning != "resume":
    begin_run(output_folder(config), beginning, to_json(config))
  distributed.barrier("the output directory is begun", seconds=distributed.JOIN_SECONDS)


def finish(
  config: TrainConfig,
  source: Source,
  tokenizer: PreTrainedTokenizerBase,
  chat: ChatTokenizer,
  looked_at: Export,
  params: dict[str, jax.Array],
  evaluation: Evaluation | None,
) -> None:
  """Writes the model that stands alone, and the adapters apart; scores it where the config says so.

  All processes take part, since each has shards of the parameters; the first one writes.
  """
  output_dir = output_folder(config)
  writes = distributed.is_first()
  half = config.checkpoint.export_dtype == "bfloat16" or (
    config.checkpoint.export_dtype == "auto" and config.training.bf16
  )
  save_adapters(config, source, params, output_dir)
  merged, weights = merge_and_check(source, params, distributed.gathered)
  export.save_model(
    output_dir,
    merged,
    weights,
    layout=layouts.layout_named(config.checkpoint.export_layout),
    dtype=jnp.bfloat16 if half else jnp.float32,
    tokenizer=tokenizer,
    normalize_type=config.data.normalize_type,
    serving=looked_at.serving,
    eos_token_id=chat.stop_token_id,
    settings=recorded_settings(config.data, chat.template),
    code=looked_at.code,
    writes=writes,
  )
  logging.info("Saved the model to %s", output_dir)
  if evaluation is not None:
    scores = evaluation.run(params)
    if writes:
      evaluation.write(scores, output_dir)


def save_adapters(
  config: TrainConfig, source: Source, params: dict[str, jax.Array], output_dir: Path
) -> None:
  """Writes the adapters, if any, in PEFT's form, for the base model in the layout that it has, if it has a form."""
  name = config.model.model_name_or_path
  # What is not written was told before the first step.
  if name is None or not source.specs or peft.formless(params, source.table):
    return
  base = base_name(name)
  base = os.path.abspath(base) if os.path.isdir(base) else base
  peft.save_adapter(
    output_dir / "adapter",
    distributed.gathered(params),
    source.specs,
    source.layout,
    source.table,
    base=base,
    writes=distributed.is_first(),
  )


if __name__ == "__main__":
  frontdoor.run_app(main)
