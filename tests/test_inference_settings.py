"""Checkpoints are asked as their own files say: template, system message, tiles, pixels, ends of an answer."""

import json
import shutil
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers

from internvl_jax.arguments import EvalConfig
from internvl_jax.config import TrainConfig
from internvl_jax.data.sample.templates import get_template
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.data.where import Where
from internvl_jax.errors import UserError
from internvl_jax.eval.greedy import GreedyDecoder, Prompt
from internvl_jax.eval.scoring import Question, make_evaluation
from internvl_jax.hf.model import open_source
from internvl_jax.hf.tokenizer import load_tokenizer
from internvl_jax.inference import open_for_inference
from internvl_jax.inference_settings import differences, read_stated, recorded_settings
from internvl_jax.open_model import open_model
from tests.support import families
from tests.support.held_out import score_set
from tests.support.toy import CURVE

HARMONY = ("<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<|end|>")
PHI3 = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PICTURES = {"size": {"height": 28, "width": 28}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}

# As transformers' checkpoints of InternVL have it: no system turn of its own.
CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}"
  "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
  "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOLD = (
  "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
  + CHATML
)
# As bare language models have it: for texts alone.
TEXTS = "{% for m in messages %}{{ '<|user|>' + m['content'] + '<|end|>' }}{% endfor %}{{ '<|assistant|>' }}"


def hf_folder(folder, case="qwen2", tokens=(), chat=None, **files):
  """A folder of the hf layout without weights; `files` are JSON files by their stems."""
  folder.mkdir()
  tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(families.TOKENIZER)
  added: Any = [tokenizers.AddedToken(token, special=True) for token in tokens]
  tokenizer.add_tokens(added, special_tokens=True)
  config = families.config_of(case)
  text = config["text_config"] | {"vocab_size": len(tokenizer)}
  families.write_config(folder, config | {"text_config": text} | files.pop("config", {}))
  tokenizer.save_pretrained(folder)
  for name, content in files.items():
    (folder / f"{name}.json").write_text(json.dumps(content))
  if chat is not None:
    (folder / "chat_template.jinja").write_text(chat)
  return folder


def internvl_folder(folder, files=None, **config):
  shutil.copytree(CURVE / "init", folder, ignore=shutil.ignore_patterns("*.safetensors"))
  found = json.loads((folder / "config.json").read_text()) | config
  (folder / "config.json").write_text(
    json.dumps({name: value for name, value in found.items() if value is not ...})
  )
  for name, content in (files or {}).items():
    (folder / f"{name}.json").write_text(json.dumps(content))
  return folder


def stated_by(folder):
  return read_stated(open_source(folder, with_weights=False), load_tokenizer(folder))


# --- Answers as they were written ---------------------------------------------------------------------------


def toy(template="internvl2_5", **options):
  return ChatTokenizer(
    transformers.PreTrainedTokenizerFast.from_pretrained(families.TOKENIZER, **options), template
  )


def prefixing():
  """Characters with a space before every text, as SentencePiece has it: so also after a special token."""
  backend = tokenizers.Tokenizer(
    tokenizers.models.BPE({name: i for i, name in enumerate(["▁", "\n", *map(chr, range(33, 127))])}, [])
  )
  backend.normalizer = tokenizers.normalizers.Sequence(
    [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
  )
  backend.decoder = tokenizers.decoders.Sequence(
    [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)]
  )
  hf = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
  names = ("<img>", "</img>", "<IMG_CONTEXT>", "<ref>", "</ref>", "<box>", "</box>", "<think>", "<|im_end|>")
  added: Any = [tokenizers.AddedToken(name, special=True, normalized=False) for name in names]
  hf.add_tokens(added, special_tokens=True)
  return ChatTokenizer(hf, "internvl2_5")


ANSWERS = (
  "<ref>red</ref><box>[[1, 2, 3, 4]]</box>",
  "a <ref>red one</ref> and<box>[[1, 2]]</box> left",
  "<quad>[[1, 2]]</quad>",
  "<think>\nit is red\n</think>\n\nred",
  "<|im_start|>",
  "red  circle",
)


