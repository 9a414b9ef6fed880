"""InternVL3.5-Flash: what the published code computes, by its names, and what is refused; `support.flash` has the recording."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from internvl_jax import verification
from internvl_jax.arguments import MeshConfig, ModelArguments
from internvl_jax.batch import NO_IMAGE
from internvl_jax.conversion import convert
from internvl_jax.errors import UserError
from internvl_jax.eval.compression import Rule, quantile, read_rule, rule_of
from internvl_jax.eval.greedy import GreedyDecoder
from internvl_jax.eval.routing import make_router, softmax
from internvl_jax.hf.changes import Changes
from internvl_jax.hf.model import open_source
from internvl_jax.hf.model_config import HF, INTERNVL
from internvl_jax.models.flash import PARTS, UNUSED, FlashConfig
from internvl_jax.models.functional import define
from internvl_jax.models.internvl import Execution, InternVL, normalize_tiles
from internvl_jax.optim.labels import trainable_paths
from internvl_jax.parallel import mesh as meshes
from internvl_jax.parallel import rules
from internvl_jax.trees import submodule_of
from tests.support import flash
from tests.support.damage import edit, edit_config, refused

PLACE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return flash.write_checkpoint(tmp_path_factory.mktemp("flash") / "model")


@pytest.fixture(scope="module")
def source(folder):
  return open_source(folder)


@pytest.fixture(scope="module")
def params(source):
  return verification.load(source)


@pytest.fixture(scope="module")
def recorded():
  return np.load(flash.RECORDING)


def close(ours, theirs):
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def logits_of(source, params, ids, index, features):
  """Logits [S, V] of a prompt."""

  @jax.jit
  def run(params, ids, index, features):
    model, how = source.model.bind(params), Execution()
    x = model.embed(ids[None], index[None], features, how)
    hidden, _ = model.decode(x, how, positions=np.arange(len(ids))[None], segment_ids=None)
    return model.logits(hidden)[0]

  return run(params, ids, index, features)


def router_of(source, compress="auto"):
  return make_router(
    source.config,
    compress,
    model=source.model,
    how=Execution(),
    normalize_type="imagenet",
    image_token_id=flash.IMAGE_TOKEN,
  )


# --- What the published code computes -----------------------------------------------------------------------


def test_equals_the_recording(source, params, recorded):
  """The gate, both features, `forward` of whole tiles, and `generate` of those that are chosen, token by token."""
  prompt = flash.question()
  router = router_of(source)
  assert router is not None
  (ids,), (index,), features = router(params, [prompt.input_ids], [prompt.tiles])
  _, logits = router._encode(params, np.pad(prompt.tiles, ((0, 3), (0, 0), (0, 0), (0, 0))))
  close(softmax(np.asarray(logits))[: flash.TILES], recorded["probabilities"])
  pool = np.asarray(features).reshape(8, flash.TOKENS + flash.COMPRESSED, -1)[: flash.TILES]
  close(pool[:, : flash.TOKENS], recorded["features"])
  close(pool[:, flash.TOKENS :], recorded["compressed"])
  close(logits_of(source, params, ids, index, features), recorded["routed_logits"])
  counts = router.take_counts()
  chosen = recorded["chosen"]
  assert (counts.tiles, counts.compressed) == (len(chosen), chosen.sum()) and 0 < chosen.sum() < len(chosen)
  assert counts.saved == pytest.approx(1 - (index != NO_IMAGE).sum() / (flash.TILES * flash.TOKENS))
  assert len(prompt.input_ids) - len(ids) == chosen.sum() * (flash.TOKENS - flash.COMPRESSED)


def test_verify_runs_the_published_forward(source, params, recorded):
  """All tiles have all of their tokens; what the router computes is told beside it, and has no gradient."""
  prompt = flash.question()
  ids = prompt.input_ids[None]
  inputs = {
    "pixel_values": np.asarray(normalize_tiles(jnp.asarray(prompt.tiles), "imagenet")).transpose(0, 3, 1, 2),
    "image_flags": np.ones(flash.TILES, np.int32),
    "input_ids": ids,
    "labels": ids,
    "attention_mask": np.ones_like(ids),
    "image_token_id": np.array(flash.IMAGE_TOKEN),
  }
  outputs, grads = verification.run_with_gradients(
    source.model, params, verification.with_positions(source, inputs)
  )
  close(outputs["logits"][0], recorded["logits"])
  close(outputs["features"], recorded["features"])
  close(outputs["features_compressed"], recorded["compressed"])
  close(outputs["gate"], recorded["probabilities"])
  assert not any(np.any(grad) for path, grad in grads.items() if submodule_of(path) in PARTS)


def decoder_of(source, compress="auto", rows=2):
  return GreedyDecoder(
    model=source.model,
    how=Execution(),
    normalize_type="imagenet",
    image_token_id=flash.IMAGE_TOKEN,
    stop_ids=(95,),
    max_new_tokens=6,
    batch_size=rows,
    router=router_of(source, compress),
  )


def test_answers_on_a_mesh_are_those_of_the_published_code(source, params, recorded):
  """Each prompt is routed by its own tiles, and one without any is read beside it."""
  prompt = flash.question()
  blind = dataclasses.replace(prompt, input_ids=prompt.input_ids[-9:], tiles=prompt.tiles[:0])
  mesh = meshes.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
  placed = jax.device_put(params, rules.weight_shardings(source.model.axes, source.model.shapes, mesh))
  found = decoder_of(source)(placed, [prompt, blind])
  np.testing.assert_array_equal(found[0], recorded["answer"][: len(found[0])])
  assert len(found[0]) > 2
  np.testing.assert_array_equal(found[1], decoder_of(source, "none")(params, [blind])[0])


def test_quantiles_are_torchs(recorded):
  ends = recorded["lengths"].cumsum()
  for values, expected in zip(np.split(recorded["values"], ends[:-1]), recorded["quantiles"], strict=True):
    assert [quantile(values, q) for q in recorded["qs"]] == expected.tolist()


def test_rules():
  p = np.array([0.2, 0.9, 0.5, 0.5], np.float32)
  assert Rule(0.5, 0.0)(p).tolist() == [False, True, False, False]
  assert Rule(0.0, 0.5)(p).tolist() == [False, True, True, True]
  assert Rule(0.0, 0.0)(p[:1]).tolist() == [False]  # As published: a tile alone is not above itself.
  assert read_rule("all")(p).all() and not len(read_rule("all")(p[:0]))
  assert read_rule("0,0.95")(p).tolist() == [False] * 4
  config = FlashConfig(relative_threshold=0.25, absolute_threshold=0.125)
  assert (
    rule_of("auto", config) == Rule(0.25, 0.125) and rule_of("none", config) is rule_of("auto", None) is None
  )
  for wrong in ("some", "0.1", "0.1,2", "0.1,nan", "1,1,1"):
    with pytest.raises(UserError, match="must be 'auto', 'all', 'none', or the relative and the absolute"):
      read_rule(wrong)
  with pytest.raises(UserError, match=r"compress='all': the model is no InternVL3\.5-Flash"):
    rule_of("all", None)


# --- Names, sizes, training ---------------------------------------------------------------------------------


def test_every_tensor_is_read_and_written_again(folder, tmp_path):
  """Also what nothing reads; config.json describes the same model."""
  convert(str(folder), tmp_path / "again", INTERNVL, lora="merge")
  ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "again", folder))
  assert ours.keys() == theirs.keys()
  for key, tensor in theirs.items():
    assert ours[key].tobytes() == tensor.tobytes(), key
  assert open_source(tmp_path / "again").config == open_source(folder).config
  for name in ("attn3.in_proj_weight", "norm4.weight"):
    assert f"pooling_before_gating.{name}" in theirs


def test_what_the_published_code_does_not_read_changes_nothing(source, params):
  tiles = normalize_tiles(jnp.asarray(flash.question().tiles), "imagenet")

  def gate(params):
    model = source.model.bind(params)
    return model.gate(model.encode(tiles, Execution())).sum()

  grads = jax.jit(jax.grad(gate))(params)
  moved = {path for path, grad in grads.items() if np.any(np.asarray(grad))}
  router = {path for path in params if submodule_of(path) in PARTS[1:]}
  assert router - moved == {path for path in router if path.startswith(UNUSED)}


def test_a_model_without_a_router_has_no_parameters_of_one(source):
  plain = define(lambda rngs: InternVL(dataclasses.replace(source.config, flash=None), rngs=rngs))
  more = source.model.shapes.keys() - plain.shapes.keys()
  assert more == {path for path in source.model.shapes if submodule_of(path) in PARTS}
  assert trainable_paths(ModelArguments(), source.model.shapes) == trainable_paths(
    ModelArguments(), plain.shapes
  )


# --- What is refused ----------------------------------------------------------------------------------------


def test_the_hf_layout(folder, tmp_path):
  with pytest.raises(UserError, match=r"the hf layout has no form for InternVL3\.5-Flash"):
    convert(str(folder), tmp_path / "hf", HF, lora="merge")
  assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
  ("entries", "words"),
  [
    ({"flash_mode": False}, "flash_relative_threshold=0.3 without flash_mode"),
    ({"flash_relative_threshold": None}, "the entry flash_relative_threshold is missing"),
    ({"flash_absolute_threshold": 1.5}, "flash_absolute_threshold=1.5 is not supported"),
    ({"select_layer": -2}, "InternVL3.5-Flash reads the last one"),
    (
      {"force_image_size": 42},
      "not a multiple of 4 times the ViT's patch_size=7, as InternVL3.5-Flash needs it to compress a tile; use 56",
    ),
    ({"vision_config__hidden_size": 24}, "does not divide into the 16 heads"),
  ],
)
def test_entries_that_do_not_fit(tmp_path, entries, words):
  folder = tmp_path / "model"
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(flash.config()))
  edit_config(folder, **entries)
  with pytest.raises(UserError) as error:
    open_source(folder, with_weights=False)
  assert words in str(error.value) and "\n" not in str(error.value)


def test_tensors_that_do_not_fit(folder, tmp_path):
  def changed(name, change, **entries):
    path = flash.write_checkpoint(tmp_path / name)
    edit(path, change)
    edit_config(path, **entries)
    return path

  missing = changed("missing", lambda tensors: tensors.pop("mlp2.7.bias"))
  refused(
    missing, "InternVL3.5-Flash (flash_mode), but its router's tensors do not fit: missing: mlp2.7.bias"
  )
  shape = changed("shape", lambda tensors: tensors.update({"gating.gate.1.bias": np.zeros(3, "f4")}))
  refused(shape, "mis-shaped: gating.gate.1.bias is (3,), expected (2,)")
  more = changed("more", lambda tensors: tensors.update({"gating.mlp1.0.weight": np.zeros(3, "f4")}))
  refused(more, "left over: gating.mlp1.0.weight")


def test_a_tile_of_another_size_is_refused_where_it_cannot_be_merged_twice(folder):
  with pytest.raises(UserError, match=r"data\.force_image_size=70 is not a multiple of 4 times"):
    open_source(folder, Changes(image_size=70))
