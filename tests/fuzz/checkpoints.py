"""Folders of checkpoints of both layouts: configs and tokenizers with values that no one should write."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from internvl_jax import inference
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.hf import published
from internvl_jax.hf.model import open_source
from internvl_jax.hf.tokenizer import add_image_tokens, load_tokenizer
from internvl_jax.inference_settings import read_stated
from tests.fuzz import odd
from tests.support.toy import ASSETS

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_PREPROCESSOR = {
  "image_mean": [0.485, 0.456, 0.406],
  "image_std": [0.229, 0.224, 0.225],
  "crop_to_patches": True,
}
_PREPROCESSOR |= {"min_patches": 1, "max_patches": 12, "size": {"height": 448, "width": 448}}
_ROPES = (
  {"rope_type": "linear", "factor": 2.0},
  {"type": "dynamic", "factor": 2.0},
  {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
  {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
  {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
)
_WITH_WEIGHTS = ("curve/init", "curve_internlm2/init", "hf_qwen3")
_WEIGHTS = "model.safetensors"
# One of each family.
_SIZES = ("2-4b", "2-8b", "2-40b", "3-8b", "3-9b", "3.5-8b", "3.5-20b-a4b", "3.5-30b-a3b")


def _small(size: str) -> dict[str, Any]:
  """The config of a published size, of few layers."""
  config = json.loads(json.dumps(published.config_of(size)))
  config["vision_config"]["num_hidden_layers"] = config["llm_config"]["num_hidden_layers"] = 2
  config["llm_config"].pop("layer_types", None)
  return {"template": "internvl2_5", **config}


def _asset(name: str) -> dict[str, Any]:
  return json.loads((ASSETS / name).read_text())


def folders() -> list[dict[str, Any]]:
  """Returns what stands in the files of folders, by their names, and the path of the weights if any."""
  configs = [*(_asset(f"{name}/config.json") for name in _WITH_WEIGHTS), *map(_small, _SIZES)]
  files = {name: _asset(f"tokenizer/{name}") for name in _TOKENIZER}
  files |= {
    "generation_config.json": _asset("hf_qwen3/generation_config.json"),
    "preprocessor_config.json": _PREPROCESSOR,
  }
  weights = [str(ASSETS / name / "model.safetensors") for name in _WITH_WEIGHTS] + [None] * len(_SIZES)
  return [
    {"config.json": config, **files, _WEIGHTS: path} for config, path in zip(configs, weights, strict=True)
  ]


_SHAPES = (
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
  "num_key_value_heads",
)
_SHAPES += (
  "head_dim",
  "vocab_size",
  "image_size",
  "patch_size",
  "num_experts",
  "num_local_experts",
  "num_experts_per_tok",
)
_SHAPES += (
  "moe_intermediate_size",
  "sliding_window",
  "max_position_embeddings",
  "rope_theta",
  "rms_norm_eps",
)
_SHAPES += ("layer_norm_eps", "initializer_factor", "swiglu_limit")
_SWITCHES = (
  "qkv_bias",
  "attention_bias",
  "bias",
  "qk_normalization",
  "norm_type",
  "hidden_act",
  "model_type",
  "layer_types",
)
_SWITCHES += ("tie_word_embeddings", "norm_topk_prob", "rope_scaling", "use_sliding_window")
_WHOLE = (
  "downsample_ratio",
  "select_layer",
  "force_image_size",
  "ps_version",
  "template",
  "vision_feature_layer",
)
_WHOLE += (
  "use_llm_lora",
  "use_backbone_lora",
  "dynamic_image_size",
  "min_dynamic_patch",
  "max_dynamic_patch",
  "pad2square",
)
_WHOLE += (
  "model_type",
  "tie_word_embeddings",
  "vision_config",
  "llm_config",
  "text_config",
  "quantization_config",
)
_WHOLE += ("system_message", "image_token_id", "image_seq_length", "dtype")
_TOKENS = (
  "added_tokens_decoder",
  "extra_special_tokens",
  "additional_special_tokens",
  "model_max_length",
  "chat_template",
)
_TOKENS += (
  "bos_token",
  "eos_token",
  "pad_token",
  "unk_token",
  "add_bos_token",
  "tokenizer_class",
  "legacy",
  "auto_map",
)
_TOKENS += ("padding_side", "truncation_side", "clean_up_tokenization_spaces", "add_prefix_space")
_NUMBERS = tuple(entry for entry in odd.VALUES if isinstance(entry, int | float))


def _part(rng: np.random.Generator, record: Any) -> dict[str, Any]:
  """Returns the config of one of the model's parts."""
  parts = [
    record[name]
    for name in ("vision_config", "llm_config", "text_config")
    if isinstance(record.get(name), dict)
  ]
  return odd.pick(rng, parts) if parts else record