@pytest.mark.parametrize("make", [toy, prefixing])
@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_is_read_as_it_was_written(make, answer):
  chat = make()
  turns = [{"from": "human", "value": "which?"}, {"from": "gpt", "value": answer}]
  tokens = chat.encode(turns, [], Where("a", "b", 1))
  learned = tokens.input_ids[np.flatnonzero(tokens.labels != -100)].tolist()
  assert chat.decode_answer(learned[: learned.index(chat.stop_token_id)]).strip() == answer


def test_padding_is_no_part_of_an_answer():
  chat = toy(pad_token="<|endoftext|>")
  words = chat._backend.encode("<ref>red</ref>").ids
  assert chat.pad_token_id == 0
  assert chat.decode_answer([0, *words, 0, 0]) == "<ref>red</ref>"
  assert toy(pad_token=None).decode_answer([*words, 0]) == "<ref>red</ref><|endoftext|>"


def test_an_answer_that_the_tokenizer_normalises_can_be_right():
  nothing = Prompt(np.zeros(0, "i4"), np.zeros((0, 1, 1, 3), "u1"))
  question = Question(nothing, "cafe\u0301", {}, "caf\u00e9")
  assert score_set([question, question], ["caf\u00e9", "cafe\u0301"]).metrics["accuracy"] == 1
  assert score_set([question], ["cafe"]).metrics["accuracy"] == 0
  boxed = Question(nothing, "<box>[[1]]</box>", {})
  assert score_set([boxed, boxed], ["<box>[[1]]</box>\n", "[[1]]"]).metrics["accuracy"] == 0.5


def test_answers_that_end_otherwise_are_told():
  nothing: Any = None
  decoder = GreedyDecoder(
    model=nothing, how=nothing, normalize_type="imagenet", image_token_id=5, stop_ids=(2, 0), max_new_tokens=4, batch_size=1
  )  # fmt: skip
  rows = [decoder.cut(np.array(row)) for row in ([2, 2, 2, 2], [7, 0, 2, 2], [7, 7, 7, 7], [7, 7, 7, 2])]
  assert [len(row) for row in rows] == [0, 1, 4, 3]
  assert decoder.unusual_ends(rows) == [
    "1 of 4 answers are empty: the model's first token ended them",
    "1 of 4 answers were cut at max_new_tokens=4; raise it to read on",
  ]
  assert decoder.unusual_ends(rows[1:2]) == []


def test_a_grounding_answer_that_is_right_scores_1(tmp_path):
  """All of an evaluation but the model: lines in, ids of an answer, scores and predictions out."""
  folder = tmp_path / "m"
  shutil.copytree(CURVE / "init", folder)
  (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0], "max_new_tokens": 7}')
  opened = open_for_inference(folder, bf16=False)
  assert opened.stop_ids == (2, 0) and opened.max_new_tokens == 7
  answers = [ANSWERS[0], "<ref>red</ref><box>[[1, 2, 3, 5]]</box>"]
  lines = [
    {"conversations": [{"from": "human", "value": "which?"}, {"from": "gpt", "value": answer}]}
    for answer in answers
  ]
  (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  config = EvalConfig(annotation=str(tmp_path / "d.jsonl"), max_new_tokens=64)
  evaluation = make_evaluation(
    config, opened.data, opened.source, opened.tokenizer, opened.how, stop_ids=opened.stop_ids
  )
  assert evaluation is not None and evaluation.decoder.stop_ids == (2, 0)
  said = load_tokenizer(folder)(ANSWERS[0]).input_ids

  class Parrot(GreedyDecoder):
    def __call__(self, params, prompts):
      del params
      return [self.cut(np.array([*said, 0, 7])) for _ in prompts]

  parrot = Parrot(**{field.name: getattr(evaluation.decoder, field.name) for field in fields(GreedyDecoder)})
  (scores,) = replace(evaluation, decoder=parrot).run({})
  assert scores.metrics == {"accuracy": 0.5}
  assert [line["prediction"] for line in scores.predictions] == [ANSWERS[0]] * 2


# --- Ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("said", "config", "expected"),
  [
    ({"eos_token_id": [2, 0]}, {}, (2, 0)),
    ({"eos_token_id": 0}, {"eos_token_id": 7}, (0,)),
    ({}, {"eos_token_id": [7, 8]}, (7, 8)),
    (None, {}, (2,)),  # of text_config
    ({"eos_token_id": [2, 2, 9]}, {}, (2, 9)),
  ],
)
def test_all_ends_of_an_answer(tmp_path, said, config, expected):
  files = {} if said is None else {"generation_config": said}
  generation = stated_by(hf_folder(tmp_path / "m", config=config, **files)).generation
  assert generation.stop_ids == expected and not generation.notes


