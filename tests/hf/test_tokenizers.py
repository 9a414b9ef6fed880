"""Tokenizers of all kinds of checkpoint folders, as loaded and as saved; and hub ids."""

import io
import json
import random
import struct
from pathlib import Path

import huggingface_hub
import pytest
import sentencepiece
from huggingface_hub import errors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.data.where import Where
from internvl_jax.errors import UserError
from internvl_jax.hf import hub
from internvl_jax.hf.sentencepiece import build_tokenizer, read_model
from internvl_jax.hf.tokenizer import (
  FILES,
  IMAGE_TOKENS,
  add_image_tokens,
  copy_tokenizer,
  load_tokenizer,
  save_tokenizer,
)

ASSET = Path(__file__).parents[1] / "assets" / "tokenizer"
CHAT = "<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT></img>\nWhat  is 你好 <ref>a</ref>?\n\n<|im_end|>\n"

CORPUS = [
  "The picture shows a red house with three windows and a door.",
  "What is the capital of the country in the image? There are two of them.",
  "def main(argument):\n    for line in argument:\n        print(line, 10, 2024)",
  "今天天气很好，我们去公园看花。图像里有什么？图像里有一只猫。",
  "spaces  twice   thrice    and more        here\t\ttabs\n\n\nlines",
  "==== ---- .... 0123456789 (a + b) * c = [1, 2, 3]",
] * 8

TEXTS = [
  "",
  " ",
  "\n",
  "a",
  " leading and trailing ",
  "runs  of   spaces        and\ttabs\n\n\n    indented\n",
  "你好，世界！这张图像里有什么？",
  "emoji 😀👩‍👩‍👧 and é ﬁ ① ½ 　 ideographic space",
  "<0x0A> <s> </s> <unk> are text to sentencepiece",
  "▁ is its own space ▁▁",
  "============ ------------- 111111111111 aaaaaaaaaaa",
  *CORPUS[:6],
]


def train(folder: Path, **options) -> Path:
  """A small tokenizer.model; options as of sentencepiece's trainer."""
  defaults = {
    "model_type": "bpe",
    "vocab_size": 420,
    "byte_fallback": True,
    "character_coverage": 0.98,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "minloglevel": 2,
  }
  written = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CORPUS), model_writer=written, **{**defaults, **options}
  )
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "tokenizer.model").write_bytes(written.getvalue())
  return folder / "tokenizer.model"


def random_texts(count: int, extra: list[str]) -> list[str]:
  draw = random.Random(0)
  parts = [*"abcdeTh  \n\t0123.,=-<>_▁", "你好", "，", "😀", "é", "　", "the ", "    ", "\n\n", "ﬁ", *extra]
  return ["".join(draw.choices(parts, k=draw.randrange(2, 40))) for _ in range(count)]


def write(path: Path, value) -> None:
  path.write_text(json.dumps(value), encoding="utf-8")


def entry(content: str, **flags) -> dict:
  unset = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
  return {"content": content, "special": True, **unset, **flags}


def entries(names: dict[int, str]) -> dict[str, dict]:
  return {str(index): entry(name) for index, name in names.items()}


BASE = {0: "<unk>", 1: "<s>", 2: "</s>"}
INTERNLM2 = {
  "tokenizer_class": "InternLM2Tokenizer",
  "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
  "chat_template": "{{ bos_token }}",
  "model_max_length": 8192,
  "pad_token": "</s>",
  "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
}


@pytest.fixture(scope="session")
def internlm2(tmp_path_factory) -> Path:
  """A folder as InternLM2's: chat tokens in the place of spare pieces, and code that must not run."""
  folder = tmp_path_factory.mktemp("internlm2")
  train(folder, add_dummy_prefix=False, user_defined_symbols=["[UNUSED_0]", "[UNUSED_1]", "[UNUSED_2]"])
  decoder = entries({**BASE, 3: "<|im_start|>", 4: "<|im_end|>"})
  write(folder / "tokenizer_config.json", {**INTERNLM2, "added_tokens_decoder": decoder})
  (folder / "tokenization_internlm2.py").write_text("raise AssertionError('executed')")
  write(folder / "config.json", {"model_type": "internvl_chat", "auto_map": {"AutoConfig": "no.Such"}})
  return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("llama")
  train(folder)
  write(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False})
  write(folder / "special_tokens_map.json", {"bos_token": entry("<s>"), "pad_token": "<pad>"})
  write(folder / "added_tokens.json", {"<|im_end|>": 421, "<|im_start|>": 420})
  return folder


