"""The end of a run: exports the model and its adapters, and scores its answers."""

import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from absl import logging
from transformers import PreTrainedTokenizerBase

from internvl_jax.adapters import merge_and_check
from internvl_jax.config import TrainConfig
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.eval.scoring import Evaluation
from internvl_jax.eval.shown import ShownFiles
from internvl_jax.hf import export, peft
from internvl_jax.hf import model_config as layouts
from internvl_jax.hf.model import Source, base_name
from internvl_jax.inference_settings import recorded_settings
from internvl_jax.output_dir import output_folder
from internvl_jax.parallel import distributed
from internvl_jax.parallel.host_arrays import gathered
from internvl_jax.serving import Export
from internvl_jax.storage.paths import AnyPath


def finish(
  config: TrainConfig,
  source: Source,
  tokenizer: PreTrainedTokenizerBase,
  chat: ChatTokenizer,
  prepared: Export,
  params: dict[str, jax.Array],
  weights_from: str | None = None,
) -> None:
  """Exports the model as a self-contained checkpoint, and its adapters apart.

  All processes take part, since each has shards of the parameters; the first one writes.

  Args:
    config: of the run.
    source: the model.
    tokenizer: as it is written.
    chat: the same, with the run's template.
    prepared: how the model is served.
    params: all parameters by path.
    weights_from: which weights they are, for config.json, where there are several kinds.
  """
  output_dir = output_folder(config)
  writes = distributed.is_first()
  half = config.checkpoint.export_dtype == "bfloat16" or (
    config.checkpoint.export_dtype == "auto" and config.training.bf16
  )
  save_adapters(config, source, params, output_dir)
  merged, weights = merge_and_check(source, params, gathered)
  export.save_model(
    output_dir,
    merged,
    weights,
    export.ModelFiles(
      layout=layouts.layout_named(config.checkpoint.export_layout),
      dtype=jnp.bfloat16 if half else jnp.float32,
      tokenizer=tokenizer,
      normalize_type=config.data.normalize_type,
      serving=prepared.serving,
      eos_token_id=chat.stop_token_id,
      settings=recorded_settings(config.data, chat.template),
      weights_from=weights_from,
      code=prepared.code,
    ),
    writes=writes,
  )
  logging.info("Saved the model to %s%s", output_dir, f": {weights_from}" if weights_from else "")


def score_answers(
  config: TrainConfig,
  evaluation: Evaluation,
  params: dict[str, jax.Array],
  step: int,
  start: Mapping[str, float],
) -> None:
  """Scores the final model's answers, and writes the scores, the answers and the samples that are shown.

  All processes take part; the first one writes.

  Args:
    config: of the run.
    evaluation: what is asked.
    params: the model's, by path.
    step: steps that the model has taken.
    start: scores of the model that the run began with, by their names in the log; empty where there are none.
  """
  output_dir = output_folder(config)
  scores = evaluation.run(params, start)
  if distributed.is_first():
    evaluation.write(scores, output_dir)
    for of_set in scores:
      if of_set.shown:
        ShownFiles(output_dir).write(step, of_set.asked.name, of_set.shown)


def save_adapters(
  config: TrainConfig, source: Source, params: dict[str, jax.Array], output_dir: AnyPath
) -> None:
  """Writes the adapters, if any, in PEFT's form, for the base model in the layout that it has, if it has a form."""
  name = config.model.model_name_or_path
  # That nothing is written was logged before the first step.
  if name is None or not source.specs or peft.formless(params, source.table):
    return
  base = base_name(name)
  base = os.path.abspath(base) if os.path.isdir(base) else base
  peft.save_adapter(
    output_dir / "adapter",
    gathered(params),
    source.specs,
    source.layout,
    source.table,
    base=base,
    writes=distributed.is_first(),
  )