def test_what_greedy_answers_do_not_follow_is_said(tmp_path):
  said = {
    "do_sample": True,
    "temperature": 0.6,
    "repetition_penalty": 1.05,
    "stop_strings": ["END"],
    "num_beams": 1,
  }
  said |= {"eos_token_id": [2, 4000], "max_new_tokens": 300, "top_k": None, "pad_token_id": 0}
  generation = stated_by(internvl_folder(tmp_path / "m", {"generation_config": said})).generation
  assert generation.stop_ids == (2,) and generation.max_new_tokens == 300
  ignored, unknown = generation.notes
  assert (
    "do_sample=True, temperature=0.6, repetition_penalty=1.05, stop_strings=['END'] not followed" in ignored
  )
  assert "eos_token_id names [4000], which the model of 389 ids never gives" in unknown
  greedy = {"do_sample": False, "temperature": 0.6, "top_p": 0.8, "max_length": 20, "suppress_tokens": []}
  assert not stated_by(internvl_folder(tmp_path / "n", {"generation_config": greedy})).generation.notes


# --- Templates and system messages --------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("case", "tokens", "expected"),
  [
    ("gpt_oss", HARMONY, "internvl3_5_gpt_oss"),
    ("phi3", PHI3, "phi3-chat"),
    ("qwen3", HARMONY, "internvl2_5"),
    ("llama", PHI3, "internvl2_5"),
    ("gpt_oss", (), "internvl2_5"),  # The tokens decide what can be written at all.
  ],
)
def test_a_template_that_is_not_recorded_goes_by_family_and_tokens(tmp_path, case, tokens, expected):
  stated = stated_by(hf_folder(tmp_path / "m", case, tokens))
  assert stated.template == get_template(expected) and stated.data.conv_style == expected
  assert "family" in stated.why and stated.template.stop_token in stated.why and not stated.notes


def test_a_tokenizer_without_the_tokens_of_any_template(tmp_path):
  folder = internvl_folder(tmp_path / "m", template=...)
  assert stated_by(folder).template.name == "internvl2_5"
  for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
    text = (folder / name).read_text().replace("<|im_end|>", "<|im_over|>")
    (folder / name).write_text(text)
  with pytest.raises(
    UserError, match="'template' is missing, and the tokenizer has the tokens of none; set it to"
  ):
    stated_by(folder)


@pytest.mark.parametrize(("chat", "system"), [(CHATML, None), (TOLD, "Be kind.")])
def test_the_system_message_of_a_chat_template(tmp_path, chat, system):
  pytest.importorskip("jinja2")
  folder = hf_folder(tmp_path / "m", chat=chat)
  stated = stated_by(folder)
  assert stated.template.name == "internvl2_5" and stated.template.system_message == system
  assert "chat_template.jinja" in stated.why and not stated.notes
  files = load_tokenizer(folder)
  ours = ChatTokenizer(files, stated.template)
  turns = [
    {"from": "human", "value": "which?"},
    {"from": "gpt", "value": "this"},
    {"from": "human", "value": "why?"},
  ]
  messages = [
    {"role": {"human": "user", "gpt": "assistant"}[t["from"]], "content": t["value"]} for t in turns
  ]
  text = files.apply_chat_template(messages, chat_template=chat, tokenize=False)
  assert ours.decode(ours.encode(turns, [], Where("a", "b", 1)).input_ids, special=True) == text
  recorded = recorded_settings(stated.data, stated.template)
  (folder / "config.json").write_text(json.dumps(families.config_of("qwen2") | recorded))
  assert stated_by(folder).template == stated.template
  # What is recorded comes first, and the difference is said.
  (folder / "config.json").write_text(
    json.dumps(families.config_of("qwen2") | {"template": "internvl2_5", "system_message": "Be brief."})
  )
  stated = stated_by(folder)
  assert stated.template.system_message == "Be brief."
  assert (
    len(stated.notes) == 1
    and "the chat template differs from 'internvl2_5', which is followed" in stated.notes[0]
  )


