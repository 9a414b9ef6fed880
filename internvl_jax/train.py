"""Trains InternVL.

  python -m internvl_jax.train --config configs/quickstart.py [--config.training.learning_rate=1e-5 ...]

The command starts a run, or goes on with it from its newest checkpoint; at the end `training.output_dir` holds
a model that stands alone. docs/training.md describes what else it leaves there.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from absl import logging

from internvl_jax import frontdoor, optim
from internvl_jax.checkpoint import Checkpointer
from internvl_jax.config import TrainConfig, check_output_dir, clear_output_dir, to_json, validate
from internvl_jax.data.pipeline import TrainLoader
from internvl_jax.data.show import show_batch
from internvl_jax.data.tokenize import ChatTokenizer
from internvl_jax.eval.scoring import Evaluation, make_evaluation
from internvl_jax.hf.model import Source, open_source, save_model
from internvl_jax.hf.tokenizer import load_tokenizer
from internvl_jax.metrics import RunLog, write_json
from internvl_jax.models.internvl import Execution
from internvl_jax.objectives import SupervisedFineTuning
from internvl_jax.parallel import mesh as meshes
from internvl_jax.parallel import rules
from internvl_jax.state import TrainState, describe, with_dtypes
from internvl_jax.step import TrainStep
from internvl_jax.trainer import CompiledSteps, Trainer
from internvl_jax.trees import select

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

  source = open_model(config)
  tokenizer = ChatTokenizer(load_tokenizer(source.folder), config.data.conv_style)
  mesh = meshes.make_mesh(config.mesh)
  shards = meshes.data_parallel_size(mesh)
  trainable = optim.trainable_paths(config.model, source.model.shapes)
  optimizer = optim.make_optimizer(config.training, trainable)
  make_loader = functools.partial(
    TrainLoader,
    config.data,
    config.training,
    config.loader,
    tokenizer,
    tokens_per_tile=source.config.tokens_per_tile,
    data_shards=shards,
  )
  # The data are looked at before the weights are read: mistakes are likelier there, and cheaper to find.
  loader = make_loader()
  logging.info("Data:\n%s", "\n".join(loader.describe()))
  logging.info(
    "%d steps of %d samples, %d to an epoch", loader.total_steps, loader.global_batch, loader.steps_per_epoch
  )

  params = place_params(config, source, trainable, mesh)
  logging.info("Model:\n%s", describe(params, trainable))
  frozen = {path: value for path, value in params.items() if path not in trainable}
  state = TrainState.create(select(params, trainable), optimizer)
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
  evaluation = make_evaluation(config.eval, config.data, source, tokenizer, how)
  with log:
    trainer = Trainer(
      training=config.training,
      steps=CompiledSteps(make_step(config, source, optimizer, how, shards), rules.batch_shardings(mesh)),
      schedule=optim.make_schedule(config.training, loader.total_steps),
      loader=loader,
      checkpointer=checkpointer,
      log=log,
      total_steps=loader.total_steps,
      tokens_per_tile=source.config.tokens_per_tile,
      show=lambda batch: show_batch(batch, tokenizer),
      evaluate=evaluation.metrics if evaluation else None,
    )
    state = trainer.run(state, frozen)
  loader.close()
  checkpointer.close()
  finish(config, source, tokenizer, {**frozen, **state.params}, evaluation)


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


def set_up_jax(config: TrainConfig) -> None:
  """Settings of JAX that the whole process shares."""
  if config.runtime.compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", config.runtime.compilation_cache_dir)
  if not config.training.bf16:
    # Accelerators round float32 products to less by default; float32 is asked for to get float32's numbers.
    jax.config.update("jax_default_matmul_precision", "highest")


def open_model(config: TrainConfig) -> Source:
  """The checkpoint's description, with what the config changes about the model."""
  assert config.model.model_name_or_path is not None
  return open_source(
    config.model.model_name_or_path,
    image_size=config.data.force_image_size,
    select_layer=config.model.vision_select_layer,
    downsample_ratio=config.data.down_sample_ratio,
    ps_version=config.model.ps_version,
  )


def place_params(config: TrainConfig, source: Source, trainable: set[str], mesh: jax.sharding.Mesh):
  """All parameters by path, on their devices: from the checkpoint, or fresh."""
  shapes = with_dtypes(source.model, trainable, bf16=config.training.bf16)
  place = rules.weight_shardings(source.model.axes, shapes, mesh)
  if config.runtime.random_init:
    return source.initialize(shapes, place, seed=config.training.seed)
  return source.load(shapes, place)


def make_step(
  config: TrainConfig, source: Source, optimizer: optax.GradientTransformation, how: Execution, shards: int
) -> TrainStep:
  """The optimizer step that the config describes."""
  return TrainStep(
    model=source.model,
    objective=SupervisedFineTuning(
      how=how,
      normalize_type=config.data.normalize_type,
      fused_loss=config.model.use_liger,
      # A frozen part runs as in evaluation.
      drop_path_rate=0.0 if config.model.freeze_backbone else config.model.drop_path_rate,
    ),
    optimizer=optimizer,
    max_grad_norm=config.training.max_grad_norm,
    shards=shards,
    all_gather=config.data.loss_reduction_all_gather,
    seed=config.training.seed,
  )


def execution(config: TrainConfig) -> Execution:
  """How forward passes are computed."""
  remat = config.model.grad_checkpoint or config.training.gradient_checkpointing
  return Execution(
    dtype=jnp.bfloat16 if config.training.bf16 else jnp.float32,
    attention=config.runtime.attention,
    remat=config.runtime.remat_policy if remat else None,
    scan_unroll=config.runtime.scan_unroll,
  )


def finish(
  config: TrainConfig,
  source: Source,
  tokenizer: ChatTokenizer,
  params: dict[str, jax.Array],
  evaluation: Evaluation | None,
) -> None:
  """Writes the model that stands alone, and scores it where the config says so."""
  output_dir = output_folder(config)
  half = config.checkpoint.export_dtype == "bfloat16" or (
    config.checkpoint.export_dtype == "auto" and config.training.bf16
  )
  save_model(
    output_dir,
    source,
    params,
    dtype=jnp.bfloat16 if half else jnp.float32,
    normalize_type=config.data.normalize_type,
    eos_token_id=tokenizer.stop_token_id,
    changes={
      "template": config.data.conv_style,
      "dynamic_image_size": config.data.dynamic_image_size,
      "use_thumbnail": config.data.use_thumbnail,
      "min_dynamic_patch": config.data.min_dynamic_patch,
      "max_dynamic_patch": config.data.max_dynamic_patch,
      "pad2square": config.data.pad2square,
    },
  )
  logging.info("Saved the model to %s", output_dir)
  if evaluation is not None:
    scores = evaluation.run(params)
    evaluation.write(scores, output_dir)


if __name__ == "__main__":
  frontdoor.run_app(main)
