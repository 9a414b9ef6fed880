"""Tokenizers, from a checkpoint's own files; code that a checkpoint brings is never run."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from internvl_jax.errors import UserError
from internvl_jax.hf import entries, sentencepiece
from internvl_jax.hf.files import read_json, shown, shown_error, what_it_is
from internvl_jax.outputs import write_json

FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "tokenizer.model",
  "chat_template.json",
  "chat_template.jinja",
)
"""What a tokenizer may consist of."""

IMAGE_TOKENS = (
  "<img>",
  "</img>",
  "<IMG_CONTEXT>",
  "<quad>",
  "</quad>",
  "<ref>",
  "</ref>",
  "<box>",
  "</box>",
)
"""The tokens that InternVL adds to a language model's, in the order of their ids."""

# Their own code begins texts with a bos token unless the config says otherwise, and names the special tokens so.
_SENTENCEPIECE_CLASSES = ("InternLM2Tokenizer", "InternLM3Tokenizer", "LlamaTokenizer")
_SENTENCEPIECE_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

# Of these, the ones that put the space at the start of the text only, where the config says legacy=false.
_LEGACY_CLASSES = ("InternLM3Tokenizer", "LlamaTokenizer")

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
BEGINS_WITH_BOS = "chat_template_writes_bos"
"""Entry of tokenizer_config.json: conversations begin with a bos token, but by the chat template."""

_KEPT = (
  "model_max_length",
  "padding_side",
  "truncation_side",
  "clean_up_tokenization_spaces",
  "chat_template",
)
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


def has_tokenizer(folder: Path) -> bool:
  """Whether a folder has files that a tokenizer is read from."""
  return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
  """The tokenizer of a checkpoint folder; its attribute `add_bos_token` is as the checkpoint means it.

  Its tokenizer.json is used unchanged where there is one: classes named in tokenizer_config.json may
  rebuild it, and differ from one release of transformers to the next. A tokenizer.model is converted here,
  for the same reason and because the class for it may be code that the checkpoint brings.

  Raises:
    UserError: the folder has no tokenizer that can be read, or its files contradict each other.
  """
  folder = Path(folder)
  config = _read_entries(folder / "tokenizer_config.json", entries.TOKENIZER)
  entries.check_added_tokens(f"{folder / 'tokenizer_config.json'}: ", config.get("added_tokens_decoder", {}))
  _read_entries(folder / "special_tokens_map.json", entries.SPECIAL_TOKENS)
  for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"):
    path = folder / name
    if path.is_file() and path.stat().st_size and (found := what_it_is(path)):
      raise UserError(f"{path}: {found}")
  try:
    if (folder / "tokenizer.json").is_file():
      _read_json(folder / "tokenizer.json")  # The library's own error for damaged JSON names no file.
      tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    elif (folder / "tokenizer.model").is_file():
      tokenizer = _from_sentencepiece(folder, config)
    elif not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
      # transformers would make an empty tokenizer of a config alone.
      raise UserError(
        f"{folder}: no tokenizer there; it needs tokenizer.json, tokenizer.model, or vocab.json and merges.txt"
      )
    else:
      tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
  except UserError:
    raise
  except Exception as error:  # tokenizers raises bare ones; transformers, whatever its reading trips over.
    raise UserError(
      f"{folder}: no tokenizer could be read there ({type(error).__name__}: {shown_error(error)}); take the files of one "
      "checkpoint, downloaded again"
    ) from error
  _check_ids(folder, config, tokenizer)
  _set_bos(folder, config, tokenizer)
  return tokenizer


def placeholder_tokens(folder: Path) -> set[str]:
  """Tokens that are in prompts and never in ids: transformers' processor replaces them by frames."""
  config = _read_json(folder / "tokenizer_config.json")
  extra = config.get("extra_special_tokens")
  entries = {**config, **(extra if isinstance(extra, dict) else {})}
  return {_content(entries[key]) for key in ("video_token",) if entries.get(key) is not None}


def add_image_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
  """Adds those of `IMAGE_TOKENS` that the tokenizer lacks, as special tokens.

  Returns:
    how many ids the tokenizer grew by; the embeddings must follow.
  """
  before = len(tokenizer)
  tokenizer.add_tokens(list(IMAGE_TOKENS), special_tokens=True)
  return len(tokenizer) - before