def ids(tokenizer, text: str) -> list[int]:
  return tokenizer.encode(text, add_special_tokens=False)


# --- tokenizer.model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "options",
  [
    {"add_dummy_prefix": False},
    {"add_dummy_prefix": True},
    {"byte_fallback": False, "vocab_size": 390},
    {"remove_extra_whitespaces": True},
    {"remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
    {"add_dummy_prefix": False, "user_defined_symbols": ["[UNUSED_0]", "th", "你好"]},
    {"add_dummy_prefix": True, "user_defined_symbols": ["[UNUSED_0]", "th", "你好"]},
    {"split_by_whitespace": False, "max_sentencepiece_length": 24},
    {"split_digits": True, "bos_id": -1, "eos_id": 0, "unk_id": 3, "pad_id": 1},
  ],
  ids=str,
)
def test_ids_equal_those_of_sentencepiece(tmp_path, options):
  path = train(tmp_path, **options)
  expected = sentencepiece.SentencePieceProcessor(model_file=str(path))
  model = read_model(path)
  assert model.pieces == [expected.id_to_piece(i) for i in range(expected.get_piece_size())]
  assert (model.bos is None) == (expected.bos_id() < 0)
  ours = build_tokenizer(model, {}, prefix="each" if model.add_dummy_prefix else "never")
  fixed = options.get("user_defined_symbols", [])
  for text in [*TEXTS, *random_texts(500, fixed)]:
    if text not in fixed:  # Alone, such a piece gets no space before it.
      assert ours.encode(text).ids == expected.encode(text), text


def test_internlm2_without_its_code(internlm2):
  tokenizer = load_tokenizer(internlm2)
  expected = sentencepiece.SentencePieceProcessor(model_file=str(internlm2 / "tokenizer.model"))
  assert len(tokenizer) == expected.get_piece_size()
  start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
  assert (start, end) == (3, 4)
  for text in TEXTS[5:8]:
    wanted = [start, *expected.encode(text), end, *expected.encode("\n")]
    assert ids(tokenizer, f"<|im_start|>{text}<|im_end|>\n") == wanted
    assert tokenizer.decode(expected.encode(text)) == text
  assert tokenizer.add_bos_token is True and tokenizer.bos_token_id == 1
  assert tokenizer("a").input_ids == [1, *ids(tokenizer, "a")]
  assert (tokenizer.pad_token, tokenizer.model_max_length) == ("</s>", 8192)
  assert tokenizer.chat_template == "{{ bos_token }}"
  assert tokenizer.decode([1, 3, *ids(tokenizer, "hi"), 4], skip_special_tokens=True) == "hi"


def test_a_conversation_of_internlm2_begins_with_bos(internlm2):
  tokenizer = load_tokenizer(internlm2)
  assert add_image_tokens(tokenizer) == len(IMAGE_TOKENS)
  chat = ChatTokenizer(tokenizer, "internvl2_5")
  turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a house"}]
  tokens = chat.encode(turns, [3], Where("a", "b", 1))
  assert tokens.input_ids[0] == 1 and tokens.input_ids[1] == 3
  assert (tokens.input_ids == chat.image_token_id).sum() == 3
  supervised = tokens.input_ids[tokens.labels != -100]
  assert chat.decode(supervised, special=True) == "a house<|im_end|>"


def test_older_files_name_added_tokens_too(llama):
  tokenizer = load_tokenizer(llama)
  names = ["<|im_start|>", "<|im_end|>", "<pad>"]
  assert tokenizer.convert_tokens_to_ids(names) == [420, 421, 422]
  assert tokenizer.pad_token_id == 422 and tokenizer.eos_token_id == 2 and not tokenizer.add_bos_token
  expected = sentencepiece.SentencePieceProcessor(model_file=str(llama / "tokenizer.model"))
  wanted = [420, *expected.encode("user\nhi"), 421, *expected.encode("\n")]
  assert ids(tokenizer, "<|im_start|>user\nhi<|im_end|>\n") == wanted


def test_legacy_false_puts_a_space_before_the_text_alone(tmp_path):
  train(tmp_path)
  config = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
  config["added_tokens_decoder"] = entries({**BASE, 420: "<|end|>"}) | {"421": entry("<|user|>", rstrip=True)}
  write(tmp_path / "tokenizer_config.json", config)
  tokenizer = load_tokenizer(tmp_path)
  whole, part = tokenizer.tokenize("The"), tokenizer.tokenize("<|end|>The")[1:]
  assert "".join(whole) == "▁The" and "".join(part) == "The"
  assert tokenizer.tokenize("The<|end|>The") == [*whole, "<|end|>", *part]
  assert ids(tokenizer, "<|user|>\nThe") == ids(tokenizer, "<|user|>The")
  write(tmp_path / "tokenizer_config.json", {**config, "add_prefix_space": False})
  assert load_tokenizer(tmp_path).tokenize("The") == part


