"""Checks how the run's final model will be exported, before anything is computed."""

from absl import logging
from transformers import PreTrainedTokenizerBase

from internvl_jax import serving
from internvl_jax.config import TrainConfig
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.hf import model_config as layouts
from internvl_jax.hf import peft
from internvl_jax.hf.model import (
  Source,
)
from internvl_jax.optim.labels import ADAPTERS, labels_of, trained
from internvl_jax.serving import Export, ExportSettings
from internvl_jax.setup.step import Setup
from internvl_jax.tasks.task import Task


def open_export(
  config: TrainConfig,
  source: Source,
  tokenizer: PreTrainedTokenizerBase,
  chat: ChatTokenizer,
  task: Task,
) -> Export:
  """Prepares the run's export, and logs what it will lack before anything is computed.

  Raises:
    UserError: checkpoint.export_layout cannot hold the model, the settings of its data or its template.
  """
  settings = ExportSettings(
    layout=layouts.layout_named(config.checkpoint.export_layout),
    code=config.checkpoint.code,
    layout_flag="checkpoint.export_layout",
    code_flag="checkpoint.code",
    **({} if task.frame_name is None else {"frame_name": task.frame_name}),
  )
  export = serving.prepare(source, config.data, tokenizer, chat, settings)
  for line in [*export.notes, *adapter_notes(config, source)]:
    logging.warning("Export: %s", line)
  return export


def exported_weights(config: TrainConfig, setup: Setup, step: int) -> str | None:
  """Which weights a run exports, for the exported config.json, where there are two kinds; None where there is one.

  Args:
    config: of the run.
    setup: of the run.
    step: that the weights are of.
  """
  if not setup.abstract_state().keeps_average:
    return None
  if config.checkpoint.export_average:
    return f"the average of the weights (training.optim_args={config.training.optim_args}) after step {step}"
  return f"the last weights, of step {step}, not their average (checkpoint.export_average=False)"


def average_remark(config: TrainConfig, setup: Setup) -> str | None:
  """A line for the log where there is no average to export and the settings are about one; None where that is so."""
  if config.checkpoint.export_average or setup.abstract_state().keeps_average:
    return None
  return "checkpoint.export_average=False has no effect: no average is kept without training.optim_args=ema_decay=0.999"


def adapter_notes(config: TrainConfig, source: Source) -> list[str]:
  """What the folder adapter/ of an export will lack, and why: one line each."""
  if not source.specs:
    return []
  only = "no adapter/ will be written, only the merged model:"
  if config.model.model_name_or_path is None:
    return [f"{only} there is no checkpoint of the base model"]
  if lacking := peft.formless(source.model.shapes, source.table):
    return [
      f"{only} the base model's layout ({source.layout.name}) has no form for adapters of {', '.join(lacking)}, which it "
      "splits; begin with the base model in the internvl layout, or leave them out of lora.targets"
    ]
  found = []
  if source.new_rows:
    found.append(
      f"adapter/ has no form for {source.new_rows} new row(s) of the embeddings: they will be in the merged model only, and "
      "made again where a run with runtime.grow_vocabulary=True goes on from adapter/"
    )
  labels = trained(labels_of(config.model, source.model.shapes, config.flash.stage))
  others = set(labels.values()) - {ADAPTERS}
  if others:
    parts = ", ".join(sorted(others))
    found.append(
      f"adapter/ holds the adapters alone; what else trains ({parts}) will be in the merged model only"
    )
  return found
