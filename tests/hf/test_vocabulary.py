"""Every id of a tokenizer has a row in the embeddings: refused by every command where not, or grown by a run."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from internvl_jax import serving, verification
from internvl_jax.arguments import DataTrainingArguments
from internvl_jax.conversion import convert
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.data.where import Where
from internvl_jax.errors import UserError
from internvl_jax.hf import model_config as layouts
from internvl_jax.hf import vocabulary, weights
from internvl_jax.hf.embeddings import EMBEDDINGS
from internvl_jax.hf.export import ModelFiles, save_model
from internvl_jax.hf.model import open_source
from internvl_jax.hf.tokenizer import IMAGE_TOKENS, load_tokenizer
from internvl_jax.inference import open_for_inference
from internvl_jax.open_model import open_model, open_shapes
from tests.support.toy import CURVE, curve_config, log_history, run_training

ROWS = 389
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


@pytest.fixture
def folder(tmp_path):
  """A copy of a good checkpoint, of as many rows as tokens."""
  return shutil.copytree(CURVE / "init", tmp_path / "model")


def edit_json(path, change):
  value = json.loads(path.read_text()) if path.exists() else {}
  change(value)
  path.write_text(json.dumps(value))


def add_tokens(folder, *names, special=True):
  """Adds tokens to a tokenizer's files, and to nothing else."""

  def add(raw):
    for name in names:
      flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
      index = max([*raw["model"]["vocab"].values(), *(token["id"] for token in raw["added_tokens"])]) + 1
      raw["added_tokens"].append({"id": index, "content": name, **flags, "special": special})

  edit_json(folder / "tokenizer.json", add)


def resize(folder, **rows):
  """Cuts or extends the tables and what config.json says of them."""
  tensors = load_file(folder / "model.safetensors")
  for key, name in (("embedding", EMBEDDING), ("head", HEAD)):
    tensors[name] = np.resize(tensors[name], (rows.get(key, ROWS), tensors[name].shape[1]))
  save_file(tensors, folder / "model.safetensors")
  edit_json(folder / "config.json", lambda raw: raw["llm_config"].update(vocab_size=rows.get("config", ROWS)))


def config_of(folder, **runtime):
  config = curve_config("unused")
  config.model.model_name_or_path = str(folder)
  for name, value in runtime.items():
    setattr(config.runtime, name, value)
  return config


DOORS = {
  "train": lambda folder: open_model(config_of(folder)),
  "doctor": lambda folder: open_model(config_of(folder), with_weights=False),
  "plan": lambda folder: open_shapes(config_of(folder)),
  "convert": lambda folder: convert(str(folder), folder.parent / "written", layouts.HF, lora="merge"),
  "verify": lambda folder: verification.compute(str(folder), None),
  "evaluate and generate": lambda folder: open_for_inference(folder, bf16=False),
}


def extra_piece(folder):
  """A token of the vocabulary itself, not an added one: a tokenizer of a model with more of them."""
  edit_json(folder / "tokenizer.json", lambda raw: raw["model"]["vocab"].update({"zebra": ROWS + 6}))


def smaller_head(folder):
  resize(folder, head=ROWS - 2)


def shown_as_larger(folder):
  """Somebody wrote the new size into config.json, and left the weights as they were."""
  add_tokens(folder, "<loc>")
  resize(folder, config=ROWS + 1)