def damage(folder: Path, name: str, change) -> Path:
  path = folder / name
  path.write_bytes(change(path.read_bytes()))
  return folder


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda data: data[:-9], "tokenizer.model: not a sentencepiece model"),
    (lambda data: b"", "tokenizer.model: not a sentencepiece model"),
    (lambda data: b"IQ== 0\nIg== 1\n", "tokenizer.model: not a sentencepiece model"),
    (
      lambda data: b"version https://git-lfs.github.com/spec/v1\n",
      "tokenizer.model: only a pointer of Git LFS",
    ),
  ],
)
def test_a_damaged_model(tmp_path, change, message):
  train(tmp_path)
  refused(damage(tmp_path, "tokenizer.model", change), message)


def test_other_kinds_of_models(tmp_path):
  train(tmp_path, model_type="unigram", vocab_size=350)
  refused(tmp_path, "only BPE models")


def refused(folder: Path, message: str) -> None:
  with pytest.raises(UserError) as error:
    load_tokenizer(folder)
  assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("added", "message"),
  [
    ({421: "<a>"}, "'<a>' would get id 420, but the files beside it say 421"),
    ({420: "<s>"}, "'<s>' has id 1, but the files beside it say 420"),
  ],
)
def test_ids_that_cannot_be(tmp_path, added, message):
  train(tmp_path)
  write(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": entries(added)})
  refused(tmp_path, message)


# --- tokenizer.json -----------------------------------------------------------------------------------------


def asset_with(folder: Path, **config) -> Path:
  copy_tokenizer(ASSET, folder)
  found = json.loads((folder / "tokenizer_config.json").read_text())
  write(folder / "tokenizer_config.json", {**found, **config})
  return folder


@pytest.mark.parametrize(
  ("config", "expected"),
  [
    ({}, False),
    ({"add_bos_token": False, "tokenizer_class": "LlamaTokenizer"}, False),
    ({"add_bos_token": True, "bos_token": "<|im_start|>"}, True),
    ({"tokenizer_class": "InternLM2Tokenizer", "bos_token": "<|im_start|>"}, True),
    ({"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<|im_start|>"}, True),
  ],
)
def test_add_bos_token_of_a_tokenizer_json(tmp_path, config, expected):
  tokenizer = load_tokenizer(asset_with(tmp_path, **config))
  assert tokenizer.add_bos_token is expected
  assert (tokenizer("red").input_ids[0] == 1) is expected
  assert ids(tokenizer, CHAT) == ids(load_tokenizer(ASSET), CHAT)


def test_contradictions_of_a_tokenizer_json(tmp_path):
  refused(asset_with(tmp_path, add_bos_token=True), "add_bos_token is true but bos_token is not set")
  decoder = entries({400: "<|im_end|>"})
  refused(
    asset_with(tmp_path, added_tokens_decoder=decoder), "'<|im_end|>' has id 2 by the vocabulary but 400"
  )
  asset_with(tmp_path)
  refused(damage(tmp_path, "tokenizer.json", lambda data: data[:-9]), "tokenizer.json: not valid JSON")
  refused(damage(tmp_path, "tokenizer.json", lambda data: b"[]"), "holds a list, expected a JSON object")
  for name in FILES:
    (tmp_path / name).unlink(missing_ok=True)
  refused(
    tmp_path, "no tokenizer there; it needs tokenizer.json, tokenizer.model, or vocab.json and merges.txt"
  )


# --- Image tokens, saving -----------------------------------------------------------------------------------


def without_image_tokens(folder: Path) -> Path:
  """The small tokenizer before InternVL's tokens were added."""
  raw = json.loads((ASSET / "tokenizer.json").read_text())
  config = json.loads((ASSET / "tokenizer_config.json").read_text())
  kept = [token for token in raw["added_tokens"] if token["content"] not in IMAGE_TOKENS]
  words = [word for word in raw["model"]["vocab"] if word not in IMAGE_TOKENS]
  raw["model"]["vocab"] = {word: index for index, word in enumerate(words)}
  raw["added_tokens"] = [{**token, "id": words.index(token["content"])} for token in kept]
  write(folder / "tokenizer.json", raw)
  del config["added_tokens_decoder"]
  special = ["<|im_start|>", "<|im_end|>"]
  write(folder / "tokenizer_config.json", {**config, "additional_special_tokens": special, "mine": [1]})
  write(folder / "special_tokens_map.json", {"eos_token": "<|im_end|>", "additional_special_tokens": special})
  return folder


def test_image_tokens_follow_the_vocabulary_in_order(tmp_path):
  tokenizer = load_tokenizer(without_image_tokens(tmp_path))
  size = len(tokenizer)
  assert add_image_tokens(tokenizer) == 9
  assert tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS)) == list(range(size, size + 9))
  assert add_image_tokens(tokenizer) == 0
  assert add_image_tokens(load_tokenizer(ASSET)) == 0