def size(rng: np.random.Generator, record: Any) -> Any:
  """Gives a part an odd number where shapes come from."""
  _part(rng, record)[odd.pick(rng, _SHAPES)] = odd.pick(rng, _NUMBERS)
  return record


def part(rng: np.random.Generator, record: Any) -> Any:
  """Gives a part an odd value."""
  _part(rng, record)[odd.pick(rng, _SHAPES + _SWITCHES)] = odd.value(rng)
  return record


def whole(rng: np.random.Generator, record: Any) -> Any:
  """Gives the model an odd value, a number half of the times."""
  record[odd.pick(rng, _WHOLE)] = odd.pick(rng, (odd.pick(rng, _NUMBERS), odd.value(rng)))
  return record


def rope(rng: np.random.Generator, record: Any) -> Any:
  """Scales the rotary embedding in one of the ways that there are, at times damaged."""
  scaling = dict(odd.pick(rng, _ROPES))
  name = odd.pick(rng, ("rope_scaling", "rope_parameters"))
  _part(rng, record)[name] = odd.pick(rng, (scaling, odd.set_value(rng, scaling)))
  return record


def tokens(rng: np.random.Generator, record: Any) -> Any:
  """Gives a tokenizer an odd value."""
  record[odd.pick(rng, _TOKENS)] = odd.value(rng)
  return record


CHANGES = {
  "config.json": (*odd.RECORDS[:3], size, size, size, part, whole, whole, rope),
  "tokenizer_config.json": (*odd.RECORDS, tokens, tokens, tokens, tokens),
  "tokenizer.json": odd.RECORDS,
  "special_tokens_map.json": (*odd.RECORDS, tokens),
  "generation_config.json": odd.RECORDS,
  "preprocessor_config.json": odd.RECORDS,
}
"""What is done to which file."""


def write(folder: Path, rng: np.random.Generator, originals: list[dict[str, Any]]) -> list[str]:
  """Writes a folder with one file changed, and returns what was done to which."""
  original = odd.pick(rng, odd.pick(rng, (originals, originals[: len(_WITH_WEIGHTS)])))
  changed = odd.pick(rng, ("config.json",) * 6 + ("tokenizer_config.json",) * 2 + tuple(CHANGES))
  folder.mkdir()
  for name, content in original.items():
    if name == _WEIGHTS:
      if content:
        (folder / name).symlink_to(content)
      continue
    (folder / name).write_text(json.dumps(content))
  record, done = odd.changed(rng, original[changed], CHANGES[changed], most=int(odd.pick(rng, (1, 1, 3))))
  text = odd.dumps(record).encode()
  if rng.random() < 0.1:
    text, more = odd.changed(rng, text, odd.BYTES, most=1)
    done += more
  (folder / changed).write_bytes(text)
  return [changed, *done, *odd.difference(original[changed], record)[:5]]


def open_all(folder: Path) -> None:
  """Opens a checkpoint as `generate` does; where there are no weights, all but these."""
  if (folder / _WEIGHTS).exists():
    inference.open_for_inference(folder, bf16=False)
    return
  source = open_source(folder, with_weights=False)
  tokenizer = load_tokenizer(folder)
  add_image_tokens(tokenizer)
  ChatTokenizer(tokenizer, read_stated(source, tokenizer).template)
