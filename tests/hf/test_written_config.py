"""A config.json that is written describes the model that it was written for, where settings are not the defaults."""

import dataclasses

import pytest

from internvl_jax.hf import model_config
from internvl_jax.hf.model_config import HF, INTERNVL
from tests.support import families


def written(layout, **changes):
  config = families.config_of("qwen2")
  model = model_config.model_config(config)
  vision = dataclasses.replace(model.vision, image_size=56)
  model = dataclasses.replace(model, vision=vision, **changes)
  # Through the other layout and back: what one way drops is lost.
  for target in (INTERNVL, HF, layout):
    config = model_config.written_config(config, model, target, dtype="bfloat16", image_token_id=7)
  return config, model


@pytest.mark.parametrize("layout", [INTERNVL, HF], ids=lambda layout: layout.name)
@pytest.mark.parametrize(
  "changes", [{"select_layer": -2}, {"select_layer": 1}, {"downsample_ratio": 0.25}], ids=str
)
def test_the_model_is_read_back(layout, changes):
  config, model = written(layout, **changes)
  assert model_config.model_config(config) == model
  assert model.tokens_per_tile == (16 if "select_layer" in changes else 4)


def test_entries_by_their_names():
  internvl, _ = written(INTERNVL, select_layer=-3)
  assert (internvl["select_layer"], internvl["force_image_size"], internvl["ps_version"]) == (-3, 56, "v2")
  assert internvl["torch_dtype"] == "bfloat16" and internvl["vision_config"]["image_size"] == 56
  hf, _ = written(HF, select_layer=-3)
  assert (hf["vision_feature_layer"], hf["image_seq_length"], hf["image_token_id"]) == (-3, 16, 7)
  assert hf["dtype"] == hf["text_config"]["dtype"] == "bfloat16"
  assert hf["vision_config"]["image_size"] == [56, 56]


@pytest.mark.parametrize("tied", [True, False])
def test_whether_embeddings_are_tied_is_said_at_both_levels(tied):
  """By transformers' text_config and by the reference's llm_config, and at the top by both; the tensors decide."""
  config = families.config_of("qwen2")
  model = model_config.model_config(config)
  model = dataclasses.replace(model, text=dataclasses.replace(model.text, tie_word_embeddings=tied))
  for layout in (INTERNVL, HF):
    config = model_config.written_config(config, model, layout, dtype="float32", image_token_id=7)
    assert config["tie_word_embeddings"] is config[layout.text]["tie_word_embeddings"] is tied
