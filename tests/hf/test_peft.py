"""PEFT reads our adapters and we read PEFT's, with the same numbers and gradients."""

import dataclasses

import jax
import numpy as np
import pytest

from internvl_jax import verification
from internvl_jax.hf import peft as adapters_io
from internvl_jax.hf.model import Changes, open_source
from internvl_jax.hf.weights import names_of
from internvl_jax.models.lora import LoRASpec, adapter_paths
from tests.support import families

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.torch

# Our ViT has q, k and v in one map, so adapters of each apart have no place in it.
TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj|.*vision_tower.*\.(projection_layer|fc1|fc2)"
PLACE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  return families.write_checkpoint("qwen2", tmp_path_factory.mktemp("base") / "model")


def open_in_torch(folder):
  from transformers import InternVLForConditionalGeneration

  return InternVLForConditionalGeneration.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  )


def run_in_torch(model, inputs):
  names = ("input_ids", "pixel_values", "attention_mask", "labels")
  out = model.eval()(**{name: torch.tensor(inputs[name]) for name in names})
  out.loss.backward()
  return out.logits.detach().numpy(), out.loss.item()


def run_ours(source, inputs):
  positions = np.broadcast_to(np.arange(families.LENGTH), inputs["input_ids"].shape)
  params = source.load(source.model.shapes, dict.fromkeys(source.model.shapes, PLACE))
  return params, *verification.run_with_gradients(source.model, params, {**inputs, "position_ids": positions})


def assert_same(source, model, inputs):
  """Logits, loss, and the gradient norm of every adapter parameter, found by PEFT's own names."""
  logits, loss = run_in_torch(model, inputs)
  params, ours, grads = run_ours(source, inputs)
  real = inputs["attention_mask"] > 0
  np.testing.assert_allclose(ours["logits"][real], logits[real], rtol=0, atol=2e-4)
  np.testing.assert_allclose(ours["loss"], loss, rtol=0, atol=1e-5)
  theirs = {
    name.replace(".default.weight", "").replace(".default", ""): float(param.grad.norm())
    for name, param in model.named_parameters()
    if "lora_" in name
  }
  compared = set()
  for path in adapter_paths(params):
    names = names_of(path, params[path].shape, source.table)
    for cell in np.ndindex(*names.keys.shape[:-1]):
      name = "base_model.model." + source.layout.module(names.keys[cell][0]).removesuffix(".weight")
      np.testing.assert_allclose(np.linalg.norm(grads[path][cell]), theirs[name], rtol=1e-3, err_msg=name)
      compared.add(name)
  assert compared == set(theirs) and len(compared) > 20


OPTIONS = [{}, {"use_rslora": True}, {"use_dora": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_adapter_of_peft(tmp_path, base, options):
  torch.manual_seed(0)
  config = peft.LoraConfig(
    r=3,
    lora_alpha=5.0,
    lora_dropout=0.1,
    target_modules=TARGETS,
    rank_pattern={r"model\.vision_tower\..*": 2},
    alpha_pattern={r"model\.vision_tower\..*": 7.0},
    **options,
  )
  model = peft.get_peft_model(open_in_torch(base), config)
  with torch.no_grad():
    for name, param in model.named_parameters():
      if "lora_" in name:
        param.add_(0.1 * torch.randn(param.shape))
  model.save_pretrained(tmp_path)
  settings = tmp_path / "adapter_config.json"
  settings.write_text(
    settings.read_text().replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{base}"')
  )
  source = open_source(tmp_path)
  assert source.specs["language_model"].rank == 3 and source.specs["vision_model"].rank == 2
  assert source.specs["vision_model"].alpha == 7.0
  assert_same(source, model, families.inputs(source.config.text.vocab_size, source.config.vision.image_size))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_our_adapter_in_peft(tmp_path, base, options):
  text = LoRASpec(rank=3, alpha=5.0, dropout=0.1, **options)
  vision = dataclasses.replace(text, rank=2, alpha=6.0, targets=("proj", "fc1", "fc2"))
  source = open_source(base, Changes(text_lora=text, vision_lora=vision))
  params = source.load(source.model.shapes, dict.fromkeys(source.model.shapes, PLACE), seed=1)
  rng = np.random.default_rng(0)
  params = {
    path: value + 0.1 * rng.normal(size=value.shape).astype("f4") if path.endswith(".b") else value
    for path, value in params.items()
  }
  adapters_io.save_adapter(tmp_path, params, source.specs, source.layout, source.table, base=str(base))
  model = peft.PeftModel.from_pretrained(open_in_torch(base), tmp_path, is_trainable=True)
  again = open_source(tmp_path)
  assert_same(again, model, families.inputs(source.config.text.vocab_size, source.config.vision.image_size))
