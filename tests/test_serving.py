"""What an export tells those who serve it, and what is refused or told before a run trains: without torch."""

import dataclasses
import json

import pytest
from absl import logging
from transformers import AutoTokenizer

from internvl_jax import serving
from internvl_jax.conversion import convert
from internvl_jax.data.sample import tiling
from internvl_jax.data.sample.templates import get_template
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.data.where import Where
from internvl_jax.errors import UserError
from internvl_jax.hf import export
from internvl_jax.hf.model import open_source
from internvl_jax.hf.model_config import HF, INTERNVL
from internvl_jax.hf.tokenizer import add_image_tokens, load_tokenizer, save_tokenizer
from internvl_jax.open_model import open_model
from internvl_jax.setup.export import adapter_notes
from internvl_jax.setup.export import open_export as look_at_export
from internvl_jax.tasks import open_task
from tests.hf import test_tokenizers
from tests.support import families, served
from tests.support.toy import CURVE, curve_config

TEMPLATES = served.TEMPLATES


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  return served.published(tmp_path_factory.mktemp("served"))


@pytest.fixture
def warned(monkeypatch):
  lines = []
  monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
  return lines


# --- Chat templates -----------------------------------------------------------------------------------------

CONVERSATIONS = (
  [("user", [{"type": "image"}, {"type": "text", "text": " What?  "}])],
  [
    ("system", "no"),
    ("user", "<image>\nwhat"),
    ("assistant", " red "),
    ("user", [{"type": "text", "text": "is\n"}]),
  ],
  [("system", [{"type": "text", "text": ""}]), ("user", [{"type": "image"}, {"type": "image"}])],
)


def as_turns(conversation):
  roles = {"system": "system", "user": "human", "assistant": "gpt"}
  turns = []
  for role, content in conversation:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text = "".join("<image>\n" if part["type"] == "image" else part["text"] for part in parts)
    turns.append({"from": roles[role], "value": text})
  return turns


def as_messages(conversation):
  return [{"role": role, "content": content} for role, content in conversation]


def ids_in_all_ways(folder, messages):
  """The ids that transformers makes of messages: text and then ids, with and without its special tokens, and at once."""
  tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
  options = {"add_generation_prompt": True, "tokenize": False}
  text = tokenizer.apply_chat_template(messages, **options)
  text = text.replace("<IMG_CONTEXT>", "<img><IMG_CONTEXT></img>")
  ids = [tokenizer(text, add_special_tokens=adds).input_ids for adds in (True, False)]
  assert ids[0] == ids[1]
  assert len(tokenizer) == len(load_tokenizer(folder)), "a token without a row"
  return ids[0]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_asks_as_training_does(published, tmp_path, template):
  before = served.folder_of(published, template, served.Case(), tmp_path / "before")
  after = served.export_processor(before, tmp_path / "after")
  chat = ChatTokenizer(load_tokenizer(before), template)
  for conversation in CONVERSATIONS:
    turns = as_turns(conversation)
    images = sum(turn["value"].count("<image>") for turn in turns)
    wanted = serving.prompt_of(chat, turns, images).tolist()
    assert ids_in_all_ways(after, as_messages(conversation)) == wanted


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversation_with_its_answer_is_written_as_trained(published, template):
  chat = ChatTokenizer(load_tokenizer(published), template)
  turns = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "red"}]
  tokenizer = load_tokenizer(published)
  tokenizer.chat_template = serving.chat_template(chat.template, image="<image>", video="<video>")
  messages = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "red"}]
  text = tokenizer.apply_chat_template(messages, tokenize=False)
  trained = chat.lay_out(turns, 0, Where("a", "b", 1)).ids.tolist()
  assert tokenizer(text, add_special_tokens=False).input_ids == trained


@pytest.mark.parametrize("system", [None, "", 'of "quotes", {{ braces }} and @image\\n'])
def test_the_system_message_is_the_templates_own(system):
  template = dataclasses.replace(get_template("internvl2_5"), system_message=system)
  tokenizer = load_tokenizer(families.TOKENIZER)
  tokenizer.chat_template = serving.chat_template(template, image="<image>", video="<video>")
  said = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
  head = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
  assert said == f"{head}<|im_start|>user\na<|im_end|>\n"


@pytest.mark.parametrize(
  ("message", "words"),
  [
    ({"role": "tool", "content": "x"}, "is from tool"),
    ({"role": "user", "content": [{"type": "audio"}]}, "type audio"),
  ],
)
def test_what_training_has_no_form_for_is_no_prompt(message, words):
  tokenizer = load_tokenizer(families.TOKENIZER)
  tokenizer.chat_template = serving.chat_template(get_template("Hermes-2"), image="<image>", video="<video>")
  with pytest.raises(Exception, match=words):  # Jinja's own, which transformers passes on
    tokenizer.apply_chat_template([message], tokenize=False)


