"""A way to learn is a folder and a line: `tests/support/text_task` trains without another change anywhere.

Its run is short enough to be repeated with averages of the weights, which change what is exported and nothing else.
"""

import json
from typing import ClassVar

import numpy as np
import pytest

from internvl_jax import tasks, verification
from internvl_jax.hf.model import open_source
from internvl_jax.train import run as training_run
from internvl_jax.train.run import train
from internvl_jax.trainer import CompiledSteps
from tests.support.toy import CURVE, curve_config, log_history


class Recorded(CompiledSteps):
  """Steps that keep a copy of the weights before the first step and after each."""

  weights: ClassVar[list[dict[str, np.ndarray]]] = []

  def __call__(self, state, *inputs):
    if not self.weights:
      self.weights.append(copied(state))
    state, metrics = super().__call__(state, *inputs)
    self.weights.append(copied(state))
    return state, metrics


def copied(state):
  return {path: np.array(value) for path, value in state.params.items()}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """Trains the task for two steps, of which both batches are the same four lines; returns the output directory."""
  folder = tmp_path_factory.mktemp("text")
  lines = [{"text": "red " * (1 + i % 4), "url": "x"} for i in range(8)]
  (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  (folder / "meta.json").write_text(json.dumps({"text": {"root": "", "annotation": "text.jsonl"}}))

  def learn(name, **settings):
    config = curve_config(folder / name, CURVE)
    config.data.meta_path = str(folder / "meta.json")
    config.model.freeze_backbone = config.model.freeze_mlp = True
    config.training.max_steps, config.training.learning_rate = 2, 1e-2
    config.training.gradient_accumulation_steps, config.training.warmup_ratio = 1, 0.0
    config.training.per_device_train_batch_size = 4
    config.training.save_strategy = "no"
    for field, value in settings.items():
      leaf, _, of_leaf = field.rpartition(".")
      setattr(getattr(config, leaf or "training"), of_leaf, value)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(tasks, "TASKS", ("tests.support.text_task", *tasks.TASKS))
      patch.setattr(training_run, "CompiledSteps", Recorded)
      patch.setattr(Recorded, "weights", [])
      assert train(config)
      return folder / name, Recorded.weights

  return learn


@pytest.fixture(scope="module")
def plain(text):
  return text("plain")


def test_a_task_is_a_folder_and_a_line(plain):
  out, _ = plain
  first, second = log_history(out)
  assert second["loss"] < first["loss"] and 0 < first["long_rows"] < 1
  assert (out / "model.safetensors").is_file()


EMA = {"optim_args": "ema_decay=0.5", "save_strategy": "steps"}


def exported(out):
  """The weights of an export, and what it says of them."""
  said = json.loads((out / "config.json").read_text()).get("weights_from")
  return verification.load(open_source(out)), said


@pytest.fixture(scope="module")
def averaged(text):
  """The same run with averages: its log, the weights by step, and what it exports, then and by the same command again."""
  out, weights = text("averaged", **EMA)
  history, first = log_history(out), exported(out)
  text("averaged", **EMA, **{"checkpoint.export_average": False})
  return history, weights, first, exported(out)


def test_averages_of_the_weights_are_exported_and_the_run_stays_as_it_is(averaged, plain):
  """The updates are compiled together with the averages and may be rounded otherwise: equal to the bit is the first step."""
  (out, weights), theirs = plain, log_history(plain[0])
  ours, (start, first, second), (found, said), _ = averaged
  for key in ("loss", "grad_norm"):
    assert ours[0][key] == theirs[0][key]
    np.testing.assert_allclose(ours[1][key], theirs[1][key], rtol=1e-6)

  last, of_last = exported(out)
  for path, value in second.items():
    average = 0.5 * (0.5 * start[path] + 0.5 * first[path]) + 0.5 * value
    np.testing.assert_allclose(found[path], average, rtol=1e-6, atol=1e-7, err_msg=path)
    np.testing.assert_array_equal(last[path], weights[-1][path], err_msg=path)
    assert np.abs(average - value).max() > 1e-4, path
  assert said == "the average of the weights (training.optim_args=ema_decay=0.5) after step 2"
  assert of_last is None


def test_the_same_command_exports_the_last_weights_where_that_is_asked_for(averaged):
  _, (_, _, second), _, (found, said) = averaged
  for path, value in second.items():
    np.testing.assert_array_equal(found[path], value, err_msg=path)
  assert said == "the last weights, of step 2, not their average (checkpoint.export_average=False)"


def test_averages_of_adapters_are_exported_apart_and_merged(text):
  """Each factor's average, in adapter/ and in the merged model: of the products' average no adapter of that rank exists."""
  settings = {**EMA, "save_strategy": "no", "model.use_llm_lora": 2, "model.freeze_llm": True}
  out, (start, first, second) = text("adapters", **settings)
  apart, merged = (verification.load(open_source(folder)) for folder in (out / "adapter", out))
  for path, value in second.items():
    average = 0.5 * (0.5 * start[path] + 0.5 * first[path]) + 0.5 * value
    np.testing.assert_allclose(apart[path], average, rtol=1e-6, atol=1e-7, err_msg=path)
    if path.endswith(".adapter.b"):
      assert np.abs(average - value).max() > 1e-4, path
      kernel, a = path.replace(".adapter.b", ".kernel"), apart[path.removesuffix("b") + "a"]
      whole = apart[kernel] + 2.0 * np.asarray(a) @ average
      np.testing.assert_allclose(merged[kernel], whole, atol=1e-5, err_msg=path)