def save_tokenizer(
  tokenizer: PreTrainedTokenizerBase,
  source_folder: str | Path,
  target_folder: str | Path,
  *,
  portable: bool = False,
) -> None:
  """Saves a tokenizer that was loaded from `source_folder`.

  With no token added, the source's files are copied. Else they are completed by the added tokens, so that
  readers of a tokenizer.json and those of a tokenizer.model or vocab.json give the same ids; all that the
  source's configs have besides stays.

  Args:
    tokenizer: what to save.
    source_folder: where it came from.
    target_folder: where to; must be there.
    portable: where the source needs code of its own, or where transformers would convert its tokenizer.model
      in another way than the reference reads it, or gives other ids for any reason, the copy names the plain class
      that reads its tokenizer.json unchanged. The reference's own code no longer finds its class then.

  Raises:
    UserError: the source's files cannot be read.
  """
  source, target = Path(source_folder), Path(target_folder)
  copy_tokenizer(source, target)
  config = _read_json(source / "tokenizer_config.json")
  if config.pop(BEGINS_WITH_BOS, False):
    config["add_bos_token"] = True
    write_json(target / "tokenizer_config.json", config)
  has_json = (source / "tokenizer.json").is_file()
  rename = portable and (
    "auto_map" in config
    or (not has_json and (source / "tokenizer.model").is_file())
    or not _reads_alike(tokenizer, target)
  )
  added, old = _added_tokens(tokenizer), _added_tokens(load_tokenizer(source))
  if added == old and not rename:
    return
  new = {entry["content"]: index for index, entry in added.items() if old.get(index) != entry}
  special = [name for name, index in new.items() if added[index]["special"]]

  raw = json.loads(_backend(tokenizer).to_str())
  if has_json:  # Nothing but the added tokens changes.
    raw = _read_json(source / "tokenizer.json") | {"added_tokens": raw["added_tokens"]}
  write_json(target / "tokenizer.json", raw)

  config = _completed(config or _minimal_config(tokenizer), added, special)
  if _class_of(config) in _LEGACY_CLASSES and not has_json:
    config.setdefault("legacy", True)  # What its absence means, except to transformers 5.
  if rename:
    config.pop("auto_map", None)
    named = _minimal_config(tokenizer)
    config |= {**named, "add_bos_token": bool(getattr(tokenizer, "add_bos_token", False))}
  write_json(target / "tokenizer_config.json", config)
  _save_token_lists(source, target, new, special)


def _completed(
  config: dict[str, Any], added: Mapping[int, dict[str, Any]], special: Sequence[str]
) -> dict[str, Any]:
  """A tokenizer_config.json with all added tokens, of which those named `special` are new and special."""
  decoder = {str(index): entry for index, entry in added.items()} | config.get("added_tokens_decoder", {})
  config["added_tokens_decoder"] = dict(sorted(decoder.items(), key=lambda item: int(item[0])))
  _extend_special(config, special)
  return config


def _save_token_lists(source: Path, target: Path, new: Mapping[str, int], special: Sequence[str]) -> None:
  """Adds new tokens to those files of the source that list tokens once more."""
  if (source / "special_tokens_map.json").is_file():
    special_map = _read_json(source / "special_tokens_map.json")
    _extend_special(special_map, special)
    write_json(target / "special_tokens_map.json", special_map)
  if (source / "added_tokens.json").is_file():
    write_json(target / "added_tokens.json", _read_json(source / "added_tokens.json") | dict(new))


