"""Adapters: what trains, what they compute, what merging gives, and how they come in and go out."""

import dataclasses
import functools
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from internvl_jax import adapters, conversion
from internvl_jax.arguments import ModelArguments
from internvl_jax.errors import UserError
from internvl_jax.hf import model_config as layouts
from internvl_jax.hf.model import Changes, open_source
from internvl_jax.models import lora
from internvl_jax.models.lora import LoRASpec
from internvl_jax.optim.labels import trainable_paths
from internvl_jax.trees import submodule_of
from tests.support.harness import Harness, make_batch, toy
from tests.support.toy import CURVE, CURVE_INTERNLM2

SPEC = LoRASpec(rank=2, alpha=4.0)
FLAGS = {"freeze_backbone": True, "freeze_mlp": True, "freeze_llm": True, "use_llm_lora": 2}
PLACE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def adapted(text=SPEC, vision=None, **settings):
  config = toy(text={"lora": text} if text else None, lora=vision)
  harness = Harness(config, freeze=FLAGS | ({"use_backbone_lora": 2} if vision else {}), **settings)
  # As fresh adapters are: b is zero.
  params = {p: v * 0 if p.endswith(".adapter.b") else v for p, v in harness.state.params.items()}
  harness.state = dataclasses.replace(harness.state, params=params)
  return harness


@pytest.mark.parametrize("vision", [None, SPEC])
def test_after_one_step_every_b_has_moved_and_nothing_but_adapters(vision):
  harness = adapted(vision=vision)
  before = {path: np.asarray(value) for path, value in harness.state.params.items()}
  frozen = {path: np.asarray(value) for path, value in harness.frozen.items()}
  harness.run(make_batch())
  assert before.keys() == lora.adapter_paths(harness.model.shapes)
  assert {submodule_of(path) for path in before} == {"language_model"} | (
    {"vision_model"} if vision else set()
  )
  for path, value in harness.state.params.items():
    if path.endswith(".b"):
      layers = np.abs(np.asarray(value)).max(axis=(1, 2))
      assert (layers > 0).all(), path
  for path, value in frozen.items():
    np.testing.assert_array_equal(harness.frozen[path], value, err_msg=path)


def test_targets_are_those_of_the_reference():
  def adapted_maps(**text):
    config = toy(text={"lora": SPEC, **text}, lora=SPEC)
    paths = Harness(config, freeze={**FLAGS, "use_backbone_lora": 2}).state.params
    return {path.split(".", 3)[-1].split(".", 1)[1].split(".adapter")[0] for path in paths}

  vit = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
  heads = {f"self_attn.{name}_proj" for name in "qkvo"}
  assert {m.removeprefix("0:2.") for m in adapted_maps()} == vit | heads | {
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
  }
  fused = adapted_maps(qkv="concatenated", fused_gate_up=True)
  assert {m.removeprefix("0:2.") for m in fused} == vit | {
    "self_attn.qkv_proj",
    "self_attn.o_proj",
    "mlp.gate_up_proj",
    "mlp.down_proj",
  }


def test_dropout_acts_in_training_only_and_keeps_the_mean():
  harness = adapted(text=dataclasses.replace(SPEC, dropout=0.5), dropout=True)
  calm = adapted(text=dataclasses.replace(SPEC, dropout=0.5))
  params = {p: v + 0.3 * p.endswith(".b") for p, v in harness.state.params.items()}
  batch = jax.tree.map(jnp.asarray, make_batch())

  def losses(harness):
    loss = jax.jit(lambda step: harness.step.value_and_grad(params, harness.frozen, batch, step, {})[0][0])
    return [float(loss(step)) for step in range(3)]

  assert len(set(losses(harness))) == 3
  assert len(set(losses(calm))) == 1

  # A single map: the mean over many draws is what evaluation gives.
  from flax import nnx

  from internvl_jax.models.layers import Linear

  layer = nnx.List([Linear(8, 6, bias=False, axes=("embed", "mlp"), rngs=nnx.Rngs(0))])
  linear = layer[0]
  linear.adapter = lora.Adapter(linear, dataclasses.replace(SPEC, dropout=0.3), nnx.Rngs(1))
  linear.adapter.b[...] = jnp.ones((2, 6))
  x = jax.random.normal(jax.random.key(0), (20000, 8))
  without = linear(jnp.broadcast_to(x[:1], x.shape))
  lora.start_dropout(layer, jax.random.key(3))
  dropped = linear(jnp.broadcast_to(x[:1], x.shape))
  assert float(jnp.abs(dropped - without).max()) > 0.1
  np.testing.assert_allclose(dropped.mean(axis=0), without[0], atol=0.03)


