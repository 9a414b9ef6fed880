"""Every language model family computes what transformers recorded, and no conversion changes a bit of it."""

import shutil
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from internvl_jax import verification
from internvl_jax.adapters import probe
from internvl_jax.conversion import convert
from internvl_jax.errors import UserError
from internvl_jax.hf import model_config as config_io
from internvl_jax.hf.model import open_source
from internvl_jax.hf.model_config import HF, INTERNVL
from internvl_jax.models.moe import MoEConfig
from internvl_jax.models.rope import DynamicRope, LongRope, Rope, YarnRope
from tests.support import families
from tests.support.toy import ASSETS

# The parameter whose gradient is exactly zero, as a softmax does not see what all its scores share; a program's
# float32 leaves noise. Language models turn keys by their positions, so that their biases do matter.
ZERO_GRADIENT = ".attention.k_proj.bias"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A function from a case's name to its checkpoint, which is written once."""
  root = tmp_path_factory.mktemp("checkpoints")

  def folder(case):
    path = root / case
    return path if path.exists() else families.write_checkpoint(case, path)

  return folder


@pytest.mark.parametrize("case", families.CASES)
def test_equals_the_recording(case, checkpoint):
  theirs = np.load(families.RECORDINGS / f"{case}.npz")
  source = open_source(checkpoint(case))
  assert source.config.text.tie_word_embeddings == (case == "tied")
  inputs = verification.with_positions(source, families.inputs())
  ours, grads = verification.run_with_gradients(source.model, verification.load(source), inputs)
  np.testing.assert_allclose(ours["logits"], theirs["logits"], rtol=0, atol=2e-4)
  np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=0, atol=1e-5)

  norms = families.gradient_norms(source, grads)
  expected = dict(zip(theirs["names"].tolist(), theirs["norms"].tolist(), strict=True))
  assert norms.keys() == expected.keys()
  total = float(theirs["grad_norm"])
  np.testing.assert_allclose(np.linalg.norm(list(norms.values())), total, rtol=1e-4)
  for key, norm in norms.items():
    if key.endswith(ZERO_GRADIENT):
      assert max(norm, expected[key]) < 1e-8 * total, key
    else:
      np.testing.assert_allclose(norm, expected[key], rtol=1e-3, atol=1e-9, err_msg=key)


# --- Conversions --------------------------------------------------------------------------------------------


def converted(folder, target, layout):
  convert(str(folder), target, layout, lora="merge", dtype=jnp.float32)
  return target


def assert_same_tensors(folder, other):
  ours, theirs = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
  assert ours.keys() == theirs.keys()
  for key, tensor in ours.items():
    assert tensor.dtype == theirs[key].dtype == np.float32
    np.testing.assert_array_equal(tensor, theirs[key], err_msg=key)


def logits(folder):
  source = open_source(folder)
  return probe(source, verification.load(source))


@pytest.mark.parametrize("case", families.CASES)
def test_round_trip(case, checkpoint, tmp_path):
  """hf -> internvl -> hf -> internvl: one model, the same logits, and the same file again in each layout."""
  start = checkpoint(case)
  internvl = converted(start, tmp_path / "internvl", INTERNVL)
  back = converted(internvl, tmp_path / "hf", HF)
  again = converted(back, tmp_path / "again", INTERNVL)
  assert_same_tensors(back, start)
  assert_same_tensors(again, internvl)
  sources = [open_source(folder) for folder in (start, internvl, back, again)]
  assert [source.layout for source in sources] == [HF, INTERNVL, HF, INTERNVL]
  for source in sources[1:]:
    assert source.config == sources[0].config
  np.testing.assert_array_equal(logits(internvl), logits(start))


@pytest.fixture(scope="module")
def internlm2(tmp_path_factory):
  """The recorded InternLM2 with a tokenizer, which conversions need."""
  folder = tmp_path_factory.mktemp("internlm2") / "model"
  shutil.copytree(ASSETS / "internlm2", folder)
  shutil.copytree(families.TOKENIZER, folder, dirs_exist_ok=True)
  return folder


def test_internlm2_is_stored_as_llama_in_the_hf_layout(internlm2, tmp_path):
  again = converted(internlm2, tmp_path / "internvl", INTERNVL)
  assert_same_tensors(again, internlm2)
  assert open_source(again).config == open_source(internlm2).config
  llama = converted(internlm2, tmp_path / "hf", HF)
  text = config_io.read_config(llama)["text_config"]
  assert (text["model_type"], text["architectures"]) == ("llama", ["LlamaForCausalLM"])
  # Three products in place of one: their sums may be added up in another order.
  np.testing.assert_allclose(logits(llama), logits(internlm2), rtol=0, atol=1e-6)
  # And as LLaMA it moves between the layouts like any other.
  internvl = converted(llama, tmp_path / "llama", INTERNVL)
  assert_same_tensors(converted(internvl, tmp_path / "back", HF), llama)


