"""Weight decay falls on what the reference's optimizer decays, family by family."""

import json

import jax
import numpy as np
import pytest

from internvl_jax.batch import IGNORE_INDEX, NO_IMAGE, TokenBatch
from internvl_jax.config import TrainConfig
from internvl_jax.hf import published
from internvl_jax.hf.families import FAMILIES
from internvl_jax.hf.model import open_source, source_of_config
from internvl_jax.hf.weights import names_of
from internvl_jax.optim.labels import decays
from internvl_jax.setup.devices import open_mesh
from internvl_jax.setup.step import set_up
from tests.support import families
from tests.support.toy import ASSETS

RECORDED = json.loads((ASSETS / "decay_llama.json").read_text())

_LAYER = "language_model.model.layers.0."
_LAST = "language_model.model.norm"
_VIT = "vision_model.encoder.layers.0."
_VIT_NORMS = {f"{_VIT}norm1", f"{_VIT}norm2"}

# Published size -> its language model, and its norms that do decay, of those of the first layers and outside. The ViT
# of 6B has RMS norms, that of 300M has PyTorch's LayerNorm, as the projector has.
DECAYED_NORMS = {
  "2.5-1b": ("qwen2", {_LAST}),
  "2.5-2b": ("internlm2", {f"{_LAYER}attention_norm", f"{_LAYER}ffn_norm", _LAST}),
  "2-4b": ("phi3", {_LAST}),
  "2-40b": ("llama", _VIT_NORMS | {f"{_VIT}attn.q_norm", f"{_VIT}attn.k_norm"}),
  "3-9b": ("internlm3", set()),
  "3.5-1b": ("qwen3", set()),
  "3.5-38b": ("qwen3", _VIT_NORMS),
  "3.5-30b-a3b": ("qwen3_moe", set()),
  "3.5-20b-a4b": ("gpt_oss", set()),
}


def test_every_family_is_in_the_table():
  assert {family for family, _ in DECAYED_NORMS.values()} == set(FAMILIES)


@pytest.mark.parametrize("size", DECAYED_NORMS)
def test_norms_that_decay(size):
  source = source_of_config(published.config_of(size))
  family, expected = DECAYED_NORMS[size]
  assert source.raw["llm_config"]["model_type"] == family
  names = source.reference_names
  decayed = {names[path] for path, does in decays(names, source.undecayed).items() if does}
  norms = {name for path, name in names.items() if path.endswith(".scale")}
  assert {name.removesuffix(".weight") for name in norms & decayed} == expected
  assert not [name for name in decayed if "bias" in name]
  # All else decays: maps, tables, layer scales.
  assert {name for name in names.values() if "bias" not in name} - norms <= decayed


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
  return open_source(families.write_checkpoint("llama", tmp_path_factory.mktemp("llama") / "model"))


def test_llamas_decayed_names_are_the_recorded_ones(llama):
  decayed = set()
  for path, does in decays(llama.reference_names, llama.undecayed).items():
    keys = names_of(path, llama.model.shapes[path].shape, llama.table).keys.reshape(-1)
    decayed |= set(keys) if does else set()
  assert decayed == set(RECORDED["decayed"])


def test_llama_follows_the_recorded_curve(llama):
  """16 steps at a decay of 0.5; where the last norm decays as well, the loss is 0.05 higher at the end."""
  config = TrainConfig()
  config.training.weight_decay, config.training.max_grad_norm = RECORDED["weight_decay"], 0.0
  config.model.grad_checkpoint = False
  mesh = open_mesh(config, jax.devices()[:1])
  setup = set_up(config, llama, mesh)
  state, frozen = setup.create_state(llama.load(setup.shapes, setup.places.params)), {}
  step = jax.jit(setup.step.__call__, donate_argnums=0)
  losses = []
  for _ in RECORDED["loss"]:
    state, metrics = step(state, frozen, batch(), np.float32(RECORDED["learning_rate"]))
    losses.append(float(metrics.loss))
  np.testing.assert_allclose(losses, RECORDED["loss"], rtol=0, atol=1e-4)
  assert max(np.abs(np.subtract(losses, RECORDED["loss_by_names_alone"]))) > 2e-2


def batch():
  """The recording's two rows."""
  arrays = families.inputs()
  ids, mask = arrays["input_ids"][None].astype(np.int32), arrays["attention_mask"][None].astype(np.int32)
  targets = np.pad(arrays["labels"][None, :, 1:], ((0, 0), (0, 0), (0, 1)), constant_values=IGNORE_INDEX)
  is_image = ids == families.IMAGE_TOKEN
  places = np.cumsum(is_image.reshape(-1)).reshape(ids.shape) - 1
  return TokenBatch(
    input_ids=ids,
    targets=targets.astype(np.int32),
    loss_weight=(targets != IGNORE_INDEX).astype(np.float32),
    positions=np.broadcast_to(np.arange(ids.shape[-1], dtype=np.int32), ids.shape) * mask,
    segment_ids=mask,
    image_index=np.where(is_image, places, NO_IMAGE).astype(np.int32),
    tiles=families.tiles()[None, None],
  )


def test_names_are_compared_in_lower_case():
  """As transformers compares them: what a module of somebody's is called may have capitals."""
  names = {"first": "model.LayerNorm.weight", "second": "model.proj.weight"}
  assert decays(names, "layernorm") == {"first": False, "second": True}