def test_a_tokenizer_left_alone_is_copied_byte_for_byte(tmp_path, internlm2):
  for name, source in (("json", ASSET), ("model", internlm2)):
    target = tmp_path / name
    target.mkdir()
    save_tokenizer(load_tokenizer(source), source, target)
    wanted = {file: (source / file).read_bytes() for file in FILES if (source / file).is_file()}
    assert {path.name: path.read_bytes() for path in target.iterdir()} == wanted


def vocabulary_files(folder: Path) -> Path:
  """A folder as the reference saves Qwen2's: vocab.json and merges.txt, no tokenizer.json."""
  letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
  write(folder / "vocab.json", {piece: index for index, piece in enumerate([*letters, "Th", "The"])})
  (folder / "merges.txt").write_text("#version: 0.2\nT h\nTh e\n")
  size = len(letters) + 2
  write(folder / "added_tokens.json", {"<|im_start|>": size, "<|im_end|>": size + 1})
  decoder = entries({size: "<|im_start|>", size + 1: "<|im_end|>"})
  config = {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "bos_token": None}
  write(folder / "tokenizer_config.json", {**config, "added_tokens_decoder": decoder})
  write(folder / "config.json", {"model_type": "internvl_chat", "auto_map": {"AutoConfig": "no.Such"}})
  return folder


@pytest.mark.parametrize("kind", ["json", "vocab", "internlm2", "llama"])
def test_added_tokens_are_saved(tmp_path, kind, internlm2, llama):
  source, target = tmp_path / "source", tmp_path / "target"
  source.mkdir()
  target.mkdir()
  sources = {"json": without_image_tokens, "vocab": vocabulary_files}
  source = sources[kind](source) if kind in sources else {"internlm2": internlm2, "llama": llama}[kind]
  tokenizer = load_tokenizer(source)
  assert add_image_tokens(tokenizer) == 9
  tokenizer("padded", padding="max_length", max_length=40, truncation=True) if tokenizer.pad_token else None
  save_tokenizer(tokenizer, source, target)

  loaded = [load_tokenizer(target), PreTrainedTokenizerFast.from_pretrained(target)]
  if kind != "internlm2":  # It names code of its own.
    loaded.append(AutoTokenizer.from_pretrained(target, local_files_only=True, trust_remote_code=False))
  for text in (CHAT, "The house", "<box>[1, 2]</box>The"):
    assert {tuple(ids(other, text)) for other in loaded} == {tuple(ids(tokenizer, text))}
  assert loaded[0].get_vocab() == tokenizer.get_vocab()
  assert loaded[0].add_bos_token is tokenizer.add_bos_token
  assert add_image_tokens(loaded[0]) == 0

  before, after = (json.loads((f / "tokenizer_config.json").read_text()) for f in (source, target))
  changed = {key for key in before if before[key] != after[key]}
  assert changed <= {"added_tokens_decoder", "additional_special_tokens"}
  assert set(after["additional_special_tokens"]) >= set(IMAGE_TOKENS)
  size = len(tokenizer) - 9
  assert after["added_tokens_decoder"][str(size)]["content"] == "<img>"
  for name in ("vocab.json", "merges.txt", "tokenizer.model"):
    if (source / name).is_file():
      assert (target / name).read_bytes() == (source / name).read_bytes()
  if (source / "added_tokens.json").is_file():
    assert json.loads((target / "added_tokens.json").read_text())["</box>"] == size + 8
  if (source / "special_tokens_map.json").is_file():
    special = json.loads((target / "special_tokens_map.json").read_text())
    assert special["additional_special_tokens"][-9:] == list(IMAGE_TOKENS)


