"""A model made of a ViT, a language model and a projector that stand alone; tokens added, embeddings grown."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from internvl_jax.errors import UserError
from internvl_jax.hf import model_config as layouts
from internvl_jax.hf.export import ModelFiles, save_model
from internvl_jax.hf.model import Changes, open_parts, open_source, with_projector
from internvl_jax.hf.tokenizer import add_image_tokens, load_tokenizer
from tests.support.toy import ASSETS, CURVE

INIT = CURVE / "init"
PLACE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
CHANGES = {"image_size": 56, "downsample_ratio": 0.5, "ps_version": "v2"}


def load(source, seed=0):
  return source.load(source.model.shapes, dict.fromkeys(source.model.shapes, PLACE), seed=seed)


@pytest.fixture(scope="module")
def whole():
  return load_file(INIT / "model.safetensors")


@pytest.fixture
def parts(tmp_path, whole):
  """The curve's model taken apart into three checkpoints."""
  config = json.loads((INIT / "config.json").read_text())
  for name, entry in (("vision_model", "vision_config"), ("language_model", "llm_config")):
    folder = tmp_path / name
    folder.mkdir()
    save_file(
      {key.removeprefix(f"{name}."): value for key, value in whole.items() if key.startswith(f"{name}.")},
      folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(config[entry]))
  for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
    shutil.copyfile(INIT / name, tmp_path / "language_model" / name)
  projector = {key.removeprefix("mlp1."): value for key, value in whole.items() if key.startswith("mlp1.")}
  save_file(projector, tmp_path / "mlp.safetensors")
  return {
    "vision_path": str(tmp_path / "vision_model"),
    "llm_path": str(tmp_path / "language_model"),
    "mlp_path": str(tmp_path / "mlp.safetensors"),
  }


def edit_json(path, **changes):
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_three_parts_are_the_whole(parts):
  source = open_parts(**parts, changes=Changes(**CHANGES))
  expected = load(open_source(INIT))
  found = load(source)
  assert found.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_a_projector_that_is_not_given_is_drawn(parts):
  source = open_parts(**{**parts, "mlp_path": None}, changes=Changes(**CHANGES))
  expected, found, other = load(open_source(INIT)), load(source), load(source, seed=1)
  for path, value in expected.items():
    if not path.startswith("mlp1."):
      np.testing.assert_array_equal(found[path], value, err_msg=path)
    elif path.endswith("kernel"):
      assert np.abs(found[path] - value).max() > 0.01
      assert np.abs(found[path] - other[path]).max() > 0.01
      assert np.std(found[path]) == pytest.approx(value.shape[0] ** -0.5, rel=0.1)


@pytest.mark.parametrize("prefix", ["", "mlp1."])
def test_a_projector_takes_the_place_of_the_checkpoints(tmp_path, whole, prefix):
  rng = np.random.default_rng(0)
  other = {
    prefix + key.removeprefix("mlp1."): rng.normal(size=value.shape).astype("f4")
    for key, value in whole.items()
    if key.startswith("mlp1.")
  }
  save_file(other, tmp_path / "mlp.safetensors")
  found = load(with_projector(open_source(INIT), str(tmp_path / "mlp.safetensors")))
  np.testing.assert_array_equal(found["mlp1.linear_1.kernel"], other[f"{prefix}1.weight"].T)
  np.testing.assert_array_equal(found["mlp1.layer_norm.bias"], other[f"{prefix}0.bias"])
  # Into the hf layout, which has other names for it.
  recorded = with_projector(open_source(ASSETS / "hf_qwen3"), str(tmp_path / "mlp.safetensors"))
  with pytest.raises(UserError, match=r"mis-shaped: multi_modal_projector\.linear_1\.weight"):
    load(recorded)


def test_shared_embeddings_are_untied(parts, tmp_path):
  folder = tmp_path / "language_model"
  tensors = load_file(folder / "model.safetensors")
  del tensors["lm_head.weight"]
  save_file(tensors, folder / "model.safetensors")
  edit_json(folder / "config.json", tie_word_embeddings=True)
  source = open_parts(**parts, changes=Changes(**CHANGES))
  found = load(source)
  assert not source.config.text.tie_word_embeddings
  head = found["language_model.lm_head.kernel"]
  np.testing.assert_array_equal(head, found["language_model.model.embed_tokens.embedding"].T)


