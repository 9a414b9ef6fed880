"""A new vision tower is a file and a line: SigLIP, put into a package of its own, is read, trained and written."""

import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from internvl_jax.arguments import TrainingArguments
from internvl_jax.errors import UserError
from internvl_jax.hf import model_config as layouts
from internvl_jax.hf import saving, towers
from internvl_jax.hf.model import Changes, open_source
from internvl_jax.models.internvl import Execution, InternVLConfig
from tests.support import families
from tests.support.harness import Harness, make_batch, toy

VISION = {
  "model_type": "siglip_vision_model",
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 3,
  "num_attention_heads": 2,
  "image_size": 28,
  "patch_size": 7,
}


@pytest.fixture
def siglip(tmp_path, monkeypatch):
  """The tower's file in a package away from ours, and its line in the registry."""
  package = tmp_path / "site" / "other_towers"
  package.mkdir(parents=True)
  text = (Path(__file__).parents[1] / "support/siglip_tower.py").read_text()
  (package / "siglip.py").write_text(text)
  monkeypatch.syspath_prepend(tmp_path / "site")
  module = importlib.import_module("other_towers.siglip")
  monkeypatch.setattr(towers, "TOWERS", [*towers.TOWERS, module.TOWER])
  yield module
  for name in ("other_towers.siglip", "other_towers"):
    sys.modules.pop(name)


@pytest.fixture
def checkpoint(siglip, tmp_path):
  folder = tmp_path / "model"
  folder.mkdir()
  families.write_config(folder, families.config_of("qwen2") | {"vision_config": VISION})
  shapes = families.tensor_shapes(open_source(folder, with_weights=False))
  saving.save(folder, ((key, families.tensor(key, shape)) for key, shape in shapes.items()))
  return folder


def load(source):
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return source.load(source.model.shapes, dict.fromkeys(source.model.shapes, device))