# --- Whole checkpoints --------------------------------------------------------------------------------------


def with_noise(params, seed=0):
  """Fresh adapters do nothing; these do."""
  rng = np.random.default_rng(seed)
  return {
    path: value + 0.1 * rng.normal(size=value.shape).astype("f4") if path.endswith(".b") else value
    for path, value in params.items()
  }


def open_adapted(folder=CURVE / "init", *, vision=SPEC, text=SPEC, noise=True):
  source = open_source(folder, Changes(vision_lora=vision, text_lora=text))
  params = source.load(source.model.shapes, dict.fromkeys(source.model.shapes, PLACE), seed=3)
  return source, with_noise(params) if noise else params


@functools.cache
def without_adapters():
  """The checkpoint's own parameters, and their logits."""
  plain = open_source(CURVE / "init")
  params = plain.load(plain.model.shapes, dict.fromkeys(plain.model.shapes, PLACE))
  return params, adapters.probe(plain, params)


def test_fresh_adapters_change_nothing_and_are_kaiming_uniform():
  base, logits = without_adapters()
  source, params = open_adapted(noise=False, text=dataclasses.replace(SPEC, use_dora=True))
  for path, value in base.items():
    np.testing.assert_array_equal(params[path], value, err_msg=path)
  np.testing.assert_allclose(adapters.probe(source, params), logits, rtol=0, atol=1e-5)
  for path in source.fresh:
    value = np.asarray(params[path])
    if path.endswith(".a"):
      bound = value.shape[1] ** -0.5
      assert 0.8 * bound < np.abs(value).max() <= bound, path
      assert len(np.unique(value)) > 0.9 * value.size, path  # no two layers alike
    elif path.endswith(".b"):
      assert not value.any(), path
    else:
      norms = np.linalg.norm(params[path.replace("adapter.magnitude", "kernel")], axis=1)
      np.testing.assert_allclose(value, norms, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_a_merge_keeps_the_logits_and_says_so(options, caplog):
  source, params = open_adapted(text=dataclasses.replace(SPEC, **options))
  before = adapters.probe(source, params)
  with caplog.at_level(logging.INFO):
    plain, merged = adapters.merge_and_check(source, params)
  assert "logits of a fixed input differ by at most" in caplog.text
  assert not lora.adapter_paths(merged) and merged.keys() == plain.model.shapes.keys()
  assert np.abs(before - without_adapters()[1]).max() > 0.05  # the adapters do something
  arrays = {path: jnp.asarray(np.asarray(value)) for path, value in merged.items()}
  np.testing.assert_allclose(adapters.probe(plain, arrays), before, rtol=0, atol=1e-4)


def test_a_merge_that_changes_the_model_is_refused(monkeypatch):
  source, params = open_adapted()
  right = lora._merged
  monkeypatch.setattr(lora, "_merged", lambda kernel, a, b, m, scale: right(kernel, a, b, m, 2 * scale))
  with pytest.raises(UserError, match=r"merging the adapters changed a logit by .* more than the .* allowed"):
    adapters.merge_and_check(source, params)


def reference_checkpoint(folder, init, *, rank=2):
  """A LoRA checkpoint as the reference saves it: PEFT's wrapped names, and the rank in config.json."""
  rng = np.random.default_rng(5)
  targets = {
    "language_model": (
      "self_attn.q_proj",
      "self_attn.o_proj",
      "self_attn.k_proj",
      "self_attn.v_proj",
      "mlp.gate_proj",
      "mlp.up_proj",
      "mlp.down_proj",
      "attention.wqkv",
      "attention.wo",
      "feed_forward.w1",
      "feed_forward.w2",
      "feed_forward.w3",
    ),
    "vision_model": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
  }
  tensors, merged = {}, {}
  for key, value in load_file(init / "model.safetensors").items():
    part, _, rest = key.partition(".")
    wrapped = key if part not in targets else f"{part}.base_model.model.{rest}"
    module = wrapped.rsplit(".", 1)[0]
    merged[key] = value
    if ".layers." in key and module.endswith(targets.get(part, ())):
      wrapped = f"{module}.base_layer.{key.rsplit('.', 1)[1]}"
      if key.endswith(".weight"):
        a = 0.1 * rng.normal(size=(rank, value.shape[1])).astype("f4")
        b = 0.1 * rng.normal(size=(value.shape[0], rank)).astype("f4")
        tensors |= {f"{module}.lora_A.default.weight": a, f"{module}.lora_B.default.weight": b}
        merged[key] = value + 2.0 * b @ a
    tensors[wrapped] = value
  shutil.copytree(init, folder)
  (folder / "model.safetensors").unlink()
  save_file(tensors, folder / "model.safetensors")
  config = json.loads((folder / "config.json").read_text())
  config |= {"use_llm_lora": rank, "use_backbone_lora": rank}
  (folder / "config.json").write_text(json.dumps(config))
  return merged


@pytest.mark.parametrize("init", [CURVE / "init", CURVE_INTERNLM2 / "init"], ids=["qwen2", "internlm2"])
def test_the_references_lora_checkpoints(tmp_path, init):
  """They load with their adapters, go on training, and are merged to what numpy merges by hand."""
  by_hand = reference_checkpoint(tmp_path / "lora", init)
  source = open_source(tmp_path / "lora", Changes(text_lora=dataclasses.replace(SPEC, dropout=0.1)))
  assert not source.fresh
  assert source.specs["language_model"] == dataclasses.replace(SPEC, dropout=0.1)
  assert source.specs["vision_model"].rank == 2 and source.specs["vision_model"].scale == 2.0
  with pytest.raises(UserError, match=r"model\.use_llm_lora asks for rank 8, but .* have 2"):
    open_source(tmp_path / "lora", Changes(text_lora=LoRASpec(rank=8, alpha=16.0)))

  conversion.convert(str(tmp_path / "lora"), tmp_path / "merged", layouts.INTERNVL, lora="merge")
  merged = load_file(tmp_path / "merged/model.safetensors")
  assert merged.keys() == by_hand.keys()
  for key, value in by_hand.items():
    np.testing.assert_allclose(merged[key], value, rtol=0, atol=1e-6, err_msg=key)
  config = json.loads((tmp_path / "merged/config.json").read_text())
  assert config["use_llm_lora"] == config["use_backbone_lora"] == 0

  # Apart: base and adapters, which together are the same model again.
  conversion.convert(str(tmp_path / "lora"), tmp_path / "apart", layouts.INTERNVL, lora="peft")
  base = load_file(tmp_path / "apart/model.safetensors")
  for key, value in load_file(init / "model.safetensors").items():
    np.testing.assert_array_equal(base[key], value, err_msg=key)
  again = open_source(tmp_path / "apart/adapter")
  for part, spec in source.specs.items():
    assert (again.specs[part].rank, again.specs[part].alpha) == (spec.rank, spec.alpha)
  ours = source.load(source.model.shapes, dict.fromkeys(source.model.shapes, PLACE))
  theirs = again.load(again.model.shapes, dict.fromkeys(again.model.shapes, PLACE))
  assert ours.keys() == theirs.keys()
  for path, value in ours.items():
    np.testing.assert_array_equal(theirs[path], value, err_msg=path)


def test_adapters_of_several_ranks_go_out_and_come_in(tmp_path):
  from internvl_jax.hf import peft

  vision, text = LoRASpec(rank=3, alpha=5.0), LoRASpec(rank=2, alpha=4.0, use_rslora=True)
  vision = dataclasses.replace(vision, use_rslora=True)
  source, params = open_adapted(vision=vision, text=text)
  base = str(CURVE / "init")
  peft.save_adapter(tmp_path, params, source.specs, source.layout, source.table, base=base)
  config = json.loads((tmp_path / "adapter_config.json").read_text())
  assert config["r"] == 2 and config["rank_pattern"] == {r"vision_model\..*": 3}
  # What PEFT 0.21 writes beside, at its defaults.
  config |= dict.fromkeys(
    ("use_qalora", "lora_bias", "ensure_weight_tying", "use_bdlora", "fan_in_fan_out"), False
  )
  config |= dict.fromkeys(
    ("megatron_config", "trainable_token_indices", "corda_config", "arrow_config", "revision")
  )
  config |= {
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "loftq_config": {},
    "peft_version": "0.21.2",
  }
  (tmp_path / "adapter_config.json").write_text(json.dumps(config))
  again = open_source(tmp_path)
  assert (
    again.specs["vision_model"].scale == vision.scale and again.specs["language_model"].scale == text.scale
  )
  loaded = again.load(again.model.shapes, dict.fromkeys(again.model.shapes, PLACE))
  for path in lora.adapter_paths(params):
    np.testing.assert_array_equal(loaded[path], params[path], err_msg=path)


def test_a_layout_without_a_form_for_the_adapters_is_refused(tmp_path):
  """transformers holds q, k and v of the ViT apart; one adapter of all three has no place there."""
  reference_checkpoint(tmp_path / "lora", CURVE / "init")
  with pytest.raises(UserError, match=r"the hf layout has no form for adapters of vision_model.*attn\.qkv"):
    conversion.convert(str(tmp_path / "lora"), tmp_path / "out", layouts.HF, lora="peft")
  assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize(
  ("targets", "message"),
  [
    (("q_prj",), r"lora\.targets=\('q_prj',\) name no linear map of language_model; it has mlp\.down_proj, "),
    (("q_proj", "v_prj"), r"lora\.targets: 'v_prj' names no linear map; there are mlp\.down_proj, "),
  ],
)
def test_targets_that_name_nothing_are_refused(targets, message):
  """A part without adapters would train whole."""
  with pytest.raises(UserError, match=message):
    open_source(CURVE / "init", Changes(text_lora=dataclasses.replace(SPEC, targets=targets)))


def test_what_is_asked_of_adapters_that_are_there_must_be_what_they_are(tmp_path):
  reference_checkpoint(tmp_path / "lora", CURVE / "init")
  for change, flag in (
    ({"use_rslora": True}, "use_rslora"),
    ({"targets": ("q_proj",)}, "targets"),
    ({"alpha": 3.0}, "alpha"),
  ):
    with pytest.raises(UserError, match=rf"lora\.{flag} asks for .*, but the checkpoint's adapters"):
      open_source(tmp_path / "lora", Changes(text_lora=dataclasses.replace(SPEC, **change)))
  source = open_source(tmp_path / "lora")
  with pytest.raises(
    UserError, match=r"freeze_llm=True with model\.use_llm_lora=0, but the checkpoint has adapters"
  ):
    trainable_paths(ModelArguments(freeze_llm=True, use_backbone_lora=2), source.model.shapes)


@pytest.mark.parametrize(
  "entry", [{"use_qalora": True}, {"layer_replication": [[0, 2]]}, {"lora_bias": True}]
)
def test_an_adapter_with_something_more_is_refused(tmp_path, entry):
  config = {"peft_type": "LORA", "base_model_name_or_path": str(CURVE / "init"), **entry}
  (tmp_path / "adapter_config.json").write_text(json.dumps(config))
  save_file({}, tmp_path / "adapter_model.safetensors")
  with pytest.raises(UserError, match=f"{next(iter(entry))}=.* is not supported; expected it empty"):
    open_source(tmp_path)


def test_an_adapter_of_another_kind_is_refused(tmp_path):
  config = {"peft_type": "IA3", "base_model_name_or_path": str(CURVE / "init")}
  (tmp_path / "adapter_config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match=r"adapter_config\.json: peft_type='IA3' is not supported"):
    open_source(tmp_path)
  (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
  with pytest.raises(UserError, match="base_model_name_or_path is missing"):
    open_source(tmp_path)


# --- Adapters on adapters, and adapters without a place ------------------------------------------------------


def edit_tensors(folder, change):
  tensors = change(load_file(folder / "model.safetensors"))
  save_file(tensors, folder / "model.safetensors")


def edit_json(path, **changes):
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_adapter(folder, base, modules, *, rank=2, **config):
  """An adapter as PEFT saves it, of modules (name, width out, width in)."""
  folder.mkdir()
  config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "lora_alpha": 4, **config}
  (folder / "adapter_config.json").write_text(json.dumps(config))
  tensors = {}
  for name, out, into in modules:
    tensors[f"base_model.model.{name}.lora_A.weight"] = np.ones((rank, into), "f4")
    tensors[f"base_model.model.{name}.lora_B.weight"] = np.ones((out, rank), "f4")
  save_file(tensors, folder / "adapter_model.safetensors")
  return folder


@pytest.mark.parametrize("asked", [None, SPEC])
@pytest.mark.parametrize(
  "wrapped", [".base_model.model.base_model.model.", ".base_model.model.base_model.model.base_model.model."]
)
def test_a_lora_checkpoint_that_was_trained_with_lora_again(tmp_path, wrapped, asked):
  """The reference wraps what is wrapped: each time one prefix more. The adapters are in place once."""
  reference_checkpoint(tmp_path / "once", CURVE / "init")
  reference_checkpoint(tmp_path / "again", CURVE / "init")
  edit_tensors(
    tmp_path / "again",
    lambda tensors: {key.replace(".base_model.model.", wrapped): value for key, value in tensors.items()},
  )
  once, again = (
    open_source(tmp_path / name, Changes(text_lora=asked, vision_lora=asked)) for name in ("once", "again")
  )
  assert again.specs == once.specs and not again.fresh  # They go on.
  expected = once.load(once.model.shapes, dict.fromkeys(once.model.shapes, PLACE))
  for path, value in again.load(again.model.shapes, dict.fromkeys(again.model.shapes, PLACE)).items():
    np.testing.assert_array_equal(value, expected[path], err_msg=path)


def test_a_whole_model_that_peft_wraps(tmp_path):
  reference_checkpoint(tmp_path / "model", CURVE / "init")
  edit_tensors(
    tmp_path / "model",
    lambda tensors: {
      "base_model.model." + key.replace(".base_model.model.", "."): value for key, value in tensors.items()
    },
  )
  assert not open_source(tmp_path / "model").fresh


def test_another_rank_than_the_checkpoints_is_answered(tmp_path):
  """The reference would begin new adapters and lose those that are there, without a word."""
  reference_checkpoint(tmp_path / "model", CURVE / "init")
  with pytest.raises(
    UserError, match=r"model\.use_llm_lora asks for rank 4, .* have 2; .*convert --lora merge"
  ):
    open_source(tmp_path / "model", Changes(text_lora=LoRASpec(rank=4, alpha=8.0)))


@pytest.mark.parametrize(
  ("record", "words"),
  [
    (
      {"use_llm_lora": 8},
      "says use_llm_lora=8, but the checkpoint has adapters of rank 2 in language_model; set",
    ),
    (
      {"use_llm_lora": 0},
      "says use_llm_lora=0, but the checkpoint has adapters of rank 2 in language_model; set",
    ),
    (
      {"use_backbone_lora": None},
      "has adapters of rank 2 in vision_model; set use_backbone_lora in config.json to 2",
    ),
  ],
  ids=str,
)
def test_a_record_that_is_not_what_the_tensors_are(tmp_path, record, words):
  reference_checkpoint(tmp_path / "model", CURVE / "init")
  edit_json(tmp_path / "model/config.json", **record)
  with pytest.raises(UserError, match=words):
    open_source(tmp_path / "model")


def test_a_record_of_adapters_that_were_merged(tmp_path):
  folder = shutil.copytree(CURVE / "init", tmp_path / "model")
  edit_json(folder / "config.json", use_llm_lora=16)
  with pytest.raises(
    UserError, match=r"use_llm_lora=16, but the checkpoint has no adapters in language_model; set .* to 0"
  ):
    open_source(folder)


LAYER = "language_model.model.layers.0.self_attn.q_proj"


def test_an_adapter_of_a_model_that_has_adapters(tmp_path):
  """Those of the base have the same names, and would be lost."""
  reference_checkpoint(tmp_path / "model", CURVE / "init")
  folder = write_adapter(tmp_path / "adapter", tmp_path / "model", [(LAYER, 64, 64)])
  with pytest.raises(UserError, match=r"its base model has adapters itself .* merge those first"):
    open_source(folder)
  above = write_adapter(tmp_path / "above", folder, [(LAYER, 64, 64)])
  with pytest.raises(UserError, match="is an adapter itself; merge that one first"):
    open_source(above)


def test_an_adapter_with_its_models_config_beside_it(tmp_path):
  modules = [(LAYER.replace(".0.", f".{i}."), 64, 64) for i in range(3)]
  folder = write_adapter(tmp_path / "adapter", CURVE / "init", modules)
  shutil.copyfile(CURVE / "init/config.json", folder / "config.json")
  assert open_source(folder).specs["language_model"].rank == 2


@pytest.mark.parametrize(
  ("module", "words"),
  [
    ("mlp1.1", "the projector takes no adapters: model.freeze_mlp=False trains it whole"),
    ("vision_model.encoder.layers.0.attn.q_proj", "the ViT has q, k and v in one map: adapt attn.qkv"),
    ("language_model.lm_head", "the head takes no adapters: model.unfreeze_lm_head=True trains it whole"),
    ("language_model.model.layers.0.elsewhere", "has no place, nor"),
  ],
)
def test_an_adapter_of_what_takes_none(tmp_path, module, words):
  modules = [(LAYER.replace(".0.", f".{i}."), 64, 64) for i in range(3)]
  folder = write_adapter(tmp_path / "adapter", CURVE / "init", [*modules, (module, 8, 8)])
  with pytest.raises(UserError) as error:
    open_source(folder)
  line = str(error.value)
  assert f"the adapter of {module} has no place" in line and words in line and "merge_and_unload" in line
  assert len(line.splitlines()) == 1


@pytest.mark.parametrize(
  ("targets", "words"),
  [
    (
      ("q_proj",),
      r"vision_model; it has attn\.proj, .*; the ViT has q, k and v in one map: adapt attn\.qkv; or set ",
    ),
    ((r"mlp1\.linear_1",), r"projector takes no adapters: model\.freeze_mlp=False trains it whole"),
    (
      ("qkv", "mlp1"),
      r"'mlp1' names no linear map; .*; the projector takes no adapters: model\.freeze_mlp=False",
    ),
    (("qkv", "o_proj", "lm_head"), r"'lm_head' names no linear map; .*model\.unfreeze_lm_head=True"),
  ],
  ids=str,
)
def test_targets_that_take_no_adapter(targets, words):
  vision = dataclasses.replace(SPEC, targets=targets)
  text = vision if "o_proj" in targets else None
  with pytest.raises(UserError, match=words):
    open_source(CURVE / "init", Changes(text_lora=text, vision_lora=vision))