@pytest.mark.parametrize("spare", [-3, 0, 20])
def test_embeddings_grow_with_the_tokenizer(parts, tmp_path, spare):
  """Rows for tokens just added: the mean of the others in the output embedding, and in the input embedding
  where the checkpoint has no spare rows, as there often are."""
  folder = tmp_path / "language_model"
  # The tokenizer without InternVL's tokens.
  raw = json.loads((folder / "tokenizer.json").read_text())
  image_tokens = {
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
  }
  known = [token["content"] for token in raw["added_tokens"]]
  assert image_tokens <= set(known)
  # Its ids begin with them, so they are renamed: the ids of all others stay.
  renamed = {name: f"<other{i}>" for i, name in enumerate(sorted(image_tokens))}
  text = json.dumps(raw)
  for old, new in renamed.items():
    text = text.replace(json.dumps(old), json.dumps(new))
  (folder / "tokenizer.json").write_text(text)
  for name in ("tokenizer_config.json", "special_tokens_map.json"):
    (folder / name).write_text("{}")

  tokenizer = load_tokenizer(folder)
  before = len(tokenizer)
  tensors = load_file(folder / "model.safetensors")
  rng = np.random.default_rng(0)
  rows = before + spare
  for key in ("model.embed_tokens.weight", "lm_head.weight"):
    tensors[key] = rng.normal(size=(rows, tensors[key].shape[1])).astype("f4")
  save_file(tensors, folder / "model.safetensors")
  edit_json(folder / "config.json", vocab_size=rows)

  new = add_image_tokens(tokenizer)
  assert new == 9 and len(tokenizer) == before + 9
  source = open_parts(**parts, changes=Changes(**CHANGES, vocab_size=len(tokenizer), new_tokens=new))
  if spare < 0:
    with pytest.raises(
      UserError, match=f"the tokenizer had {before} tokens .* the embedding has {rows} rows"
    ):
      load(source)
    return
  params = load(source)
  old_in, old_out = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
  table, head = (
    params["language_model.model.embed_tokens.embedding"],
    params["language_model.lm_head.kernel"].T,
  )
  assert table.shape[0] == head.shape[0] == before + 9
  np.testing.assert_array_equal(head[:before], old_out[:before])
  np.testing.assert_allclose(head[before:], np.tile(old_out[:before].mean(axis=0), (9, 1)), atol=1e-6)
  kept = min(rows, before + 9)
  np.testing.assert_array_equal(table[:kept], old_in[:kept])
  if kept < before + 9:
    np.testing.assert_allclose(table[kept:], np.tile(old_in.mean(axis=0), (9, 1)), atol=1e-6)

  # What is saved stands alone: tokenizer, sizes and weights belong together.
  save_model(
    tmp_path / "saved",
    source,
    params,
    ModelFiles(
      layout=layouts.INTERNVL,
      dtype=np.float32,
      tokenizer=tokenizer,
      normalize_type="imagenet",
      settings={"template": "internvl2_5"},
    ),
  )
  again = open_source(tmp_path / "saved")
  assert again.config == source.config and add_image_tokens(load_tokenizer(tmp_path / "saved")) == 0
  for path, value in load(again).items():
    np.testing.assert_array_equal(value, params[path], err_msg=path)


def test_parts_of_the_wrong_kind_are_named(parts, tmp_path):
  with pytest.raises(UserError, match=r"a whole InternVL checkpoint; name it as model\.model_name_or_path"):
    open_parts(**{**parts, "vision_path": str(INIT)}, changes=Changes(**CHANGES))
  with pytest.raises(UserError, match=r"model_type is 'qwen2', expected 'intern_vit_6b'"):
    open_parts(**{**parts, "vision_path": parts["llm_path"]}, changes=Changes(**CHANGES))
  edit_json(tmp_path / "language_model/config.json", model_type="mamba")
  with pytest.raises(
    UserError, match=r"llm_config\.model_type='mamba' is not supported; known: \['gpt_oss', "
  ):
    open_parts(**parts, changes=Changes(**CHANGES))
  (tmp_path / "mlp.pth").write_bytes(b"pickle")
  with pytest.raises(UserError, match=r"mlp\.pth: not an archive of torch\.save's .*weights_only"):
    with_projector(open_source(INIT), str(tmp_path / "mlp.pth"))