def begins_by_post_processor(folder):
  """A tokenizer as Llama 3's: the bos token is its post-processor's alone."""
  folder.mkdir()
  raw = json.loads((families.TOKENIZER / "tokenizer.json").read_text())
  bos = {"id": "<|begin|>", "type_id": 0}
  raw["added_tokens"].append({**raw["added_tokens"][0], "id": 389, "content": "<|begin|>"})
  raw["post_processor"] = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": bos}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [389], "tokens": ["<|begin|>"]}},
  }
  test_tokenizers.write(folder / "tokenizer.json", raw)
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|im_end|>"}
  test_tokenizers.write(folder / "tokenizer_config.json", config)
  return folder


def begins_by_config(folder):
  """A tokenizer as InternLM2's: a tokenizer.model, code, and a bos token."""
  test_tokenizers.train(folder, add_dummy_prefix=False, user_defined_symbols=["[UNUSED_0]", "[UNUSED_1]"])
  decoder = test_tokenizers.entries({**test_tokenizers.BASE, 3: "<|im_start|>", 4: "<|im_end|>"})
  config = {**test_tokenizers.INTERNLM2, "added_tokens_decoder": decoder}
  test_tokenizers.write(folder / "tokenizer_config.json", config)
  return folder


@pytest.mark.parametrize(
  ("make", "template", "first"),
  [
    (begins_by_config, "internvl2_5", "<s>"),
    (begins_by_config, "internlm2-chat", "<s>"),
    (begins_by_post_processor, "Hermes-2", "<|begin|>"),
    # Turns on their own have no bos token in training, whatever the tokenizer puts before a text.
    (begins_by_post_processor, "internvl2_5", None),
  ],
)
def test_a_bos_token_is_said_once(tmp_path, make, template, first):
  folder = make(tmp_path / "source")
  tokenizer = load_tokenizer(folder)
  add_image_tokens(tokenizer)
  chat = ChatTokenizer(tokenizer, template)
  source = open_source(CURVE / "init")
  told = serving._serving(HF, chat, tokenizer)
  out, back = tmp_path / "out", tmp_path / "back"
  out.mkdir()
  export.save_processor(out, folder, source.config, tokenizer, "imagenet", {}, told)
  ids = ids_in_all_ways(out, [{"role": "user", "content": "Hi"}])
  assert ids == serving.prompt_of(chat, [{"from": "human", "value": "Hi"}]).tolist()
  bos = tokenizer.convert_tokens_to_ids(first) if first else None
  assert ids.count(bos) == bool(first) and (not first or ids[0] == bos)
  # What is read again begins so, and so does what another layout makes of it.
  again = load_tokenizer(out)
  assert ChatTokenizer(again, template).leading_ids == chat.leading_ids
  back.mkdir()
  save_tokenizer(again, out, back)
  assert ChatTokenizer(load_tokenizer(back), template).leading_ids == chat.leading_ids


# --- What is refused, and what is told ----------------------------------------------------------------------


def run_config(tmp_path, **settings):
  config = curve_config(tmp_path / "out")
  for name, value in settings.items():
    room, field = name.split("__")
    setattr(getattr(config, room), field, value)
  return config


def open_export(config):
  source, tokenizer = open_model(config, with_weights=False)
  chat = ChatTokenizer(tokenizer, config.data.conv_style)
  return look_at_export(config, source, tokenizer, chat, open_task(config, source))


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({"data__use_thumbnail": False}, r"cannot hold data\.use_thumbnail=False with data\.max_dynamic_patch=6"),
    ({"data__dynamic_image_size": False, "data__pad2square": True}, r"cannot hold data\.pad2square=True"),
    ({"model__ps_version": "v1"}, r"no form for ps_version='v1'"),
    ({"data__use_thumbnail": False, "data__max_dynamic_patch": 1}, None),
    ({"data__use_thumbnail": False, "data__dynamic_image_size": False}, None),
    ({"data__pad2square": True}, None),
  ],
)
def test_a_run_is_refused_before_it_trains_what_its_layout_cannot_hold(tmp_path, settings, words):
  config = run_config(tmp_path, checkpoint__export_layout="hf", **settings)
  if words is None:
    assert "{%- for message in messages -%}" in open_export(config).serving.chat_template
    return
  with pytest.raises(UserError, match=words) as caught:
    open_export(config)
  assert "(checkpoint.export_layout=internvl)" in str(caught.value) and "\n" not in str(caught.value)
  open_export(run_config(tmp_path, **settings))


