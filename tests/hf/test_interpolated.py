"""Interpolation of two checkpoints, parameter by parameter: `convert --interpolate`, and the scores of a sweep."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from internvl_jax import conversion, sweep, verification
from internvl_jax.arguments import EvalConfig
from internvl_jax.errors import UserError
from internvl_jax.eval.loss import TokenLoss
from internvl_jax.eval.scoring import Evaluation, Question
from internvl_jax.hf import model_config as layouts
from internvl_jax.hf import peft
from internvl_jax.hf.changes import Changes
from internvl_jax.hf.interpolated import InterpolatedParameter, interpolate
from internvl_jax.hf.model import open_source
from internvl_jax.models.lora import LoRASpec, adapter_paths
from tests.support.held_out import NO_PROMPT, score_set
from tests.support.scripts import load
from tests.support.toy import CURVE, REPOSITORY

command = load(REPOSITORY / "internvl_jax/convert.py")
INIT = CURVE / "init"
HEAD = "language_model.lm_head.weight"
LAYER = "language_model.model.layers.{}.mlp.up_proj.weight"


def test_a_layer_is_interpolated_when_it_is_asked_for():
  start, end = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[2.0, 0.0], [3.0, 8.0]])
  quarter = InterpolatedParameter(start, end, 0.25)
  assert quarter.shape == (2, 2)
  np.testing.assert_array_equal(quarter[(1,)], np.array([3.0, 5.0], "f4"))
  np.testing.assert_array_equal(np.asarray(quarter), np.array([[1.25, 1.5], [3.0, 5.0]], "f4"))


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.3, 0.7, 1.0])
def test_ends_and_what_was_frozen_are_exact(weight):
  rng = np.random.default_rng(0)
  start, end = rng.normal(size=(2, 1000)).astype("f4")
  np.testing.assert_array_equal(interpolate(start, start, weight), start)
  found = interpolate(start, end, weight)
  np.testing.assert_allclose(found, (1 - weight) * start + weight * end, atol=1e-6)
  if weight in (0.0, 1.0):
    np.testing.assert_array_equal(found, end if weight else start)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
  """The toy model with other numbers in two of its tensors, and a layout of its own."""
  folder = tmp_path_factory.mktemp("tuned")
  shutil.copytree(INIT, folder / "internvl")
  tensors = load_file(INIT / "model.safetensors")
  for name in (HEAD, LAYER.format(1)):
    tensors[name] = tensors[name] + np.sin(np.arange(tensors[name].size, dtype="f4")).reshape(
      tensors[name].shape
    )
  save_file(tensors, folder / "internvl/model.safetensors")
  conversion.convert(str(folder / "internvl"), folder / "hf", layouts.layout_named("hf"), lora="merge")
  return folder


@pytest.fixture(scope="module")
def swept(tuned, tmp_path_factory):
  """Between the two, whose layouts differ."""
  folder = tmp_path_factory.mktemp("swept") / "sweep"
  internvl = layouts.layout_named("internvl")
  conversion.interpolate(str(tuned / "hf"), str(INIT), folder, internvl, [0.0, 0.25, 1.0])
  return folder


def test_a_sweep_has_a_folder_for_each_weight(tuned, swept):
  assert sorted(path.name for path in swept.iterdir()) == ["0", "0.25", "1"]
  start, end = load_file(INIT / "model.safetensors"), load_file(tuned / "internvl/model.safetensors")
  for name, weight in (("0", 0.0), ("0.25", 0.25), ("1", 1.0)):
    found = load_file(swept / name / "model.safetensors")
    for key in (HEAD, LAYER.format(0), LAYER.format(1)):
      np.testing.assert_allclose(found[key], start[key] + weight * (end[key] - start[key]), atol=1e-6)
    np.testing.assert_array_equal(found[LAYER.format(0)], start[LAYER.format(0)])
  np.testing.assert_array_equal(load_file(swept / "1/model.safetensors")[HEAD], end[HEAD])
  said = json.loads((swept / "0.25/config.json").read_text())["weights_from"]
  assert said == f"an interpolation: 0.25 of {tuned / 'hf'}, 0.75 of {INIT}"


def test_what_it_says_goes_with_a_conversion_and_not_with_another_training(swept, tmp_path):
  conversion.convert(str(swept / "0.25"), tmp_path / "hf", layouts.layout_named("hf"), lora="merge")
  config = json.loads((tmp_path / "hf/config.json").read_text())
  assert config["weights_from"].startswith("an interpolation: 0.25 of")
  again = conversion.model_files(
    open_source(swept / "0.25"),
    conversion.open_tokenizer(swept / "0.25"),
    layouts.layout_named("internvl"),
    None,
  )
  assert "weights_from" not in conversion.export._config(open_source(swept / "0.25"), again)


def test_adapters_are_merged_first(tmp_path, monkeypatch):
  """Half of the adapter's product is added to the start, layer by layer, once the merge is checked as in a conversion."""
  checked = []
  monkeypatch.setattr(
    conversion, "_weights", lambda source, lora, dtype: checked.append((source.specs, lora))
  )
  rng = np.random.default_rng(0)
  source = open_source(INIT, Changes(text_lora=LoRASpec(rank=2, alpha=4.0)))
  shapes = {path: source.model.shapes[path].shape for path in adapter_paths(source.model.shapes)}
  values = {path: rng.normal(size=shape, scale=0.1).astype("f4") for path, shape in shapes.items()}
  peft.save_adapter(tmp_path / "adapter", values, source.specs, source.layout, source.table, base=str(INIT))
  internvl = layouts.layout_named("internvl")
  conversion.interpolate(str(tmp_path / "adapter"), str(INIT), tmp_path / "half", internvl, [0.5])
  assert [(list(specs), lora) for specs, lora in checked] == [(["language_model"], "merge")]
  found, start = (verification.load(open_source(folder)) for folder in (tmp_path / "half", INIT))
  for path, a in values.items():
    if path.endswith(".adapter.a"):
      kernel = path.replace(".adapter.a", ".kernel")
      added = 0.5 * 2.0 * a @ values[path.removesuffix("a") + "b"]
      np.testing.assert_allclose(found[kernel], start[kernel] + added, atol=1e-5, err_msg=path)
      assert np.abs(added).max() > 1e-3