def save_for_processor(
  tokenizer: PreTrainedTokenizerBase,
  source_folder: str | Path,
  target_folder: str | Path,
  *,
  chat_template: str,
  begins_with_bos: bool,
  names: Mapping[str, str],
) -> None:
  """Saves a tokenizer for transformers' processor of images and texts; see `save_tokenizer`, portable.

  The processor tokenizes what a chat template gives with the special tokens that the tokenizer adds by itself; others
  tokenize it without. So the chat template writes the bos token, and the tokenizer adds none.

  Args:
    tokenizer: what to save.
    source_folder: where it came from.
    target_folder: where to; must be there.
    chat_template: takes the place of all that the source has.
    begins_with_bos: conversations begin with the bos token, which the chat template writes.
    names: of the tokens that the processor asks for.

  Raises:
    UserError: the source's files cannot be read.
  """
  source, target = Path(source_folder), Path(target_folder)
  save_tokenizer(tokenizer, source, target, portable=True)
  (target / "chat_template.json").unlink(missing_ok=True)
  (target / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
  path, backend = target / "tokenizer_config.json", target / "tokenizer.json"
  config = _read_json(path)
  extra = config.get("extra_special_tokens")
  config["extra_special_tokens"] = {**extra, **names} if isinstance(extra, dict) else dict(names)
  config["processor_class"] = "InternVLProcessor"
  config.pop("chat_template", None)
  adds_bos = bool(config.get("add_bos_token"))
  if backend.is_file() and _backend(tokenizer).encode("").ids:
    adds_bos = True
    write_json(backend, _read_json(backend) | {"post_processor": None})
  if adds_bos or begins_with_bos:
    config["add_bos_token"] = False
    config[BEGINS_WITH_BOS] = begins_with_bos
    if begins_with_bos:
      config["bos_token"] = str(tokenizer.bos_token)
  write_json(path, config)


def spare_token(tokenizer: PreTrainedTokenizerBase, *, used: str) -> str:
  """A special token that can be the placeholder of a video, which the processor replaces by its frames.

  It must be one of the tokenizer's: the embeddings have no row for a new one. One that is made for it is preferred,
  then one that is reserved, then the tokens for padding and the unknown, which no text has.

  Args:
    tokenizer: with the image tokens.
    used: text that has the special tokens which conversations need.
  """
  special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
  free = [name for name in special if name not in (*IMAGE_TOKENS, tokenizer.eos_token) and name not in used]
  for wanted in (r"<video>", r"<\|video_pad\|>", r".*(reserved|unused|placeholder).*"):
    for name in free:
      if re.fullmatch(wanted, name, re.IGNORECASE):
        return name
  unsaid = [name for name in (tokenizer.pad_token, tokenizer.unk_token) if name in free]
  return [*unsaid, *free, "<video>"][0]


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
  """Copies a tokenizer's files byte for byte, so that every reader of the source reads the copy alike."""
  for name in FILES:
    if (Path(source) / name).is_file():
      shutil.copyfile(Path(source) / name, Path(target) / name)


# --- Loading ------------------------------------------------------------------------------------------------


def _class_of(config: Mapping[str, Any]) -> str:
  return str(config.get("tokenizer_class")).removesuffix("Fast")


def _from_sentencepiece(folder: Path, config: Mapping[str, Any]) -> PreTrainedTokenizerFast:
  """The tokenizer of a folder whose tokenizer.model is all that knows the vocabulary."""
  model = sentencepiece.read_model(folder / "tokenizer.model")
  special_map = _read_json(folder / "special_tokens_map.json")
  if "added_tokens_decoder" in config:  # Written by later releases, which then do not read the other files.
    special_map = {}
  entries = {**config, **special_map}
  named = {"bos_token": model.bos, "eos_token": model.eos, "unk_token": model.unk}
  named |= {key: _content(entries[key]) for key in _NAMED if entries.get(key) is not None}
  extra = [_content(token) for key in _extra_keys(entries) for token in entries[key]]
  special = [name for name in [*named.values(), *extra] if name is not None]
  backend = sentencepiece.build_tokenizer(
    model, _added_by_files(folder, config, model, special), prefix=_prefix(config, model)
  )
  options = {key: config[key] for key in _KEPT if config.get(key) is not None}
  if (folder / "chat_template.jinja").is_file():
    options["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
  return PreTrainedTokenizerFast(
    tokenizer_object=backend, name_or_path=str(folder), extra_special_tokens=extra, **named, **options
  )


def _added_by_files(
  folder: Path, config: Mapping[str, Any], model: sentencepiece.SentencePieceModel, special: list[str]
) -> dict[int, AddedToken]:
  """The tokens beside the pieces, by id: those that the files name, then special ones without an id."""
  # Looked for in the text as it is, whatever the files say: so does the code that their `normalized` is for.
  added = {
    int(index): AddedToken(**{**entry, "normalized": False})
    for index, entry in config.get("added_tokens_decoder", {}).items()
  }
  if not added:
    for name, index in _read_json(folder / "added_tokens.json").items():
      added[index] = AddedToken(name, special=name in special, normalized=False)
  known = {token.content for token in added.values()}
  ids = {piece: index for index, piece in enumerate(model.pieces)}
  for name in special:
    if name not in known:
      known.add(name)
      index = ids.get(name, max([len(ids), *(i + 1 for i in added)]))
      added[index] = AddedToken(name, special=True, normalized=False)
  return added


def _prefix(
  config: Mapping[str, Any], model: sentencepiece.SentencePieceModel
) -> Literal["each", "first", "never"]:
  if _class_of(config) in _LEGACY_CLASSES and config.get("legacy") is False:
    return "never" if config.get("add_prefix_space") is False else "first"
  return "each" if model.add_dummy_prefix else "never"


def _check_ids(folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
  vocabulary = tokenizer.get_vocab()
  decoder = config.get("added_tokens_decoder", {})
  stated = [(_content(entry), int(index), "tokenizer_config.json") for index, entry in decoder.items()]
  added = _read_json(folder / "added_tokens.json")
  stated += [(name, index, "added_tokens.json") for name, index in added.items()]
  for name, index, file in stated:
    if vocabulary.get(name) != index:
      raise UserError(
        f"{folder}: {shown(name)} has id {vocabulary.get(name)} by the vocabulary but {index} by {file}; take all files "
        "from one checkpoint (a tokenizer.json may be left out where there is a tokenizer.model)"
      )


def _set_bos(folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
  """Sets `add_bos_token`, which transformers drops where there is a tokenizer.json."""
  ours = _class_of(config) in _SENTENCEPIECE_CLASSES
  if not config.get(BEGINS_WITH_BOS, config.get("add_bos_token", ours)):
    return
  for key, name in _SENTENCEPIECE_TOKENS.items():
    if ours and getattr(tokenizer, key) is None and name in tokenizer.get_vocab():
      setattr(tokenizer, key, name)
  if tokenizer.bos_token is None:
    raise UserError(
      f"{folder / 'tokenizer_config.json'}: add_bos_token is true but bos_token is not set; set it, or "
      "add_bos_token to false"
    )
  tokenizer.add_bos_token = True


# --- Saving -------------------------------------------------------------------------------------------------


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
  """A copy of the tokenizer's backend that neither pads nor truncates."""
  shared: Any = tokenizer.backend_tokenizer
  backend = Tokenizer.from_str(shared.to_str())
  backend.no_padding()
  backend.no_truncation()
  return backend


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, dict[str, Any]]:
  """The tokens beside the vocabulary, by id, in the form of tokenizer_config.json."""
  return {
    index: {"content": token.content, **{flag: getattr(token, flag) for flag in _FLAGS}}
    for index, token in sorted(tokenizer.added_tokens_decoder.items())
  }


_PROBE = "user\n What is 3 + 4?  \n\n中文 naïve, isn't it?\t▁ <box>[[1, 2]]</box> "


def _reads_alike(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
  """Whether transformers, by the class that a folder's config names, gives the ids that we give."""
  try:
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
  except (OSError, ValueError, ImportError, KeyError):
    return False
  ours = _backend(tokenizer)
  special = [name for name in theirs.get_added_vocab() if ours.token_to_id(name) is not None]
  text = _PROBE + "".join(f"{name}{_PROBE}" for name in special)
  return theirs(text, add_special_tokens=False).input_ids == ours.encode(text, add_special_tokens=False).ids


def _minimal_config(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
  named = {key: getattr(tokenizer, key) for key in _NAMED if getattr(tokenizer, key) is not None}
  return {"tokenizer_class": "PreTrainedTokenizerFast", **named}


def _extra_keys(entries: Mapping[str, Any]) -> list[str]:
  """Names under which special tokens without a part of their own are listed; the second is transformers 5's."""
  keys = ("additional_special_tokens", "extra_special_tokens")
  return [key for key in keys if isinstance(entries.get(key), list)]


def _extend_special(entries: dict[str, Any], names: Sequence[str]) -> None:
  for key in _extra_keys(entries) or ["additional_special_tokens"]:
    listed = entries.get(key, [])
    present = {_content(token) for token in listed}
    entries[key] = [*listed, *(name for name in names if name not in present)]


# --- Files --------------------------------------------------------------------------------------------------


def _content(token: Any) -> str:
  """The text of a token, which configs give as such or with its flags."""
  return token["content"] if isinstance(token, Mapping) else str(token)


def _read_json(path: Path) -> dict[str, Any]:
  """A file's object; an empty one if there is no such file."""
  return read_json(path) if path.is_file() else {}


def _read_entries(path: Path, table: entries.Table) -> dict[str, Any]:
  """A file's JSON object, checked by the table; an empty one if there is no such file."""
  found = _read_json(path)
  entries.check(f"{path}: ", found, table)
  return found