def test_a_tokenizer_that_transformers_reads_otherwise_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(serving, "_PROBE", (*serving._PROBE[:2], ("user", "a video <video> ")))
  with pytest.raises(
    UserError, match=r"cannot hold template 'internvl2_5' with the tokenizer of .*other token: \d+"
  ):
    open_export(run_config(tmp_path, checkpoint__export_layout="hf"))


def test_what_the_caller_must_give_is_told(tmp_path, warned):
  open_export(run_config(tmp_path, checkpoint__export_layout="hf"))
  told = "\n".join(warned)
  assert "'Frame1: ', training calls them 'Frame-1: '" in told and "max_patches=6 // images" in told
  warned.clear()
  settings = {"data__dynamic_image_size": False, "preference__loss_type": "sigmoid"}
  open_export(run_config(tmp_path, checkpoint__export_layout="hf", **settings))
  assert warned == []  # Preference training calls frames so, too.
  open_export(
    run_config(tmp_path, checkpoint__export_layout="hf", data__min_dynamic_patch=4, data__max_dynamic_patch=4)
  )
  assert "aspect ratio of 5/2" in warned[-1]


def test_grids_that_are_contested():
  assert tiling.contested(1, 12) == tiling.contested(1, 40) == []
  assert [str(ratio) for ratio in tiling.contested(6, 7)] == ["5/12", "15/4"]


def test_adapters_without_a_form_are_told_before_the_first_step(tmp_path, warned):
  hf = families.write_checkpoint("qwen2", tmp_path / "hf")
  for folder, told in (
    (hf, "no form for adapters of vision_model.encoder.layers.{i}.attn.qkv"),
    (CURVE / "init", ""),
  ):
    config = run_config(
      tmp_path, model__model_name_or_path=str(folder), model__use_backbone_lora=2, model__freeze_backbone=True
    )
    config.data.force_image_size = 28 if folder == hf else 56
    config.runtime.grow_vocabulary = folder == hf  # Its tokenizer is another model's.
    source, _ = open_model(config, with_weights=False)
    (line,) = adapter_notes(config, source)
    assert (told or "adapter/ holds the adapters alone; what else trains (language_model, mlp1)") in line
  parts = run_config(tmp_path, model__use_llm_lora=2)
  source, _ = open_model(parts, with_weights=False)
  parts.model.model_name_or_path = None
  assert "no checkpoint of the base model" in adapter_notes(parts, source)[0]


# --- Code of the internvl layout ----------------------------------------------------------------------------


def test_an_export_brings_code_or_says_that_it_has_none(published, tmp_path, warned):
  hf, plain, whole = (tmp_path / name for name in ("hf", "plain", "whole"))
  convert(str(published), hf, HF, lora="merge")
  assert not any(hf.glob("*.py")) and not any("trust_remote_code" in line for line in warned)
  convert(str(hf), plain, INTERNVL, lora="merge")
  assert f"{hf} has no code" in warned[-1] and "--code" in warned[-1]
  template = (plain / "chat_template.jinja").read_text()
  assert "<image>" in template and "<IMG_CONTEXT>" not in template
  warned.clear()
  convert(str(hf), whole, INTERNVL, lora="merge", code=str(published))
  assert not any("code" in line for line in warned)
  assert {path.name for path in whole.glob("*.py")} == {path.name for path in published.glob("*.py")}
  classes = [json.loads((folder / "config.json").read_text())["auto_map"] for folder in (whole, published)]
  assert classes[0] == classes[1]


def test_code_that_is_not_there(published, tmp_path):
  with pytest.raises(
    UserError, match=r"configuration_internvl_chat\.py and modeling_internvl_chat\.py is not there"
  ):
    open_export(run_config(tmp_path, checkpoint__code=str(families.TOKENIZER)))
  with pytest.raises(UserError, match=r"checkpoint\.code='.*' has no effect in the hf layout"):
    open_export(run_config(tmp_path, checkpoint__code=str(published), checkpoint__export_layout="hf"))
  with pytest.raises(UserError, match="no such folder"):
    open_export(run_config(tmp_path, checkpoint__code=str(tmp_path / "nowhere")))


def test_what_ends_an_answer_is_the_folders_and_the_templates(published, tmp_path):
  before = served.folder_of(published, "phi3-chat", served.Case(), tmp_path / "before")
  served.edit(before / "generation_config.json", eos_token_id=[0, 2])
  convert(str(before), tmp_path / "after", HF, lora="merge")
  ends = json.loads((tmp_path / "after/generation_config.json").read_text())["eos_token_id"]
  assert ends == [0, 2, load_tokenizer(before).convert_tokens_to_ids("<|end|>")]