DAMAGES = {
  "a special token": (lambda folder: add_tokens(folder, "<loc>"), r"'<loc>' \(id 389\), .* 389 rows"),
  "a plain token": (
    lambda folder: add_tokens(folder, "zebra", special=False),
    r"'zebra' \(id 389\), .* 389 rows",
  ),
  "many": (
    lambda folder: add_tokens(folder, *(f"<loc{i}>" for i in range(5))),
    r"'<loc0>' \(id 389\) and 4 more tokens up to id 393, .* 389 rows",
  ),
  "a piece of the vocabulary": (extra_piece, r"'zebra' \(id 395\), .* 389 rows"),
  "a head of fewer rows": (
    smaller_head,
    r"\(id 387\) and 1 more token up to id 388, .* 387 rows, for ids up to 386 \(language_model\.lm_head",
  ),
  "config.json alone grown": (shown_as_larger, r"'<loc>' \(id 389\), .* 389 rows, for ids up to 388 \(lang"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_token_without_a_row_is_refused_before_weights_are_read(folder, monkeypatch, door, damage):
  damaging, message = DAMAGES[damage]
  damaging(folder)
  read = []
  monkeypatch.setattr(weights.Checkpoint, "read", lambda self, *args: read.append(args))
  with pytest.raises(UserError, match=message) as error:
    DOORS[door](folder)
  (line,) = str(error.value).splitlines()
  assert line.startswith(f"{folder}: ") and "runtime.grow_vocabulary=True" in line
  assert not read


@pytest.mark.parametrize("door", ["train", "doctor", "plan"])
def test_weights_and_config_of_different_sizes_are_refused(folder, door):
  """Also where all tokens have a row."""
  resize(folder, config=ROWS + 11)
  with pytest.raises(UserError, match=r"400 in config\.json \(vocab_size\), 389 in language_model\.lm_head"):
    DOORS[door](folder)


def test_rows_to_spare_are_left_alone(folder):
  """Published models have more rows than tokens."""
  resize(folder, embedding=400, head=400, config=400)
  add_tokens(folder, "<loc>")
  for grows in (False, True):
    source, tokenizer = open_model(config_of(folder, grow_vocabulary=grows))
    assert source.config.text.vocab_size == 400 and source.new_rows == 0 and "<loc>" in tokenizer.get_vocab()


def test_files_of_a_tokenizer_that_contradict_each_other(folder):
  edit_json(folder / "added_tokens.json", lambda raw: raw.update({"<loc>": ROWS}))
  with pytest.raises(UserError, match=r"'<loc>' has id None by the vocabulary but 389 by added_tokens\.json"):
    load_tokenizer(folder)


def test_a_token_that_config_names_and_the_vocabulary_lacks(folder):
  """transformers makes an id for it when it opens the tokenizer."""
  edit_json(folder / "tokenizer_config.json", lambda raw: raw.update(pad_token="[PAD]"))
  edit_json(folder / "special_tokens_map.json", lambda raw: raw.update(pad_token="[PAD]"))
  with pytest.raises(UserError, match=r"'\[PAD\]' \(id 389\)"):
    DOORS["doctor"](folder)


def test_another_image_token_in_config_than_in_the_tokenizer(folder):
  convert(str(folder), folder.parent / "hf", layouts.HF, lora="merge")
  edit_json(folder.parent / "hf/config.json", lambda raw: raw.update(image_token_id=7))
  with pytest.raises(UserError, match=r"image_token_id=7, but <IMG_CONTEXT> has id 5"):
    DOORS["doctor"](folder.parent / "hf")


def test_the_placeholder_of_videos_needs_no_row_and_is_no_text(folder, tmp_path):
  """Of the hf layout, as others export it: the processor puts frames in its place."""
  convert(str(folder), tmp_path / "hf", layouts.HF, lora="merge")
  assert "<video>" not in load_tokenizer(tmp_path / "hf").get_vocab()  # Ours names a token that has a row.
  edit_json(tmp_path / "hf/tokenizer_config.json", name_video_token)
  add_tokens(tmp_path / "hf", "<video>")
  assert load_tokenizer(tmp_path / "hf").get_vocab()["<video>"] == ROWS
  chat = open_for_inference(tmp_path / "hf", bf16=False).tokenizer
  turns = [{"from": "human", "value": "what is <video>?"}, {"from": "gpt", "value": "red"}]
  with pytest.raises(
    UserError, match="'<video>', token 389 of the tokenizer, which the model has no row for"
  ):
    chat.lay_out(turns, 0, Where("vqa", "vqa.jsonl", 1))
  source, _ = open_model(config_of(tmp_path / "hf", grow_vocabulary=True), with_weights=False)
  assert source.new_rows == 0
  add_tokens(tmp_path / "hf", "<loc>")
  with pytest.raises(UserError, match=r"'<loc>' \(id 390\), .* 389 rows"):
    vocabulary.open_tokenizer(tmp_path / "hf")


def name_video_token(raw):
  raw["extra_special_tokens"] = {**raw.get("extra_special_tokens", {}), "video_token": "<video>"}


def test_an_end_that_no_answer_can_have_is_told(folder, caplog):
  edit_json(folder / "generation_config.json", lambda raw: raw.update(eos_token_id=[2, 400]))
  vocabulary.open_tokenizer(folder)
  assert "no answer ends by eos_token_id=400, since the embeddings have 389 rows" in caplog.text


def test_an_adapter_with_tokens_that_its_base_lacks(folder, tmp_path):
  adapter = tmp_path / "adapter"
  adapter.mkdir()
  (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
  for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copy(folder / name, adapter / name)
  vocabulary.open_tokenizer(adapter)
  add_tokens(adapter, "<loc>")
  with pytest.raises(
    UserError, match=r"with '<loc>' as token 389, which the tokenizer of its base model lacks"
  ):
    vocabulary.open_tokenizer(adapter)


def test_verify_refuses_ids_before_weights_are_read(folder, monkeypatch):
  monkeypatch.setattr(weights.Checkpoint, "read", lambda self, *args: pytest.fail("a weight was read"))
  ids = np.full((1, 4), 9)
  inputs = {"input_ids": ids, "labels": ids, "pixel_values": np.zeros((0, 3, 56, 56))}
  for bad in (ROWS, -100):
    with pytest.raises(UserError, match=r"input_ids has ids from .* a vocabulary of 389"):
      verification.compute(str(folder), {**inputs, "input_ids": np.array([[9, 9, 9, bad]])})


# --- Growing ------------------------------------------------------------------------------------------------


def load(source):
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return source.load(source.model.shapes, dict.fromkeys(source.model.shapes, place))


def without_image_tokens(folder):
  """Renames all nine, so that they are to be added; the old ids stay taken."""
  for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
    text = (folder / name).read_text()
    for i, token in enumerate(IMAGE_TOKENS):
      text = text.replace(json.dumps(token), json.dumps(f"<other{i}>"))
    (folder / name).write_text(text)


@pytest.mark.parametrize("image_tokens", [True, False])
@pytest.mark.parametrize("layout", [layouts.INTERNVL, layouts.HF], ids=lambda layout: layout.name)
def test_rows_are_made_and_saved(folder, tmp_path, layout, image_tokens):
  add_tokens(folder, "<loc>", "</loc>")
  if not image_tokens:
    without_image_tokens(folder)
  made = 2 if image_tokens else 11
  source, tokenizer = open_model(config_of(folder, grow_vocabulary=True))
  assert source.config.text.vocab_size == ROWS + made and source.new_rows == made
  params = load(source)
  data = DataTrainingArguments(conv_style="internvl2_5", force_image_size=56)
  wanted = serving.ExportSettings(layout=layout, layout_flag="layout", code_flag="code")
  chat = ChatTokenizer(tokenizer, "internvl2_5")
  save_model(
    tmp_path / "saved",
    source,
    params,
    ModelFiles(
      layout=layout,
      dtype=jnp.float32,
      tokenizer=tokenizer,
      normalize_type="imagenet",
      serving=serving.prepare(source, data, tokenizer, chat, wanted).serving,
      settings={"template": "internvl2_5"},
    ),
  )
  old, new = load_file(folder / "model.safetensors"), load_file(tmp_path / "saved/model.safetensors")
  for name in (EMBEDDING, HEAD):
    np.testing.assert_array_equal(new[name][:ROWS], old[name])
    mean = np.tile(old[name].mean(axis=0), (made, 1))
    np.testing.assert_allclose(new[name][ROWS:], mean, rtol=0, atol=1e-6)
  raw = json.loads((tmp_path / "saved/config.json").read_text())
  assert raw[layout.text]["vocab_size"] == ROWS + made
  again = vocabulary.open_tokenizer(tmp_path / "saved").get_vocab()
  again.pop("<video>", None)  # What transformers' processor puts frames in the place of.
  assert again == tokenizer.get_vocab() and again["</loc>"] == ROWS + 1
  assert open_source(tmp_path / "saved").config.text == source.config.text


def test_a_head_of_fewer_rows_grows_with_the_other_table(folder):
  smaller_head(folder)
  add_tokens(folder, "<loc>")
  source, _ = open_model(config_of(folder, grow_vocabulary=True))
  params = load(source)
  assert {params[path].shape[axis] for axis, path in enumerate(EMBEDDINGS)} == {ROWS + 1}


def test_the_doctor_grows_as_the_run_does(folder):
  shown_as_larger(folder)
  doctor, _ = open_model(config_of(folder, grow_vocabulary=True), with_weights=False)
  run, _ = open_model(config_of(folder, grow_vocabulary=True))
  plan = open_shapes(config_of(folder, grow_vocabulary=True))
  assert {source.config.text.vocab_size for source in (doctor, run, plan)} == {ROWS + 1}
  assert {source.new_rows for source in (doctor, run, plan)} == {1}


def test_a_run_trains_new_tokens_and_its_export_opens(folder, tmp_path):
  add_tokens(folder, "<loc>")
  data = tmp_path / "data.jsonl"
  turns = [{"from": "human", "value": "where? <loc>"}, {"from": "gpt", "value": "at <loc> there"}]
  data.write_text(f"{json.dumps({'conversations': turns})}\n" * 4)
  entry = {"root": "", "annotation": str(data), "data_augment": False, "repeat_time": 1, "length": 4}
  (tmp_path / "meta.json").write_text(json.dumps({"data": entry}))
  done = run_training(
    tmp_path,
    tmp_path / "out",
    f"model.model_name_or_path={folder}",
    f"data.meta_path={tmp_path / 'meta.json'}",
    "runtime.grow_vocabulary=True",
    "training.max_steps=3",
    "training.warmup_ratio=0",
    "training.save_strategy=no",
  )
  assert done.returncode == 0, done.stderr
  assert "skipped_steps" not in log_history(tmp_path / "out")[-1]
  start, trained = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
  for name in (EMBEDDING, HEAD):
    assert trained[name].shape[0] == ROWS + 1
    assert np.abs(trained[name][ROWS] - start[name].mean(axis=0)).max() > 1e-5  # It has learned.
  opened = open_for_inference(tmp_path / "out", bf16=False)
  assert opened.source.config.text.vocab_size == ROWS + 1
  convert(str(tmp_path / "out"), tmp_path / "hf", layouts.HF, lora="merge")
  raw = json.loads((tmp_path / "hf/config.json").read_text())
  assert raw["text_config"]["vocab_size"] == ROWS + 1
  assert load_tokenizer(tmp_path / "hf").convert_tokens_to_ids("<loc>") == ROWS
