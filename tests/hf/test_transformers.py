"""transformers opens what is written in the hf layout, and computes, decodes and tokenizes the same."""

import shutil

import numpy as np
import pytest

from internvl_jax import verification
from internvl_jax.batch import PIXEL_STATISTICS
from internvl_jax.conversion import convert
from internvl_jax.eval.greedy import GreedyDecoder, Prompt
from internvl_jax.hf.model import open_source
from internvl_jax.hf.model_config import HF, INTERNVL
from internvl_jax.hf.tokenizer import load_tokenizer
from internvl_jax.models.internvl import Execution
from tests.support import families
from tests.support.toy import ASSETS, CURVE, REPOSITORY

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

NEW_TOKENS = 12
STOP = 2  # <|im_end|>


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """A function from a model's name to (where it came from, what was written of it in the hf layout)."""
  root = tmp_path_factory.mktemp("exported")

  def start(name):
    if name == "curve":
      return CURVE / "init"
    folder = root / f"{name}_start"
    if name == "internlm2":  # Recorded without a tokenizer, which conversions need.
      shutil.copytree(ASSETS / "internlm2", folder)
      shutil.copytree(families.TOKENIZER, folder, dirs_exist_ok=True)
      return folder
    hf = families.write_checkpoint(name, folder)
    convert(str(hf), root / f"{name}_internvl", INTERNVL, lora="merge")
    return root / f"{name}_internvl"

  made = {}

  def folders(name):
    if name not in made:
      source = start(name)
      convert(str(source), root / name, HF, lora="merge")
      made[name] = source, root / name
    return made[name]

  return folders


def opened(folder):
  """transformers' model of a folder, which must fit it key by key."""
  from transformers import InternVLForConditionalGeneration

  model, info = InternVLForConditionalGeneration.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
  )
  assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= info.keys()
  assert not any(info.values()), info
  return model.eval()


MODELS = ("curve", "qwen3", "gpt_oss", "phi3_long", "qwen3_moe", "tied", "internlm2")


@pytest.mark.parametrize("name", MODELS)
def test_opens_and_computes_the_same(name, exported):
  before, written = exported(name)
  model, source = opened(written), open_source(before)
  vocab_size, side = source.config.text.vocab_size, source.config.vision.image_size
  inputs = families.inputs(vocab_size, side)
  names = ("input_ids", "pixel_values", "attention_mask", "labels")
  with torch.no_grad():
    theirs = model(**{name: torch.tensor(inputs[name]) for name in names})
  positions = np.broadcast_to(np.arange(families.LENGTH), inputs["input_ids"].shape)
  ours = verification.run(source.model, verification.load(source), {**inputs, "position_ids": positions})
  np.testing.assert_allclose(ours["logits"], theirs.logits.numpy(), rtol=0, atol=2e-4)
  np.testing.assert_allclose(ours["loss"], theirs.loss.item(), rtol=0, atol=1e-5)


def test_internlm2_computes_in_transformers_what_was_recorded_of_the_reference(exported):
  _, written = exported("internlm2")
  model, recorded = opened(written), np.load(ASSETS / "internlm2/io.npz")
  model.config.image_token_id = int(recorded["image_token_id"])
  mask = recorded["attention_mask"]
  with torch.no_grad():
    out = model(
      input_ids=torch.tensor(recorded["input_ids"]),
      pixel_values=torch.tensor(recorded["pixel_values"][recorded["image_flags"].reshape(-1) > 0]),
      attention_mask=torch.tensor(mask),
    )
  # Padded tokens have other positions there.
  np.testing.assert_allclose(out.logits.numpy()[mask > 0], recorded["logits"][mask > 0], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["curve", "gpt_oss", "internlm2"])
def test_greedy_answers(name, exported):
  before, written = exported(name)
  model, source = opened(written), open_source(before)
  side = source.config.vision.image_size
  tiles = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
  ids = families.inputs(source.config.text.vocab_size)["input_ids"][:1]
  decoder = GreedyDecoder(
    model=source.model,
    how=Execution(),
    normalize_type="imagenet",
    image_token_id=families.IMAGE_TOKEN,
    stop_ids=(STOP,),
    max_new_tokens=NEW_TOKENS,
    batch_size=1,
  )
  (ours,) = decoder(verification.load(source), [Prompt(ids[0], tiles)])
  mean, std = PIXEL_STATISTICS["imagenet"]
  pixels = ((tiles / 255 - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2).astype(np.float32)
  out = model.generate(
    input_ids=torch.tensor(ids),
    attention_mask=torch.ones(ids.shape, dtype=torch.long),
    pixel_values=torch.tensor(pixels),
    max_new_tokens=NEW_TOKENS,
    do_sample=False,
    eos_token_id=STOP,
    pad_token_id=0,
  )
  theirs = out[0, ids.shape[1] :].numpy()
  assert ours.tolist() == theirs[theirs != STOP].tolist()
  assert len(set(ours.tolist())) > 2


def test_tokenizer(exported):
  from transformers import AutoTokenizer

  before, written = exported("curve")
  ours, theirs = load_tokenizer(before), AutoTokenizer.from_pretrained(written)
  text = (
    "<|im_start|>user\n<img><IMG_CONTEXT></img>\nWhat is 3 + 4? <box>[[1, 2]]</box><|im_end|>\n 中文 naïve"
  )
  ids = ours(text).input_ids
  assert theirs(text).input_ids == ids and ids.count(families.IMAGE_TOKEN) == 1
  assert theirs.decode(ids) == ours.decode(ids)
  # The names by which transformers' processor finds the image tokens.
  assert theirs.context_image_token_id == families.IMAGE_TOKEN
  found = (theirs.start_image_token_id, theirs.end_image_token_id)
  assert found == tuple(ours.convert_tokens_to_ids(["<img>", "</img>"]))


def test_processor(exported):
  """Text and image through transformers' own processor and model."""
  pytest.importorskip("torchvision")  # which its processor of videos needs
  from PIL import Image
  from transformers import AutoProcessor

  before, written = exported("curve")
  processor, source = AutoProcessor.from_pretrained(written), open_source(before)
  image = Image.fromarray(np.zeros((56, 56, 3), np.uint8))
  batch = processor(images=image, text="<IMG_CONTEXT>\nWhat?", return_tensors="pt")
  count = int((batch["input_ids"] == families.IMAGE_TOKEN).sum())
  assert count == len(batch["pixel_values"]) * source.config.tokens_per_tile
  with torch.no_grad():
    assert opened(written)(**batch).logits.isfinite().all()


@pytest.mark.parametrize("case", ["llama", "qwen3_moe"])
def test_the_recordings_are_what_transformers_computes(case, tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
  record_families = pytest.importorskip("record_families")
  now = record_families.record(families.write_checkpoint(case, tmp_path / case))
  recorded = np.load(families.RECORDINGS / f"{case}.npz")
  assert now.keys() == set(recorded)
  assert now["names"].tolist() == recorded["names"].tolist()
  np.testing.assert_allclose(now["logits"], recorded["logits"], rtol=0, atol=1e-5)
  np.testing.assert_allclose(now["loss"], recorded["loss"], rtol=0, atol=1e-6)
  np.testing.assert_allclose(now["norms"], recorded["norms"], rtol=1e-4, atol=1e-7)