# --- InternLM3, which transformers lacks --------------------------------------------------------------------


def as_internlm3(folder, target, **entries):
  """A copy of an internvl checkpoint that says of itself, in InternLM3's words, what it is."""
  shutil.copytree(folder, target)
  config = config_io.read_config(target)
  text = config["llm_config"]
  kept = [name for name in text if name.endswith("_size") or name.startswith(("num_", "max_position"))]
  config["llm_config"] = {
    **{name: text[name] for name in kept},
    "architectures": ["InternLM3ForCausalLM"],
    "model_type": "internlm3",
    "hidden_act": "silu",
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "bias": False,
    **entries,
  }
  families.write_config(target, config)
  return target


def test_internlm3_equals_llama(checkpoint, tmp_path):
  llama = converted(checkpoint("llama_dynamic"), tmp_path / "llama", INTERNVL)
  scaling = {"type": "dynamic", "factor": 2.0}
  internlm3 = as_internlm3(
    llama, tmp_path / "internlm3", qkv_bias=False, rope_scaling=scaling, rope_theta=10000.0
  )
  source = open_source(internlm3)
  assert source.raw["llm_config"]["model_type"] == "internlm3"
  assert source.config.text.rope == DynamicRope(theta=10000.0, factor=2.0, trained_length=16)
  assert source.config == open_source(llama).config
  np.testing.assert_array_equal(logits(internlm3), logits(llama))
  # In the hf layout it is the LLaMA that this began with.
  back = converted(internlm3, tmp_path / "back", HF)
  assert_same_tensors(back, checkpoint("llama_dynamic"))
  assert open_source(back).config == open_source(checkpoint("llama_dynamic")).config


def test_internlm3_with_biases_of_q_k_v_equals_qwen2(checkpoint, tmp_path):
  qwen2 = converted(checkpoint("qwen2"), tmp_path / "qwen2", INTERNVL)
  internlm3 = as_internlm3(qwen2, tmp_path / "internlm3", qkv_bias=True, rope_scaling=None)
  assert open_source(internlm3).config == open_source(qwen2).config
  np.testing.assert_array_equal(logits(internlm3), logits(qwen2))
  # LLaMA has biases on all four projections or on none.
  with pytest.raises(UserError, match="qkv_bias=True and bias=False; write the internvl layout"):
    converted(internlm3, tmp_path / "hf", HF)
  assert not (tmp_path / "hf").exists()


# --- Names and configs of other releases --------------------------------------------------------------------


@pytest.mark.parametrize("case", ["qwen3_moe", "tied"])
def test_names_of_the_modules_in_memory(case, checkpoint, tmp_path):
  """Keys with the prefix `model.` and a bare lm_head."""
  start, folder = checkpoint(case), tmp_path / "renamed"
  shutil.copytree(start, folder)
  tensors = {HF.module(key): tensor for key, tensor in load_file(start / "model.safetensors").items()}
  assert ("lm_head.weight" in tensors) == (case != "tied")
  assert all(key.startswith("model.") for key in tensors if key != "lm_head.weight")
  save_file(tensors, folder / "model.safetensors")
  ours, theirs = (verification.load(open_source(path)) for path in (folder, start))
  assert ours.keys() == theirs.keys()
  for path, value in ours.items():
    np.testing.assert_array_equal(value, theirs[path], err_msg=path)


def read(case, *, layout=HF, **entries):
  """The language model that a case's config describes with some entries changed, None: left out."""
  config = families.config_of(case)
  text = {**config.pop("text_config"), **entries}
  text = {name: value for name, value in text.items() if value is not None}
  return config_io.decoder_config(layout.text, text)


def test_number_of_experts_under_both_names():
  for case in ("qwen3_moe", "gpt_oss"):
    expected = read(case)
    assert expected.experts.num_experts == 4
    assert read(case, num_local_experts=None, num_experts=4) == expected
  assert read("qwen3_moe").experts == MoEConfig(
    num_experts=4, top_k=2, intermediate_size=16, normalize_top_k=True
  )


@pytest.mark.parametrize("name", ["type", "rope_type"])
def test_rope_under_the_old_names(name):
  def old(case, scaling, **entries):
    return read(case, rope_parameters=None, rope_scaling=scaling, **entries).rope

  dynamic = {name: "dynamic", "factor": 2.0}
  expected = DynamicRope(theta=5e5, factor=2.0, trained_length=16)
  assert old("llama_dynamic", dynamic, rope_theta=5e5) == expected
  assert old("llama_dynamic", dynamic, rope_theta=10000) == read("llama_dynamic").rope
  assert old("qwen2", None, rope_theta=1000000) == Rope(theta=1e6)
  # Phi-3 says "su" and has the trained length beside the scaling.
  phi3 = families.config_of("phi3_long")["text_config"]["rope_parameters"]
  su = {name: "su", "short_factor": phi3["short_factor"], "long_factor": phi3["long_factor"]}
  assert old("phi3_long", su, rope_theta=10000.0) == read("phi3_long").rope
  assert isinstance(read("phi3_long").rope, LongRope) and read("phi3_long").rope.stretch == 4.0


