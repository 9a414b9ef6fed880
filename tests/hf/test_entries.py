"""Values that no one should write in a checkpoint's JSON files end in a line, or well, and soon."""

import json
import shutil

import pytest

from internvl_jax.errors import UserError
from internvl_jax.hf import entries, files
from internvl_jax.hf.model import open_source
from internvl_jax.hf.tokenizer import load_tokenizer
from tests.support.damage import edit_config, load, refused
from tests.support.toy import CURVE

HUGE = 10**400
NAN = float("nan")


@pytest.fixture
def folder(tmp_path):
  """A copy of a good checkpoint, to be damaged."""
  return shutil.copytree(CURVE / "init", tmp_path / "model")


@pytest.mark.parametrize(
  ("entry", "value"),
  [
    ("llm_config__hidden_size", HUGE),
    ("llm_config__hidden_size", 10**12),
    ("llm_config__hidden_size", True),
    ("llm_config__num_hidden_layers", 10**9),
    ("llm_config__num_hidden_layers", -1),
    ("llm_config__num_attention_heads", 0),
    ("llm_config__num_attention_heads", 3),  # 64 numbers do not divide into 3 heads.
    ("llm_config__num_key_value_heads", 3),
    ("llm_config__vocab_size", "389"),
    ("llm_config__rope_scaling", "x"),
    ("llm_config__rope_scaling", {"type": ["linear"], "factor": 2}),
    ("llm_config__rope_scaling", {"type": "linear", "factor": 0}),
    ("llm_config__rope_theta", "x"),
    ("llm_config__rope_theta", 1),
    ("llm_config__rms_norm_eps", "x"),
    ("llm_config__rms_norm_eps", NAN),
    ("llm_config__max_position_embeddings", None),
    ("llm_config__hidden_act", ["silu"]),
    ("llm_config__model_type", ["qwen2"]),
    ("llm_config__quantization_config", "gptq"),
    ("model_type", {"a": 1}),
    ("downsample_ratio", "x"),
    ("downsample_ratio", 0),
    ("downsample_ratio", 0.3),
    ("select_layer", "x"),
    ("select_layer", 99),
    ("force_image_size", 10**9),
    ("force_image_size", [56, 56]),
    ("template", 5),
    ("min_dynamic_patch", 13),
    ("max_dynamic_patch", 10**6),
    ("use_thumbnail", "yes"),
    ("use_llm_lora", "16"),
    ("vision_config__image_size", 0),
    ("vision_config__image_size", []),
    ("vision_config__num_attention_heads", 5),
    ("vision_config__patch_size", 14.5),
    ("vision_config__norm_type", "batch_norm"),
  ],
  ids=lambda value: str(value)[:40],
)
def test_entries_of_config_json(folder, entry, value):
  edit_config(folder, **{entry: value})
  assert len(refused(folder)) < 400


def test_values_that_are_right_are_taken(folder):
  """What published configs have: null where there is a default, squares as pairs, flags that are off."""
  edit_config(
    folder,
    llm_config__head_dim=None,
    llm_config__sliding_window=None,
    llm_config__rope_theta=10000,
    llm_config__rope_parameters=None,
    vision_config__image_size=[56, 56],
    use_llm_lora=False,
    system_message=None,
    select_layer=-1,
  )
  load(folder)


DEEP = "[" * 300 + "]" * 300