@pytest.mark.parametrize(
  ("chat", "said"),
  [
    (TEXTS, "the chat template differs from 'internvl2_5', which is followed: it writes '<|user|>"),
    ("{% for m in messages %}", "the chat template cannot be compared with ours (TemplateSyntaxError"),
    ("{{ raise_exception('no pictures') }}", "cannot be compared with ours (TemplateError: no pictures)"),
    (CHATML.replace("'<|im_end|>\n'", "'<|im_end|>'"), ""),
  ],
)
def test_a_chat_template_that_is_not_ours(tmp_path, chat, said):
  pytest.importorskip("jinja2")
  stated = stated_by(hf_folder(tmp_path / "m", chat=chat))
  if not said:  # That of Hermes-2, by its text.
    assert stated.template.name == "Hermes-2" and stated.template.system_message is None and not stated.notes
    return
  assert stated.template == get_template("internvl2_5")
  assert len(stated.notes) == 1 and said in stated.notes[0]


def test_a_chat_template_of_a_text_alone_is_found_too(tmp_path):
  pytest.importorskip("jinja2")
  chat = TEXTS.replace("'<|user|>'", "'<|' + m['role'] + '|>\n'").replace("assistant|>", "assistant|>\n")
  folder = hf_folder(tmp_path / "m", "phi3", PHI3, chat_template={"chat_template": chat})
  stated = stated_by(folder)
  assert stated.template.name == "phi3-chat" and stated.template.system_message is None and not stated.notes


@pytest.mark.parametrize("system", ["Answer in one word.", ""])
def test_system_message_of_config(tmp_path, system):
  stated = stated_by(internvl_folder(tmp_path / "m", system_message=system, template="Hermes-2"))
  assert stated.template.name == "Hermes-2" and stated.template.system_message == system
  recorded = recorded_settings(stated.data, stated.template)
  assert (recorded["template"], recorded["system_message"]) == ("Hermes-2", system)


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"template": "internvl3"}, "config.json: template: unknown template 'internvl3'"),
    ({"system_message": 3}, "system_message=3 is not supported; expected text"),
    ({"max_dynamic_patch": "12"}, "max_dynamic_patch='12' is not supported; expected an integer"),
    ({"use_thumbnail": "no"}, "use_thumbnail='no' is not supported; expected true or false"),
    ({"min_dynamic_patch": 9, "max_dynamic_patch": 6}, "min_dynamic_patch=9 is above max_dynamic_patch=6"),
    ({"eos_token_id": "<|im_end|>"}, r"eos_token_id=<\|im_end\|> must be a token's id"),
  ],
)
def test_values_that_cannot_be(tmp_path, config, message):
  with pytest.raises(UserError, match=message):
    stated_by(internvl_folder(tmp_path / "m", {"generation_config": {}}, **config))


# --- Tiles and pixels ---------------------------------------------------------------------------------------


def test_tiles_of_config(tmp_path):
  data = stated_by(internvl_folder(tmp_path / "m")).data
  assert (data.dynamic_image_size, data.use_thumbnail, data.max_dynamic_patch) == (True, True, 12)
  assert (data.force_image_size, data.normalize_type, data.pad2square) == (56, "imagenet", False)
  said = {"min_dynamic_patch": 2, "max_dynamic_patch": ..., "use_thumbnail": False, "pad2square": None}
  clip = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
  }
  data = stated_by(internvl_folder(tmp_path / "n", {"preprocessor_config": clip}, **said)).data
  # Six are what the reference's class for config.json takes.
  assert (data.min_dynamic_patch, data.max_dynamic_patch, data.use_thumbnail) == (2, 6, False)
  assert data.normalize_type == "clip"


def test_tiles_of_the_preprocessor(tmp_path):
  said = {**PICTURES, "min_patches": 2, "max_patches": 5, "crop_to_patches": True, "do_rescale": True}
  stated = stated_by(hf_folder(tmp_path / "m", preprocessor_config=said))
  data = stated.data
  assert (data.dynamic_image_size, data.min_dynamic_patch, data.max_dynamic_patch) == (True, 2, 5)
  assert data.normalize_type == "siglip" and not stated.notes
  # Where transformers 5 saves it, it comes first; a fixed tile is a grid of one.
  nested = {
    "image_processor": {**said, "min_patches": 1, "max_patches": 1, "image_mean": None, "image_std": None}
  }
  stated = stated_by(hf_folder(tmp_path / "n", preprocessor_config=said, processor_config=nested))
  assert (stated.data.max_dynamic_patch, stated.data.normalize_type) == (1, "clip") and not stated.notes


