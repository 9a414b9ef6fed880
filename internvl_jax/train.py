"""Trains InternVL.

  python -m internvl_jax.train --config configs/quickstart.py [--config.training.learning_rate=1e-5 ...]

The command starts a run, or goes on with it from its newest checkpoint; at the end `training.output_dir` holds
a model that stands alone. docs/training.md describes what else it leaves there.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from transformers import PreTrainedTokenizerBase

from internvl_jax import frontdoor, mfu, optim, signals
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
from internvl_jax.config import TrainConfig, to_json, validate
from internvl_jax.data.pipeline import TrainLoader
from internvl_jax.data.show import show_batch
from internvl_jax.data.tally import untaught_samples
from internvl_jax.data.tokenize import ChatTokenizer
from internvl_jax.errors import UserError
from internvl_jax.eval.scoring import Evaluation, make_evaluation
from internvl_jax.hf import config as layouts
from internvl_jax.hf import export, peft
from internvl_jax.hf.model import Source, base_name
from internvl_jax.metrics import Gauges, RunLog, Trace
from internvl_jax.objectives import PreferenceOptimization, SupervisedFineTuning
from internvl_jax.outputs import CONFIG_FILE, check_output_dir, clear_output_dir, write_json
from internvl_jax.parallel import distributed
from internvl_jax.parallel import mesh as meshes
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
  validate(config)
  with distributed.joined(config.runtime.distributed, frontdoor.report):
    if jax.process_count() > 1:
      frontdoor.set_up_logging(process=jax.process_index())
    if distributed.is_first():
      frontdoor.warn_idle(config)
    with Watchdog(distributed.host_name(), config.runtime.hang_seconds) as watchdog:
      return _run(config, watchdog)


def _run(config: TrainConfig, watchdog: Watchdog) -> bool:
  prepare_output_dir(config, watchdog)
  set_up_jax(config)
  with watchdog.phase("model"):
    source, tokenizer = open_model(config)
  chat = ChatTokenizer(tokenizer, config.data.conv_style, rows=source.config.text.vocab_size)
  looked_at = open_export(config, source, tokenizer, chat)
  setup = set_up(config, source, open_mesh(config))
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
  loader = open_data(make_loader, setup.mesh, watchdog)
  if distributed.is_first():
    tell(optim.warmup_remark(config.training, loader.total_steps))
  with watchdog.phase("data"):
    check_held_out(config, source, chat)

  log_parameters(setup)
  checkpointer = Checkpointer(output_folder(config), keep=config.training.save_total_limit)
  resumes = checkpointer.latest_step is not None
  # A checkpoint has what trains: there is no room for it twice. Preferences need it as it was at the start, too.
  params = read_weights(config, setup, watchdog, all_of_it=not resumes or pairs is not None)
  if pairs is not None:
    pairs.prepare(params, loader, resumes=resumes)
  frozen = {path: value for path, value in params.items() if path not in setup.trainable}
  frozen |= reference_copies(config, source, params, setup.trainable)
  log = open_log(config, setup, loader)
  if resumes:
    del params
    state, loader = go_on(config.training, setup, checkpointer, make_loader, log, watchdog)
  else:
    state = setup.create_state(params)
    del params

  if distributed.is_first():
    write_json(output_folder(config) / CONFIG_FILE, to_json(config))
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
  checkpointer.close()
  stops = int(state.step) < loader.total_steps
  if stops or (saved and asked_to_stop.received and jax.process_count() == 1):
    distributed.barrier("the run is stopped", seconds=distributed.JOIN_SECONDS)
    logging.warning("Stopped; the same command goes on from step %d", int(state.step))
    return False
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
  make_loader: Callable[..., TrainLoader], mesh: jax.sharding.Mesh, watchdog: Watchdog
) -> TrainLoader:
  """The loader of a run at its start, on all hosts at once; tells what there is.

  Raises:
    UserError: the data cannot be used, or their rows do not suit the mesh.
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
    distributed.barrier("the data are opened", seconds=OPEN_SECONDS)
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
  log: RunLog,
  watchdog: Watchdog,
) -> tuple[TrainState, TrainLoader]:
  """The state of the newest checkpoint, and the loader before the batch that comes next; the log goes on as well.

  Raises:
    UserError: the checkpoint is of another run.
  """
  with watchdog.phase("restore"):
    state, loader_state, log_state = checkpointer.restore(setup.describe_state())
    loader = make_loader(state=loader_state)
  log.restore(log_state)
  check_length(training, int(state.step), loader.total_steps)
  logging.info("Resuming from the checkpoint of step %d", int(state.step))
  return state, loader


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


def prepare_output_dir(config: TrainConfig, watchdog: Watchdog) -> None:
  """Makes the output directory, or empties it where the config says so, and writes the config into it.

  The first process does; the others wait for it. The config of a run that goes on stays until nothing speaks against
  going on.

  Raises:
    UserError: the directory must not be written to, or not all hosts see it.
  """
  output_dir = output_folder(config)
  written = output_dir / CONFIG_FILE
  if distributed.is_first():
    if check_output_dir(config.training) == "overwrite":
      clear_output_dir(str(output_dir))
    output_dir.mkdir(parents=True, exist_ok=True)
    if not written.exists():
      write_json(written, to_json(config))
  with watchdog.phase("barrier"):
    distributed.barrier("the output directory is prepared", seconds=distributed.JOIN_SECONDS)
  if not written.exists():
    raise UserError(
      f"training.output_dir={config.training.output_dir!r}: {distributed.host_name()} does not see what process 0 wrote "
      "there; name a folder of a file system that all hosts share"
    )


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