@pytest.mark.parametrize(
  ("text", "words"),
  [
    (b"", "empty"),
    (b"{", "not valid JSON"),
    (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"a": ' + DEEP.encode() + b"}", "more than 64 levels deep"),
    ('{"a": "é"}'.encode("latin-1"), "not valid JSON"),
    ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    (b"<html></html>", "a web page"),
    (b"\x1f\x8b\x08", "gzip"),
    (b"null", "holds a NoneType"),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", files.INDEX])
def test_files_that_hold_no_object(folder, name, text, words):
  (folder / name).write_bytes(text)
  (folder / files.SINGLE).rename(folder / "other.safetensors")
  with pytest.raises(UserError, match=words) as error:
    load_tokenizer(folder) if name.startswith("tokenizer") else open_source(folder)
  assert len(str(error.value).splitlines()) == 1 and name in str(error.value)


def test_a_file_larger_than_any_is_not_read(folder, monkeypatch):
  monkeypatch.setattr(files, "JSON_BYTES", 1000)
  refused(folder, "config.json", "more than the 1,000 of any such file")


def test_a_hundred_thousand_entries(folder):
  """They are not read, and cost nothing."""
  edit_config(folder, **{f"x{i}": i for i in range(100_000)})
  load(folder)


def edit_json(path, **changes):
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
  ("name", "entry", "value"),
  [
    ("tokenizer_config.json", "added_tokens_decoder", {"x": 1}),
    ("tokenizer_config.json", "added_tokens_decoder", {"1": {"content": 5}}),
    ("tokenizer_config.json", "added_tokens_decoder", {"1": {"content": "x", "special": "yes"}}),
    ("tokenizer_config.json", "added_tokens_decoder", {"²": {"content": "x"}}),
    ("tokenizer_config.json", "added_tokens_decoder", [1]),
    ("tokenizer_config.json", "extra_special_tokens", 5),
    ("tokenizer_config.json", "extra_special_tokens", [["x"]]),
    ("tokenizer_config.json", "additional_special_tokens", {"a": "b"}),
    ("tokenizer_config.json", "model_max_length", "x"),
    ("tokenizer_config.json", "model_max_length", HUGE),
    ("tokenizer_config.json", "chat_template", 5),
    ("tokenizer_config.json", "chat_template", [{"name": "default"}]),
    ("tokenizer_config.json", "add_bos_token", "true"),
    ("tokenizer_config.json", "padding_side", "middle"),
    ("tokenizer_config.json", "eos_token", 2),
    ("special_tokens_map.json", "eos_token", {"text": "x"}),
    ("special_tokens_map.json", "additional_special_tokens", [None]),
    ("tokenizer.json", "model", 5),
    ("tokenizer.json", "model", {"type": "Magic", "vocab": {}}),
    ("tokenizer.json", "model", {"type": "BPE", "vocab": ["a"], "merges": []}),
    ("tokenizer.json", "model", {"type": "BPE", "vocab": {"a": -1}, "merges": []}),
    ("tokenizer.json", "model", {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}),
    ("tokenizer.json", "added_tokens", [1]),
    (
      "tokenizer.json",
      "pre_tokenizer",
      {"type": "Split", "pattern": {"Regex": "("}, "behavior": "x", "invert": 1},
    ),
  ],
  ids=lambda value: str(value)[:50],
)
def test_entries_of_a_tokenizers_files(folder, name, entry, value):
  edit_json(folder / name, **{entry: value})
  with pytest.raises(UserError) as error:
    load_tokenizer(folder)
  assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 500


@pytest.mark.parametrize(
  ("table", "entry", "good", "bad"),
  [
    (entries.PREPROCESSOR, "image_mean", [0.5, 0.5, 0.5], "0.5"),
    (entries.PREPROCESSOR, "image_std", [1, 1, 1], ["x"]),
    (entries.PREPROCESSOR, "max_patches", 12, 10**6),
    (entries.GENERATION, "eos_token_id", [2, 5], ["</s>"]),
    (entries.GENERATION, "eos_token_id", None, 2.0),
    (entries.GENERATION, "pad_token_id", -1, HUGE),
    (entries.ADAPTER, "lora_alpha", 16, "16"),
    (entries.ADAPTER, "lora_dropout", 0, 1.5),
    (entries.ADAPTER, "alpha_pattern", {"q": 1}, {"q": "x"}),
    (entries.ADAPTER, "base_model_name_or_path", "x", ["x"]),
  ],
  ids=lambda value: "" if isinstance(value, dict) else str(value)[:20],
)
def test_other_tables(table, entry, good, bad):
  entries.check("f: ", {entry: good}, table)
  with pytest.raises(UserError, match=rf"^f: {entry}=.* is not supported; expected "):
    entries.check("f: ", {entry: bad}, table)