@pytest.mark.parametrize("added", [False, True])
def test_a_portable_copy_needs_no_code(tmp_path, internlm2, llama, added):
  for source, first in ((internlm2, [1]), (llama, [])):
    target = tmp_path / source.name
    target.mkdir()
    tokenizer = load_tokenizer(source)
    if added:
      add_image_tokens(tokenizer)
    save_tokenizer(tokenizer, source, target, portable=True)
    write(target / "config.json", {"model_type": "internvl"})
    read = AutoTokenizer.from_pretrained(target, local_files_only=True, trust_remote_code=False)
    for text in TEXTS:
      assert ids(read, text) == ids(tokenizer, text) == ids(load_tokenizer(target), text)
      assert read(text).input_ids == first + ids(read, text)
    assert load_tokenizer(target).add_bos_token is bool(first)
    assert read.chat_template == tokenizer.chat_template


# --- Hub ids ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("OpenGVLab/InternVL2_5-1B", True),
    ("OpenGVLab/InternVL3-2B@refs/pr/1", True),
    ("01-ai/Yi-34B@v1.0", True),
    ("InternVL2_5-1B", False),
    ("./pretrained/InternVL2_5-1B", False),
    ("a/b/c", False),
    ("/a/b", False),
    ("a/b/", False),
    ("a/b@", False),
    ("a--b/c", False),
    ("a/..", False),
    ("gs://bucket/model", False),
    ("模型/模型", False),
    ("", False),
  ],
)
def test_the_form_of_a_hub_id(name, expected):
  assert hub.is_hub_id(name) is expected


def test_a_folder_is_its_own_checkpoint(tmp_path, monkeypatch):
  monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
  (tmp_path / "org" / "name").mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  assert hub.local_folder("org/name") == Path("org/name")
  with pytest.raises(UserError, match=r"'\./none': no such folder; give a checkpoint's folder or its hub id"):
    hub.local_folder("./none")


def test_a_hub_id_is_fetched(tmp_path, monkeypatch):
  asked = {}

  def download(repo_id, **options):
    asked.update(options, repo_id=repo_id)
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  assert hub.local_folder("org/name@v1") == tmp_path
  assert (asked["repo_id"], asked["revision"]) == ("org/name", "v1")
  wanted = (
    "config.json",
    "model-00001-of-00002.safetensors",
    "tokenizer.model",
    "merges.txt",
    "a.py",
    "b.jinja",
  )
  kept = huggingface_hub.utils.filter_repo_objects(
    [*wanted, "pytorch_model.bin", "README.md", "original/model.safetensors"],
    allow_patterns=asked["allow_patterns"],
    ignore_patterns=asked["ignore_patterns"],
  )
  assert list(kept) == list(wanted)
  hub.local_folder("org/name")
  assert asked["revision"] is None


def http_error(kind):
  """One of the hub's errors, which come with a response that the messages do not use."""
  error = kind.__new__(kind)
  error.args = ("404 Client Error.\nmore lines",)
  return error


@pytest.mark.parametrize(
  ("error", "message"),
  [
    (http_error(errors.GatedRepoError), "access to this model must be granted"),
    (http_error(errors.RepositoryNotFoundError), "no such folder, and no such model on the hub"),
    (http_error(errors.RevisionNotFoundError), "the model has no revision 'v1'"),
    (errors.LocalEntryNotFoundError("Cannot find.\nmore"), "the hub cannot be reached (Cannot find.)"),
    (http_error(errors.HfHubHTTPError), "could not be fetched from the hub (404 Client Error.)"),
    (OSError("No space left on device"), "could not be fetched from the hub (No space left on device)"),
  ],
  ids=lambda value: type(value).__name__,
)
def test_a_hub_id_that_cannot_be_fetched(monkeypatch, error, message):
  def download(*args, **kwargs):
    raise error

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  with pytest.raises(UserError) as caught:
    hub.local_folder("org/name@v1")
  assert str(caught.value).startswith("'org/name@v1': ") and message in str(caught.value)
  assert "\n" not in str(caught.value)


def test_offline_is_one_line(tmp_path, monkeypatch):
  """The hub's own code, with the network switched off and an empty cache."""
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
  with pytest.raises(UserError, match="the hub cannot be reached") as caught:
    hub.local_folder("org/name")
  assert "HF_HOME" in str(caught.value) and "\n" not in str(caught.value)


def test_the_model_reader_survives_any_cut(tmp_path):
  data = train(tmp_path).read_bytes()
  path = tmp_path / "tokenizer.model"
  for end in (1, 2, 3, 5, 100, 2000):
    path.write_bytes(data[:end])
    refused(tmp_path, "not a sentencepiece model")
  path.write_bytes(b"\x0a\x02\x08\x01" + struct.pack("<f", 1.0))
  refused(tmp_path, "not a sentencepiece model")