@pytest.mark.parametrize(
  ("recorded", "said", "tiles", "note"),
  [
    ({"dynamic_image_size": False, "pad2square": True}, {"max_patches": 1}, None, None),
    ({"dynamic_image_size": False}, {"max_patches": 12, "crop_to_patches": False}, None, None),
    (
      {"dynamic_image_size": False},
      {"max_patches": 6},
      6,
      "config.json records dynamic_image_size=False, but",
    ),
    ({"max_dynamic_patch": 12}, {"max_patches": 4}, 4, "records max_dynamic_patch=12, but"),
    ({}, {"max_patches": 12, "crop_to_patches": False}, 12, "crop_to_patches=false is not followed"),
    ({}, {"resample": 2}, 12, "resample=2 is not followed"),
    ({}, {"image_processor_type": "CLIPImageProcessor"}, 12, "'CLIPImageProcessor' is not known"),
  ],
)
def test_the_preprocessor_beside_what_a_run_recorded(tmp_path, recorded, said, tiles, note):
  stated = stated_by(hf_folder(tmp_path / "m", config=recorded, preprocessor_config={**PICTURES, **said}))
  assert (stated.data.max_dynamic_patch if stated.data.dynamic_image_size else None) == tiles
  assert stated.data.pad2square is recorded.get("pad2square", False)
  assert [bool(note) and note in line for line in stated.notes] == [True] * bool(note)


@pytest.mark.parametrize(
  ("said", "message"),
  [
    ({"do_rescale": False}, "do_rescale=False is not supported: set it to true"),
    ({"do_normalize": False}, "do_normalize=False is not supported"),
    ({"rescale_factor": 1.0}, r"rescale_factor=1.0 is not supported; set it to 0.0039"),
    ({"size": {"height": 56, "width": 56}}, "is not that of the model's tiles, 28"),
    ({"image_mean": [0.1, 0.2, 0.3]}, r"image_mean and image_std are \[0.1, 0.2, 0.3\] and"),
    ({"min_patches": 4, "max_patches": 2}, "min_patches=4 exceeds max_patches=2"),
    ({"max_patches": [12]}, r"max_patches=\[12\] is not supported; expected an integer"),
  ],
)
def test_pixels_that_would_be_others(tmp_path, said, message):
  with pytest.raises(UserError, match=message):
    stated_by(hf_folder(tmp_path / "m", preprocessor_config={**PICTURES, **said}))


def test_frames_of_videos(tmp_path):
  said = {**PICTURES, "num_frames": 5, "do_sample_frames": True, "resample": 2}
  images = {**PICTURES, "resample": 3}
  stated = stated_by(hf_folder(tmp_path / "m", preprocessor_config=images, video_preprocessor_config=said))
  assert (stated.data.min_num_frame, stated.data.max_num_frame) == (5, 5)
  assert (
    len(stated.notes) == 1 and "resample=2 is not followed: frames are prepared as images" in stated.notes[0]
  )


# --- The start of a run -------------------------------------------------------------------------------------


def test_a_run_that_differs_from_its_start_is_told(tmp_path, caplog):
  folder = hf_folder(tmp_path / "m", "gpt_oss", HARMONY, preprocessor_config=PICTURES)
  config = TrainConfig()
  config.data.dynamic_image_size = config.data.use_thumbnail = True
  config.data.force_image_size, config.data.max_dynamic_patch = 28, 6
  stated = stated_by(folder)
  assert differences(stated, config.data) == [
    "data.conv_style='internlm2-chat' ('internvl3_5_gpt_oss')",
    "data.normalize_type='imagenet' ('siglip')",
    "data.max_dynamic_patch=6 (12)",
  ]
  config.model.model_name_or_path, config.model.ps_version = str(folder), "v1"
  with caplog.at_level("WARNING"):
    open_model(config, with_weights=False)
  assert "The run differs from what the checkpoint" in caplog.text
  assert "(12); model.ps_version='v1' ('v2')" in caplog.text

  told = stated_by(internvl_folder(tmp_path / "n", system_message="Be kind."))
  assert "the system message of 'internvl2_5' ('Be kind.')" in differences(
    told, stated_by(CURVE / "init").data
  )
  assert differences(stated_by(CURVE / "init"), stated_by(CURVE / "init").data) == []
