"""A checkpoint that does not fit is refused with all that is wrong about it, before a number is read."""

import json
import pickle
import shutil

import numpy as np
import pytest

from internvl_jax.errors import UserError
from internvl_jax.hf import weights
from internvl_jax.hf.model import Changes, open_source
from tests.support.damage import edit, edit_config, load
from tests.support.toy import CURVE


@pytest.fixture
def folder(tmp_path):
  """A copy of a good checkpoint, to be damaged."""
  return shutil.copytree(CURVE / "init", tmp_path / "model")


def test_everything_that_does_not_fit_is_told_at_once(folder, monkeypatch):
  def damage(tensors):
    tensors["language_model.model.extra.weight"] = np.zeros((2, 3), "f4")
    tensors["mlp1.1.bias"] = np.zeros(5, "f4")
    del tensors["vision_model.encoder.layers.1.ls1"], tensors["language_model.model.norm.weight"]

  edit(folder, damage)
  read = []
  monkeypatch.setattr(weights.Checkpoint, "read", lambda self, *args: read.append(args))
  with pytest.raises(UserError) as error:
    load(folder)
  lines = str(error.value).splitlines()
  assert lines[0] == f"{folder}: the checkpoint does not fit the model of its config.json:"
  assert sorted(line.split(" (")[0] for line in lines[1:]) == [
    "left over: language_model.model.extra.weight",
    "mis-shaped: mlp1.1.bias is",
    "missing: language_model.model.norm.weight",
    "missing: vision_model.encoder.layers.1.ls1",
  ]
  assert "mlp1.1.bias is (5,), expected (64,) for mlp1.linear_1.bias" in str(error.value)
  assert not read, "numbers were read although the checkpoint does not fit"


@pytest.mark.parametrize("keep", [0, 4, 1000, -10])
def test_a_truncated_file(folder, keep):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(
    UserError, match=r"model\.safetensors: (damaged or truncated|cannot be read|empty)"
  ) as error:
    load(folder)
  assert len(str(error.value).splitlines()) == 1


class Bomb:
  """A pickle that leaves a trace when it is loaded."""

  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return open, (self.path, "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pth", "model.pt"])
def test_a_pickle_is_never_read(folder, tmp_path, name):
  (folder / "model.safetensors").unlink()
  (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
  with pytest.raises(UserError, match=f"{name} is a pickle, which can run code and is never read"):
    load(folder)
  assert not (tmp_path / "trace").exists()


def test_code_in_a_checkpoint_is_never_run(folder, tmp_path):
  edit_config(
    folder,
    auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
    llm_config__auto_map={"AutoConfig": "evil.Config"},
  )
  settings = json.loads((folder / "tokenizer_config.json").read_text())
  settings |= {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}}
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  (folder / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")
  from internvl_jax.hf.tokenizer import load_tokenizer

  load(folder)
  load_tokenizer(folder)
  assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"model_type": "llava"},
      r"model_type is 'llava', expected 'internvl_chat' \(layout internvl\) or 'internvl'",
    ),
    ({"llm_config__model_type": "mamba"}, r"llm_config\.model_type='mamba' is not supported; known: \["),
    ({"llm_config": None}, r"'llm_config' is missing"),
    ({"llm_config__hidden_act": "relu"}, r"llm_config\.hidden_act='relu' is not supported; expected 'silu'"),
    ({"llm_config__use_sliding_window": True}, r"use_sliding_window=True is not supported; expected False"),
    ({"vision_config__hidden_act": "gelu_new"}, r"vision_config\.hidden_act='gelu_new' is not supported"),
    (
      {"llm_config__rope_scaling": {"type": "magic"}},
      r"rope type 'magic' is not supported; known: default, ",
    ),
    (
      {"llm_config__rope_scaling": {"type": "dynamic"}},
      r"'factor' is missing, which rope type 'dynamic' needs",
    ),
  ],
  ids=str,
)
def test_an_unknown_architecture_or_switch(folder, change, message):
  edit_config(folder, **change)
  with pytest.raises(UserError, match=message) as error:
    load(folder)
  assert len(str(error.value).splitlines()) == 1


def test_config_json_itself(folder):
  path = folder / "config.json"
  for text, message in (
    ("{", "not valid JSON"),
    ("[1]", "holds a list, expected a JSON object"),
    ("\xff", "not valid JSON"),
  ):
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message):
      open_source(folder)
  path.unlink()
  with pytest.raises(UserError, match=r"config\.json: no such file"):
    open_source(folder)


def test_an_index_that_names_what_is_not_there(folder):
  index = folder / weights.INDEX
  (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
  names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
  index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
  with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: no such file, but .* names it"):
    load(folder)
  index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
  with pytest.raises(UserError, match=r"names '\.\./secret\.safetensors', which is not a file beside it"):
    load(folder)
  for text in ("", "{}", '{"weight_map": 3}'):
    index.write_text(text)
    with pytest.raises(UserError, match=r"not an index of safetensors files|empty"):
      load(folder)


def test_a_tensor_in_two_files(folder):
  shutil.copyfile(folder / "model.safetensors", folder / "other.safetensors")
  with pytest.raises(UserError, match=r"is there twice, also in .*model\.safetensors"):
    load(folder)


def test_tied_embeddings(folder):
  """The tensors decide: a head that is the embedding is shared, another one is not, a missing one must be said."""

  def share(tensors):
    tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"]

  edit_config(folder, llm_config__tie_word_embeddings=True)
  assert "language_model.lm_head.kernel" in load(folder)  # its own numbers
  edit(folder, share)
  assert "language_model.lm_head.kernel" not in load(folder)
  edit(folder, lambda tensors: tensors.pop("language_model.lm_head.weight"))
  assert "language_model.lm_head.kernel" not in load(folder)
  edit_config(folder, llm_config__tie_word_embeddings=False)
  with pytest.raises(UserError, match=r"missing: language_model\.lm_head\.weight"):
    load(folder)


def test_a_layer_that_is_not_there(folder):
  with pytest.raises(UserError, match=r"unfreeze_vit_layers=-9 names no layer of a ViT of 4; use -4 to 3"):
    open_source(folder, Changes(unfreeze_vit_layers=-9))
