"""Scores the models of a folder one after the other, such as the interpolations that `convert --interpolate` writes."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from internvl_jax.arguments import EvalConfig
from internvl_jax.errors import UserError
from internvl_jax.eval.scoring import Evaluation, Scores, make_evaluation, summary
from internvl_jax.hf.model import open_source
from internvl_jax.hf.vocabulary import open_tokenizer
from internvl_jax.inference import Inference, by_layer, load_params, open_for_inference
from internvl_jax.inference_settings import read_stated
from internvl_jax.outputs import write_json
from internvl_jax.storage.paths import AnyPath, filled

RESULTS = "sweep_results.json"
"""The scores of all models, by the names of their folders."""


def models_in(folder: AnyPath) -> list[AnyPath]:
  """The folders of the models in a folder, those whose names are numbers first and in order; none if it is a model itself."""
  if not folder.is_dir() or (folder / "config.json").exists():
    return []
  found = [entry for entry in folder.iterdir() if entry.is_dir() and (entry / "config.json").exists()]
  return sorted(found, key=lambda entry: (*_number(entry.name), entry.name))


def _number(name: str) -> tuple[bool, float]:
  is_number = re.fullmatch(r"\d+(\.\d+)?(e-?\d+)?", name) is not None
  return not is_number, float(name) if is_number else 0.0


def score_models(
  models: Sequence[AnyPath], config: EvalConfig, output: AnyPath, *, bf16: bool = False, devices: int = 1
) -> dict[str, dict[str, Any]]:
  """Scores models on the same questions, by programs that are compiled once.

  Args:
    models: their folders; all of one architecture.
    config: what is asked.
    output: gets each model's results in a folder of its name, and those of all in RESULTS.
    bf16, devices: see `open_for_inference`.

  Returns:
    The metrics of each model, by its name: {"0.5": {"vqa/accuracy": 0.9}}.

  Raises:
    UserError: a model cannot be run, or is of another architecture than the first.
  """
  opened, evaluation = _open(str(models[0]), config, bf16=bf16, devices=devices)
  evaluation.check()
  found, table = dict[str, Any](), dict[str, dict[str, Any]]()
  for model in models:
    if model is not models[0]:
      _exchange_weights(opened, str(model), devices)
    scores = evaluation.run(opened.params)
    folder = output / model.name
    folder.mkdir(parents=True, exist_ok=True)
    with filled(folder) as local:
      evaluation.write(scores, local)
    found[model.name], table[model.name] = summary(scores), metrics_of(scores)
    logging.info("%s is scored", model)
  write_json(output / RESULTS, found)
  return table


def _open(model: str, config: EvalConfig, *, bf16: bool, devices: int) -> tuple[Inference, Evaluation]:
  opened = open_for_inference(model, bf16=bf16, devices=devices)
  evaluation = make_evaluation(
    config, opened.data, opened.source, opened.tokenizer, opened.how, stop_ids=opened.stop_ids
  )
  assert evaluation is not None
  return opened, evaluation


def _exchange_weights(opened: Inference, model: str, devices: int) -> None:
  """Reads another model's weights in place of those that are there.

  Raises:
    UserError: it is of another architecture, or asked otherwise.
  """
  source = open_source(model, by_layer(devices))
  stated = read_stated(source, open_tokenizer(model))
  theirs = (source.config, stated.data, stated.template)
  if theirs != (opened.source.config, opened.data, opened.tokenizer.template):
    raise UserError(
      f"{model}: has another architecture, template or way to cut images than {opened.source.folder} beside it; score it by "
      f"itself: --model={model}"
    )
  opened.params.clear()
  opened.params.update(load_params(source, opened.how, devices))


def metrics_of(scores: Sequence[Scores]) -> dict[str, float]:
  """The metrics of all sets: "<set>/<metric>", or "<metric>" of the only one."""
  return {
    f"{of_set.asked.label}{metric}": value for of_set in scores for metric, value in of_set.metrics.items()
  }


def table_of(scores: Mapping[str, Mapping[str, float]]) -> str:
  """A line for each model, a column for each metric."""
  names = list(next(iter(scores.values())))
  width = max(len(name) for name in ["model", *scores])
  lines = ["  ".join(["model".ljust(width), *names])]
  for model, values in scores.items():
    lines.append("  ".join([model.ljust(width), *(f"{values[name]:{len(name)}.4f}" for name in names)]))
  return "\n".join(lines)
