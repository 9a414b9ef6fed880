"""Trains InternVL.

  python -m internvl_jax.train --config configs/quickstart.py [--config.training.learning_rate=1e-5 ...]

The command starts a run, or goes on with it from its newest checkpoint; at the end `training.output_dir` holds
a model that stands alone. docs/training.md describes what else it leaves there.
"""

import functools
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging
from transformers import PreTrainedTokenizerBase

from internvl_jax import frontdoor, optim
from internvl_jax.adapters import merge_and_check
from internvl_jax.assembly import execution, make_step, open_mesh, open_model, place_state, set_up_jax
from internvl_jax.checkpoint import Checkpointer
from internvl_jax.config import TrainConfig, check_output_dir, clear_output_dir, to_json, validate
from internvl_jax.data.pipeline import TrainLoader
from internvl_jax.data.show import show_batch
from internvl_jax.data.tokenize import ChatTokenizer
from internvl_jax.errors import UserError
from internvl_jax.eval.scoring import Evaluation, make_evaluation
from internvl_jax.hf import config as layouts
from internvl_jax.hf import export, peft
from internvl_jax.hf.model import Source, base_name
from internvl_jax.inference import recorded_settings
from internvl_jax.metrics import RunLog, write_json
from internvl_jax.models.lora import adapter_paths
from internvl_jax.parallel import mesh as meshes
from internvl_jax.parallel import rules
from internvl_jax.state import TrainState, describe
from internvl_jax.trainer import CompiledSteps, Trainer
from internvl_jax.trees import part_of, select

_CONFIG = frontdoor.define_config_flag()


def main(argv: Sequence[str]) -> None:
  """Checks the config, then trains, saves and scores."""
  del argv
  frontdoor.set_up_logging()
  train(_CONFIG.value)


def train(config: TrainConfig) -> None:
  """A whole run, from its config to the model in its output directory."""
  validate(config)
  prepare_output_dir(config)
  set_up_jax(config)

  source, tokenizer = open_model(config)
  chat = ChatTokenizer(tokenizer, config.data.conv_style)
  mesh = open_mesh(config)
  shards = meshes.data_parallel_size(mesh)
  trainable = optim.trainable_paths(config.model, source.model.shapes)
  optimizer = optim.make_optimizer(config.training, select(source.reference_names, trainable))
  make_loader = functools.partial(
    TrainLoader,
    config.data,
    config.training,
    config.loader,
    chat,
    tokens_per_tile=source.config.tokens_per_tile,
    data_shards=shards,
  )
  # The data are looked at before the weights are read: mistakes are likelier there, and cheaper to find.
  loader = make_loader()
  meshes.check_lengths(loader.sequence_sizes, mesh)
  logging.info("Data:\n%s", "\n".join(loader.describe()))
  logging.info(
    "%d steps of %d rows, %d to an epoch", loader.total_steps, loader.global_batch, loader.steps_per_epoch
  )

  params, places = place_state(config, source, trainable, mesh)
  logging.info("Model:\n%s", describe(params, trainable))
  frozen = {path: value for path, value in params.items() if path not in trainable}
  state = TrainState.create(select(params, trainable), optimizer, places)
  del params

  output_dir = output_folder(config)
  checkpointer = Checkpointer(output_dir, keep=config.training.save_total_limit)
  log = RunLog(config.training, output_dir, total_steps=loader.total_steps, epoch_of=loader.epoch_of)
  if checkpointer.latest_step is not None:
    state, loader_state, log_state = checkpointer.restore(state)
    loader = make_loader(state=loader_state)
    log.restore(log_state)
    logging.info("Resuming from the checkpoint of step %d", int(state.step))

  how = execution(config)
  evaluation = make_evaluation(config.eval, config.data, source, chat, how)
  with log:
    trainer = Trainer(
      training=config.training,
      steps=CompiledSteps(make_step(config, source, optimizer, how, places), rules.batch_shardings(mesh)),
      schedule=optim.make_schedule(config.training, loader.total_steps),
      loader=loader,
      checkpointer=checkpointer,
      log=log,
      total_steps=loader.total_steps,
      tokens_per_tile=source.config.tokens_per_tile,
      show=lambda batch: show_batch(batch, chat),
      evaluate=evaluation.metrics if evaluation else None,
    )
    state = trainer.run(state, frozen)
  loader.close()
  checkpointer.close()
  finish(config, source, tokenizer, chat, {**frozen, **state.params}, evaluation)


def output_folder(config: TrainConfig) -> Path:
  """The run's directory, which `validate` has made sure is named."""
  assert config.training.output_dir is not None
  return Path(config.training.output_dir)


def prepare_output_dir(config: TrainConfig) -> None:
  """Makes the output directory, or empties it where the config says so, and writes the config into it."""
  output_dir = output_folder(config)
  if check_output_dir(config.training) == "overwrite":
    clear_output_dir(str(output_dir))
  output_dir.mkdir(parents=True, exist_ok=True)
  write_json(output_dir / "train_config.json", to_json(config))


def finish(
  config: TrainConfig,
  source: Source,
  tokenizer: PreTrainedTokenizerBase,
  chat: ChatTokenizer,
  params: dict[str, jax.Array],
  evaluation: Evaluation | None,
) -> None:
  """Writes the model that stands alone, and the adapters apart; scores it where the config says so."""
  output_dir = output_folder(config)
  half = config.checkpoint.export_dtype == "bfloat16" or (
    config.checkpoint.export_dtype == "auto" and config.training.bf16
  )
  save_adapters(config, source, params, output_dir)
  merged, weights = merge_and_check(source, params)
  export.save_model(
    output_dir,
    merged,
    weights,
    layout=layouts.layout_named(config.checkpoint.export_layout),
    dtype=jnp.bfloat16 if half else jnp.float32,
    tokenizer=tokenizer,
    normalize_type=config.data.normalize_type,
    eos_token_id=chat.stop_token_id,
    settings=recorded_settings(config.data),
  )
  logging.info("Saved the model to %s", output_dir)
  if evaluation is not None:
    scores = evaluation.run(params)
    evaluation.write(scores, output_dir)


def save_adapters(
  config: TrainConfig, source: Source, params: dict[str, jax.Array], output_dir: Path
) -> None:
  """Writes the adapters, if any, in PEFT's form, for the base model in the layout that it has."""
  name = config.model.model_name_or_path
  if not source.specs:
    return
  if name is None:
    logging.warning("No adapter/ is written, only the merged model: there is no checkpoint of the base model")
    return
  base = base_name(name)
  base = os.path.abspath(base) if os.path.isdir(base) else base
  try:
    peft.save_adapter(output_dir / "adapter", params, source.specs, source.layout, source.table, base=base)
  except UserError as error:
    logging.warning("No adapter/ is written, only the merged model: %s", error)
    return
  others = optim.trainable_paths(config.model, params) - adapter_paths(params)
  if others:
    logging.warning(
      "adapter/ holds the adapters alone; what else trained (%s) is in the merged model only",
      ", ".join(sorted({part_of(path) for path in others})),
    )


if __name__ == "__main__":
  frontdoor.run_app(main)