# --- What is refused ----------------------------------------------------------------------------------------


def changed_config(folder, **entries):
  """The toy model with other entries of its language model's config."""
  shutil.copytree(INIT, folder)
  config = json.loads((folder / "config.json").read_text())
  config["llm_config"] |= entries
  (folder / "config.json").write_text(json.dumps(config))
  return folder


def refusal(src, start, dst, weights=(0.5,)):
  with pytest.raises(UserError) as error:
    conversion.interpolate(str(src), str(start), dst, layouts.layout_named("internvl"), weights)
  assert "\n" not in str(error.value) and not (dst.exists() and any(dst.iterdir()))
  return str(error.value)


def test_models_that_do_not_go_together_are_refused(tmp_path):
  other = changed_config(tmp_path / "other", rope_theta=5.0)
  line = refusal(other, INIT, tmp_path / "new")
  assert "cannot be interpolated: their config.json have other values of text.rope" in line and "5.0" in line
  narrow = changed_config(tmp_path / "narrow", intermediate_size=64)
  line = refusal(INIT, narrow, tmp_path / "new")
  assert (
    f"{narrow} and {INIT} cannot be interpolated: 3 parameters differ, first language_model.model.layers"
    in line
  )
  words = changed_config(tmp_path / "words")
  tokenizer = json.loads((words / "tokenizer.json").read_text())
  vocabulary = tokenizer["model"]["vocab"]
  vocabulary["ai"], vocabulary["do"] = vocabulary["do"], vocabulary["ai"]
  (words / "tokenizer.json").write_text(json.dumps(tokenizer))
  line = refusal(INIT, words, tmp_path / "new")
  assert f"--interpolate={words}: its tokenizer has other tokens than that of {INIT}" in line
  (tmp_path / "full").mkdir()
  (tmp_path / "full/file").touch()
  with pytest.raises(UserError, match="is there and not empty"):
    conversion.interpolate(str(INIT), str(INIT), tmp_path / "full", layouts.layout_named("hf"), [0.5])


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ({"weight": ["0.5"]}, "--weight=0.5 has no effect without --interpolate=START"),
    ({"interpolate": "x"}, "--interpolate needs --weight: that of SRC"),
    ({"interpolate": "x", "weight": ["0.5", "1.5"]}, "--weight='1.5': must be a number from 0 to 1"),
    ({"interpolate": "x", "weight": ["half"]}, "--weight='half': must be a number from 0 to 1"),
    ({"interpolate": "x", "weight": ["0.1", "0.10000001"]}, "folders are named by six digits of a weight"),
    (
      {"interpolate": "x", "weight": ["0.1"], "lora": "peft"},
      "adapters are merged before models are interpolated",
    ),
  ],
)
def test_flags_that_do_not_go_together_are_refused(monkeypatch, flags, words):
  for name, value in {"interpolate": None, "weight": None, "lora": "merge", **flags}.items():
    monkeypatch.setattr(command, f"_{name.upper()}", SimpleNamespace(value=value))
  with pytest.raises(UserError) as error:
    command.interpolation_weights()
  assert words in str(error.value) and "\n" not in str(error.value)


