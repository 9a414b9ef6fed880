"""Tables of what the entries of a checkpoint's JSON files may be: their types and ranges, checked where a file is read.

Entries that no table names are not read. The ranges are far beyond what any model has and far below what would not
end: a size is refused because it cannot be meant.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from internvl_jax.errors import UserError
from internvl_jax.hf.files import shown


@dataclasses.dataclass(frozen=True)
class Kind:
  """What a value may be.

  Attributes:
    words: for messages, after "expected".
    holds: whether a value is so.
  """

  words: str
  holds: Callable[[Any], bool]

  def __or__(self, other: "Kind") -> "Kind":
    return Kind(f"{self.words} or {other.words}", lambda value: self.holds(value) or other.holds(value))


Table = Mapping[str, Kind]


def check(place: str, entries: Mapping[str, Any], table: Table) -> None:
  """Checks the entries of a JSON object by a table of types and ranges.

  Args:
    place: the file, and what leads to the object within it: "config.json: llm_config.".
    entries: the object.
    table: by an entry's name, what it may be.

  Raises:
    UserError: the first that is not.
  """
  for name, kind in table.items():
    if name in entries and not kind.holds(entries[name]):
      raise UserError(f"{place}{name}={shown(entries[name])} is not supported; expected {kind.words}")


def integer(low: int, high: int) -> Kind:
  """An integer from `low` to `high`."""
  return Kind(
    f"an integer from {low} to {high}",
    lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
  )


def number(low: float, high: float) -> Kind:
  """A number above `low` and up to `high`."""
  return Kind(
    f"a number above {low:g} and up to {high:g}",
    # Compared before anything is made of it: an integer may be too large for a float.
    lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low < value <= high,
  )


def each(kind: Kind, most: int = 10_000) -> Kind:
  """A list of values of a kind."""
  return Kind(
    f"a list of at most {most}, each {kind.words}",
    lambda value: isinstance(value, list) and len(value) <= most and all(map(kind.holds, value)),
  )


def one_of(*values: Any) -> Kind:
  """One of some texts."""
  return Kind(" or ".join(map(repr, values)), lambda value: isinstance(value, str) and value in values)


def _of(kind: type, words: str) -> Kind:
  return Kind(words, lambda value: isinstance(value, kind))


FLAG = _of(bool, "true or false")
TEXT = _of(str, "text")
OBJECT = _of(dict, "an object")
NOTHING = Kind("null", lambda value: value is None)
OFF = Kind("false", lambda value: value is False)
SHARE = Kind(
  "a number from 0 to 1",
  lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1,
)

_SIZE = integer(1, 2**20)
_COUNT = integer(1, 1024)
_LENGTH = integer(2, 2**31 - 1)
_LAYERS = integer(1, 512)
_EPSILON = number(0, 1)
_FACTOR = number(0, 1e6)
_SIDE = integer(1, 2048)
_TILES = integer(1, 4096)
_ID = integer(-1, 2**31 - 1)  # -1 means that there is none.

# --- config.json --------------------------------------------------------------------------------------------

LANGUAGE_MODEL: Table = {
  "model_type": TEXT,
  "vocab_size": integer(1, 2**24),
  "hidden_size": _SIZE,
  "intermediate_size": _SIZE,
  "num_hidden_layers": _LAYERS,
  "num_attention_heads": _COUNT,
  "num_key_value_heads": _COUNT | NOTHING,
  "head_dim": integer(4, 2**14) | NOTHING,
  "max_position_embeddings": _LENGTH,
  "original_max_position_embeddings": _LENGTH | NOTHING,
  "rope_theta": number(1, 1e15),
  "rope_scaling": OBJECT | NOTHING,
  "rope_parameters": OBJECT | NOTHING,
  "partial_rotary_factor": _FACTOR | NOTHING,
  "rms_norm_eps": _EPSILON,
  "attention_bias": FLAG,
  "bias": FLAG,
  "qkv_bias": FLAG,
  "mlp_bias": FLAG,
  "tie_word_embeddings": FLAG | NOTHING,
  "use_sliding_window": FLAG,
  "sliding_window": integer(1, 2**31 - 1) | NOTHING,
  "layer_types": each(TEXT) | NOTHING,
  "num_experts": _COUNT,
  "num_local_experts": _COUNT,
  "num_experts_per_tok": _COUNT,
  "moe_intermediate_size": _SIZE,
  "norm_topk_prob": FLAG,
  "swiglu_limit": number(0, 1e30),
  "swiglu_alpha": number(0, 1e6),
  "quantization_config": OBJECT | NOTHING,
}

ROPE: Table = {
  "rope_type": TEXT | NOTHING,
  "type": TEXT | NOTHING,
  "rope_theta": number(1, 1e15) | NOTHING,
  "factor": _FACTOR | NOTHING,
  "partial_rotary_factor": _FACTOR | NOTHING,
  "original_max_position_embeddings": _LENGTH | NOTHING,
  "low_freq_factor": _FACTOR,
  "high_freq_factor": _FACTOR,
  "short_factor": each(_FACTOR),
  "long_factor": each(_FACTOR),
  "attention_factor": _FACTOR | NOTHING,
  "beta_fast": _FACTOR | NOTHING,
  "beta_slow": _FACTOR | NOTHING,
  "truncate": FLAG | NOTHING,
}

VISION: Table = {
  "hidden_size": _SIZE,
  "intermediate_size": _SIZE,
  "num_hidden_layers": _LAYERS,
  "num_attention_heads": _COUNT,
  "patch_size": _SIDE | each(_SIDE, 2),
  "image_size": _SIDE | each(_SIDE, 2),
  "norm_type": one_of("layer_norm", "rms_norm"),
  "layer_norm_eps": _EPSILON,
  "qkv_bias": FLAG,
  "qk_normalization": FLAG,
  "attention_bias": FLAG,
  "use_qk_norm": FLAG,
  "initializer_factor": number(-1e6, 1e6),
  "layer_scale_init_value": number(-1e6, 1e6),
}

MODEL: Table = {
  "downsample_ratio": number(0.01, 1),
  "select_layer": integer(-513, 512),
  "vision_feature_layer": integer(-513, 512),
  "force_image_size": _SIDE | NOTHING,
  "ps_version": one_of("v1", "v2"),
  "use_llm_lora": integer(0, 2**16) | OFF | NOTHING,
  "use_backbone_lora": integer(0, 2**16) | OFF | NOTHING,
  "tie_word_embeddings": FLAG | NOTHING,
  "quantization_config": OBJECT | NOTHING,
  "image_token_id": _ID | NOTHING,
  "flash_mode": FLAG | NOTHING,
  "flash_relative_threshold": SHARE | NOTHING,
  "flash_absolute_threshold": SHARE | NOTHING,
  "template": TEXT,
  "system_message": TEXT | NOTHING,
  **dict.fromkeys(("dynamic_image_size", "use_thumbnail", "pad2square"), FLAG | NOTHING),
  **dict.fromkeys(("min_dynamic_patch", "max_dynamic_patch"), _TILES | NOTHING),
}

# --- The files beside it ------------------------------------------------------------------------------------

_STATISTIC = each(number(-1e3, 1e3), 3) | number(-1e3, 1e3) | NOTHING

PREPROCESSOR: Table = {
  "image_mean": _STATISTIC,
  "image_std": _STATISTIC,
  "min_patches": _TILES | NOTHING,
  "max_patches": _TILES | NOTHING,
  "num_frames": integer(1, 2**16) | NOTHING,
}

GENERATION: Table = {
  name: _ID | each(_ID, 1000) | NOTHING for name in ("bos_token_id", "eos_token_id", "pad_token_id")
}

_ADDED: Table = {
  "content": TEXT,
  **dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), FLAG),
}


def _is_token(value: Any) -> bool:
  """Whether a value is a token: its text, or an object with its text and flags."""
  if isinstance(value, str):
    return True
  if not isinstance(value, dict) or "content" not in value:
    return False
  return all(kind.holds(value[name]) for name, kind in _ADDED.items() if name in value)


def check_added_tokens(place: str, tokens: Mapping[str, Any]) -> None:
  """Sees that an `added_tokens_decoder` holds tokens with their flags, by id.

  Raises:
    UserError: the first that is none.
  """
  for index, token in tokens.items():
    if not (index.isascii() and index.isdecimal() and len(index) < 10):
      raise UserError(f"{place}added_tokens_decoder: {shown(index)} is no id; expected a number as text")
    if not (isinstance(token, dict) and _is_token(token)):
      raise UserError(
        f"{place}added_tokens_decoder.{index}={shown(token)} is not supported; expected an object with a token's content "
        "and flags"
      )


def _is_template(value: Any) -> bool:
  """Whether a value is a chat template, or a list of named ones, or an object of them."""
  if isinstance(value, list):
    texts = [one.get(name) for one in value if isinstance(one, dict) for name in ("name", "template")]
    return len(texts) == 2 * len(value) and all(isinstance(text, str) for text in texts)
  return isinstance(value, str) or (
    isinstance(value, dict) and all(isinstance(one, str) for one in value.values())
  )


TOKEN = Kind("a token (text, or an object with its content and flags)", _is_token)
TOKENS = each(TOKEN, 2**20)
NAMED_TOKENS = Kind(
  "an object of named tokens", lambda value: isinstance(value, dict) and all(map(_is_token, value.values()))
)
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

TOKENIZER: Table = {
  "tokenizer_class": TEXT | NOTHING,
  **dict.fromkeys(_NAMED, TOKEN | NOTHING),
  "additional_special_tokens": TOKENS | NOTHING,
  "extra_special_tokens": TOKENS | NAMED_TOKENS | NOTHING,
  "added_tokens_decoder": OBJECT,
  "model_max_length": number(0, 1e300) | NOTHING,
  **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space"), FLAG | NOTHING),
  **dict.fromkeys(("legacy", "clean_up_tokenization_spaces", "split_special_tokens"), FLAG | NOTHING),
  **dict.fromkeys(("padding_side", "truncation_side"), one_of("left", "right") | NOTHING),
  "chat_template": Kind("text, or a list or object of named texts", _is_template) | NOTHING,
}

SPECIAL_TOKENS: Table = {
  name: TOKENIZER[name] for name in (*_NAMED, "additional_special_tokens", "extra_special_tokens")
}

ADAPTER: Table = {
  "base_model_name_or_path": TEXT | NOTHING,
  "revision": TEXT | NOTHING,
  "lora_alpha": number(0, 1e6),
  "alpha_pattern": Kind(
    "an object of numbers",
    lambda value: isinstance(value, dict) and all(number(0, 1e6).holds(one) for one in value.values()),
  )
  | NOTHING,
  "lora_dropout": SHARE,
  "use_dora": FLAG,
  "use_rslora": FLAG,
}