def test_rope_entries_that_are_left_out_are_the_familys():
  yarn = {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
  rope = read("gpt_oss", rope_parameters=None, rope_scaling=yarn).rope
  assert rope == YarnRope(theta=150000.0, factor=32.0, trained_length=4096, truncate=False)
  # Nothing about it at all: gpt-oss has this scaling by itself.
  assert read("gpt_oss", rope_parameters=None).rope == rope
  assert read("gpt_oss", rope_parameters=None, rope_theta=1e4).rope == replace(rope, theta=1e4)
  assert read("qwen2", rope_parameters=None).rope == Rope(theta=10000.0)
  # Null is a statement too.
  text = {**families.config_of("gpt_oss")["text_config"], "rope_scaling": None}
  del text["rope_parameters"]
  assert config_io.decoder_config("text_config", text).rope == Rope(theta=150000.0)


def test_rope_parameters_count_beside_an_old_theta():
  assert read("llama", rope_theta=5e5) == read("llama")


def test_scale_of_longrope():
  rope = families.config_of("phi3_long")["text_config"]["rope_parameters"]
  assert read("phi3_long").rope.scale == pytest.approx((1 + np.log(4) / np.log(16)) ** 0.5)
  stretched = read("phi3_long", rope_parameters={**rope, "factor": 8.0}).rope
  assert stretched.scale == pytest.approx((1 + np.log(8) / np.log(16)) ** 0.5)
  assert read("phi3_long", rope_parameters={**rope, "attention_factor": 1.25}).rope.scale == 1.25


def test_a_theta_in_one_place_survives_the_way_to_the_internvl_layout():
  config = families.config_of("llama_dynamic")
  text = config["text_config"]
  text |= {"rope_theta": 5e5, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}
  model = config_io.model_config(config)
  assert model.text.rope.theta == 5e5
  written = config_io.written_config(config, model, INTERNVL, dtype="float32", image_token_id=5)
  assert config_io.model_config(written) == model


@pytest.mark.parametrize(
  "entries",
  [
    {"partial_rotary_factor": 0.75},
    {"rope_scaling": {"type": "mrope", "mrope_section": [1]}},
    {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7, "mscale_all_dim": 1.0}},
  ],
)
def test_a_rope_that_would_be_ignored_is_refused(entries):
  with pytest.raises(UserError, match="not supported"):
    read("qwen2", **entries)


def test_configs_that_omit_defaults(tmp_path):
  """Early configs of the hf layout hold what differs from the defaults, and sizes as a number or as two."""
  text = {"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14}
  text |= {"num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151674, "max_window_layers": 21}
  raw = {"model_type": "internvl", "text_config": text, "vision_config": {"attention_bias": True}}
  families.write_config(tmp_path, raw)
  source = open_source(tmp_path, with_weights=False)
  vision, decoder = source.config.vision, source.config.text
  assert (vision.hidden_size, vision.num_layers, vision.num_heads, vision.patch_size) == (1024, 24, 16, 14)
  assert (vision.image_size, vision.norm_type, vision.layer_norm_eps) == (448, "layer_norm", 1e-6)
  assert source.config.tokens_per_tile == 256
  assert (decoder.head_dim, decoder.rms_norm_eps, decoder.rope) == (64, 1e-6, Rope(theta=10000.0))
  for size in (448, [448, 448]):
    other = {**raw, "vision_config": {"attention_bias": True, "image_size": size, "patch_size": 14}}
    assert config_io.model_config(other) == config_io.model_config(raw)
  with pytest.raises(UserError, match="only squares"):
    config_io.model_config({**raw, "vision_config": {"image_size": [448, 224]}})


def test_transformers_reads_the_same_from_what_is_left_out():
  """The defaults of the vision config are transformers' own; so are those of each family."""
  from transformers import InternVLConfig

  raw = {"model_type": "internvl", "vision_config": {}, "text_config": {"model_type": "qwen2"}}
  full = InternVLConfig().to_dict()
  assert full["text_config"]["model_type"] == "qwen2"
  ours, theirs = config_io.model_config(raw), config_io.model_config(full)
  assert replace(ours, vision=theirs.vision) == theirs
  assert ours.vision == theirs.vision