def test_weights_of_the_command(monkeypatch):
  for name, value in {"interpolate": "x", "weight": ["0", "0.50", "0.5", "1"], "lora": "merge"}.items():
    monkeypatch.setattr(command, f"_{name.upper()}", SimpleNamespace(value=value))
  assert command.interpolation_weights() == [0.0, 0.5, 1.0]
  monkeypatch.setattr(command, "_INTERPOLATE", SimpleNamespace(value=None))
  monkeypatch.setattr(command, "_WEIGHT", SimpleNamespace(value=None))
  assert command.interpolation_weights() == []


# --- The scores of a sweep ----------------------------------------------------------------------------------


def test_models_of_a_folder_are_in_the_order_of_their_weights(tmp_path):
  for name in ("1", "0.5", "1e-05", "10", "other", "empty"):
    (tmp_path / name).mkdir()
    if name != "empty":
      (tmp_path / name / "config.json").touch()
  (tmp_path / "sweep_results.json").touch()
  assert [path.name for path in sweep.models_in(tmp_path)] == ["1e-05", "0.5", "1", "10", "other"]
  assert sweep.models_in(tmp_path / "1") == [] and sweep.models_in(tmp_path / "none") == []


class Sums(Evaluation):
  """Scores a model by the sum of its weights."""

  def check(self):
    """There is nothing to ask."""

  def run(self, params, start=None):
    total = sum(float(np.abs(np.asarray(value)).sum()) for value in params.values())
    question = Question(NO_PROMPT, "red", {})
    return [
      score_set([question], [""], "loss", label=f"{name}/", losses=[TokenLoss(total, 1)]) for name in "ab"
    ]


def test_each_model_of_a_sweep_is_scored_with_its_own_weights(swept, tmp_path, monkeypatch):
  fake = Sums(sets=(), tokenizer=None, decoder=None, loss=None, shown_lines=())
  monkeypatch.setattr(sweep, "make_evaluation", lambda *args, **named: fake)
  found = sweep.score_models(sweep.models_in(swept), EvalConfig(annotation="x"), tmp_path)
  for name, scores in found.items():
    tensors = load_file(swept / name / "model.safetensors").values()
    total = sum(float(np.abs(value).sum()) for value in tensors)
    assert scores == {"a/loss": pytest.approx(total, rel=1e-5), "b/loss": scores["a/loss"]}
  assert list(found) == ["0", "0.25", "1"] and found["0"] != found["0.25"] != found["1"]
  results = json.loads((tmp_path / "sweep_results.json").read_text())
  assert results["0.25"] == json.loads((tmp_path / "0.25/eval_results.json").read_text())
  assert results["0.25"]["test"]["loss"] == found["0.25"]["b/loss"]
  header, *lines = sweep.table_of(found).splitlines()
  assert header.split() == ["model", "a/loss", "b/loss"] and len(lines) == 3
  assert lines[1].split() == ["0.25", *[f"{found['0.25']['a/loss']:.4f}"] * 2]
  other = changed_config(tmp_path / "other", rope_theta=5.0)
  with pytest.raises(UserError, match="has another architecture, template or way to cut images than"):
    sweep.score_models([swept / "0", other], EvalConfig(annotation="x"), tmp_path / "two")