def encode(tensors, pixels, layers):
  """SigLIP's last hidden state [I, P, C] of pixels [I, 3, side, side], written down once more in numpy."""
  get = lambda name: tensors[f"vision_tower.vision_model.{name}"]  # noqa: E731
  I, _, side, _ = pixels.shape
  p = VISION["patch_size"]
  n = side // p
  cut = pixels.reshape(I, 3, n, p, n, p).transpose(0, 2, 4, 1, 3, 5).reshape(I, n * n, 3 * p * p)
  kernel = get("embeddings.patch_embedding.weight").reshape(-1, 3 * p * p)
  x = cut @ kernel.T + get("embeddings.patch_embedding.bias") + get("embeddings.position_embedding.weight")

  def norm(x, name):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * get(f"{name}.weight") + get(f"{name}.bias")

  def linear(x, name):
    return x @ get(f"{name}.weight").T + get(f"{name}.bias")

  for i in range(layers):
    layer = f"encoder.layers.{i}"
    y = norm(x, f"{layer}.layer_norm1")
    q, k, v = (linear(y, f"{layer}.self_attn.{name}_proj").reshape(I, n * n, 2, -1) for name in "qkv")
    scores = np.exp(np.einsum("iqhd,ikhd->ihqk", q, k) / np.sqrt(q.shape[-1]))
    mixed = np.einsum("ihqk,ikhd->iqhd", scores / scores.sum(-1, keepdims=True), v).reshape(x.shape)
    x = x + linear(mixed, f"{layer}.self_attn.out_proj")
    y = linear(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    x = x + linear(y, f"{layer}.mlp.fc2")
  return norm(x, "post_layernorm") if layers == VISION["num_hidden_layers"] else x


def test_its_checkpoint_is_read_and_computed(checkpoint):
  pixels = families.draw("pixels", (2, 3, 28, 28))
  tensors = load_file(checkpoint / "model.safetensors")
  for selected, layers in ((-1, 3), (-2, 2)):
    source = open_source(checkpoint, Changes(select_layer=selected))
    model = source.model.bind(load(source))
    found = model.vision_model(jnp.asarray(pixels.transpose(0, 2, 3, 1)), **Execution().scan_options)
    np.testing.assert_allclose(found, encode(tensors, pixels, layers), atol=2e-5)
    assert model.project(found).shape == (2, 4, 32)
  assert source.config.vision.num_tokens == 16, "patches, and no class token"


@pytest.mark.torch
def test_transformers_computes_the_same(checkpoint):
  torch = pytest.importorskip("torch")
  from transformers import SiglipVisionConfig, SiglipVisionModel

  pixels = families.draw("pixels", (2, 3, 28, 28))
  prefix = "vision_tower.vision_model."
  tensors = load_file(checkpoint / "model.safetensors")
  config = SiglipVisionConfig(**VISION, vision_use_head=False, attn_implementation="eager")
  model = SiglipVisionModel(config).eval()
  kept = {key.removeprefix(prefix): torch.tensor(x) for key, x in tensors.items() if key.startswith(prefix)}
  inner = getattr(model, "vision_model", model)  # Releases differ in whether it is wrapped.
  inner.load_state_dict(kept)
  with torch.no_grad():
    theirs = inner(torch.tensor(pixels)).last_hidden_state.numpy()
  np.testing.assert_allclose(encode(tensors, pixels, 3), theirs, atol=2e-5)


def test_it_is_written_as_it_was_read(checkpoint, tmp_path):
  source = open_source(checkpoint)
  table = layouts.HF.table(layouts.family_of(source.raw), source.config)
  saving.save(tmp_path / "again", saving.tensors(load(source), table, np.dtype("f4")))
  before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "again"))
  assert before.keys() == after.keys()
  assert all(np.array_equal(before[key], after[key]) for key in before)
  raw = layouts.written_config(source.raw, source.config, layouts.HF, dtype="float32", image_token_id=5)
  assert raw["vision_config"] == VISION
  written = towers.form_of(source.config.vision, "hf").write(source.config.vision)
  assert layouts.vision_config(written, "hf") == source.config.vision
  with pytest.raises(UserError, match="the internvl layout has no form for SigLIP; write the hf layout"):
    layouts.INTERNVL.table(layouts.family_of(source.raw), source.config)


def test_another_tile_size_resizes_its_positions(checkpoint):
  source = open_source(checkpoint, Changes(image_size=42))
  assert load(source)["vision_model.embeddings.position_embedding"].shape == (36, 16)


def test_a_switch_of_it_that_is_not_followed_is_refused(checkpoint):
  config = families.config_of("qwen2") | {"vision_config": VISION | {"vision_use_head": True}}
  families.write_config(checkpoint, config)
  with pytest.raises(
    UserError, match=r"vision_config\.vision_use_head=True is not supported; expected False"
  ):
    open_source(checkpoint)


def test_it_trains_from_a_layer_on(siglip):
  """A step under drop path; its frozen layers stay, and every other parameter gets a gradient."""
  usual = toy()
  sizes = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 2}
  vision = siglip.SiglipConfig(**sizes, patch_size=4, image_size=16, split=1)
  freeze = {"freeze_backbone": True, "unfreeze_vit_layers": -1, "freeze_llm": True}
  training = TrainingArguments(weight_decay=0.0)
  config = InternVLConfig(vision=vision, text=usual.text)
  harness = Harness(config, freeze=freeze, drop_path=0.1, training=training)
  before = dict(harness.state.params)
  assert {path.split(".")[3] for path in before if path.startswith("vision_model.")} == {"1:2"}
  metrics = harness.run(make_batch())
  assert np.isfinite(metrics.loss) and metrics.grad_norm > 0
  assert all(np.any(harness.state.params[path] != value) for path, value in before.items())


def test_a_tower_that_is_not_registered_is_refused(tmp_path):
  families.write_config(tmp_path, families.config_of("qwen2") | {"vision_config": VISION})
  with pytest.raises(
    UserError, match=r"vision_config\.model_type='siglip_vision_model' is not supported; known"
  ):
    open_source(tmp_path, with_weights=False)
