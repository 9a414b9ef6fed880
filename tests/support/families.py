"""Tiny InternVLs of every language model family in transformers' layout, without a stored number.

Weights and inputs are drawn from seeds that are their names, so that a recording in `assets/families` needs
nothing but what was computed. `scripts/record_families.py` makes the recordings.
"""

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from internvl_jax.hf import saving, weights
from internvl_jax.hf.model import Source, open_source
from tests.support.toy import ASSETS

RECORDINGS = ASSETS / "families"
TOKENIZER = ASSETS / "tokenizer"

IMAGE_TOKEN = 5  # <IMG_CONTEXT> of TOKENIZER
FIRST_WORD = 12  # ids below are special
STD = 0.2  # of weights: large enough for gradients far above float32's noise, also with few layers
LENGTH = 24
PADDING = 5  # of the second row; less than any window, so that padded queries too see some token

_TEXT = {
  "vocab_size": 96,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
  "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
  "tie_word_embeddings": False,
  "bos_token_id": None,
  "eos_token_id": 2,
  "pad_token_id": 0,
}
_VISION = {
  "model_type": "internvl_vision",
  "hidden_size": 16,
  "intermediate_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "image_size": [28, 28],
  "patch_size": [7, 7],
  "attention_bias": True,
  "use_qk_norm": False,
  "norm_type": "layer_norm",
}
_LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 10000.0,
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
_YARN = {
  "rope_type": "yarn",
  "rope_theta": 150000.0,
  "factor": 8.0,
  "beta_fast": 4.0,
  "beta_slow": 1.0,
  "truncate": False,
  "original_max_position_embeddings": 32,
}


def _phi3(trained_length: int) -> dict[str, Any]:
  rope = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.2, 1.9, 2.7, 3.5],
    "original_max_position_embeddings": trained_length,
  }
  return {
    "model_type": "phi3",
    "original_max_position_embeddings": trained_length,
    "rope_parameters": rope,
    "sliding_window": 10,
  }


_MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}

_TEXTS: dict[str, dict[str, Any]] = {
  "qwen2": {"model_type": "qwen2"},
  "llama": {"model_type": "llama", "head_dim": 16, "rope_parameters": _LLAMA3},
  # Rows are longer than the trained length, so that the scaling acts.
  "llama_dynamic": {
    "model_type": "llama",
    "head_dim": 8,
    "max_position_embeddings": 16,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
  },
  "phi3": _phi3(trained_length=32),
  "phi3_long": _phi3(trained_length=16),
  "qwen3": {"model_type": "qwen3", "head_dim": 16},
  "qwen3_moe": {
    "model_type": "qwen3_moe",
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    **_MOE,
  },
  "gpt_oss": {
    "model_type": "gpt_oss",
    "head_dim": 8,
    "sliding_window": 8,
    "rope_parameters": _YARN,
    **_MOE,
  },
  "vision_6b": {"model_type": "qwen2"},
  "tied": {"model_type": "qwen2", "tie_word_embeddings": True},
}
_VISIONS = {"vision_6b": {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False}}

CASES = tuple(_TEXTS)


def config_of(case: str) -> dict[str, Any]:
  """The config.json of a case."""
  text = {**_TEXT, **_TEXTS[case]}
  return {
    "architectures": ["InternVLForConditionalGeneration"],
    "model_type": "internvl",
    "vision_config": {**_VISION, **_VISIONS.get(case, {})},
    "text_config": text,
    "image_token_id": IMAGE_TOKEN,
    "image_seq_length": 4,
    "downsample_ratio": 0.5,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": text["tie_word_embeddings"],
    "dtype": "float32",
  }


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Numbers of mean 0 and variance 1 that the name fixes, float32.

  They come from the generator's raw integers, whose stream numpy never changes, and every step is exact.
  """
  raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
  uniform = (raw >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)
  return (uniform * np.float32(3**0.5)).reshape(shape)


def write_checkpoint(case: str, folder: Path, **text: Any) -> Path:
  """Writes a case's config.json, with other values of its text model, tokenizer and weights to a new folder."""
  folder.mkdir(parents=True)
  config = config_of(case)
  config["text_config"] |= text
  write_config(folder, config)
  write_tokenizer(folder, rows=config["text_config"]["vocab_size"])
  shapes = tensor_shapes(open_source(folder, with_weights=False))
  saving.save(folder, ((key, tensor(key, shape)) for key, shape in shapes.items()))
  return folder


def write_tokenizer(folder: Path, rows: int) -> None:
  """Writes TOKENIZER's files, with the first so many of its tokens."""
  for file in TOKENIZER.iterdir():
    shutil.copyfile(file, folder / file.name)
  path = folder / "tokenizer.json"
  whole = json.loads(path.read_text())
  model = whole["model"]
  model["vocab"] = {token: index for token, index in model["vocab"].items() if index < rows}
  pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
  model["merges"] = [pair for pair in pairs if model["vocab"].keys() >= {*pair, "".join(pair)}]
  path.write_text(json.dumps(whole))


def write_config(folder: Path, config: dict[str, Any]) -> None:
  """Writes a config.json."""
  (folder / "config.json").write_text(json.dumps(config, indent=2))


def tensor(key: str, shape: tuple[int, ...]) -> np.ndarray:
  values = draw(key, shape) * np.float32(STD)
  is_scale = len(shape) == 1 and key.endswith(".weight")  # of a norm
  return values + 1 if is_scale else values


def tensor_shapes(source: Source) -> dict[str, tuple[int, ...]]:
  """The tensors that a checkpoint of a model has, by their keys."""
  shapes = {}
  for path, leaf in source.model.shapes.items():
    names = weights.names_of(path, leaf.shape, source.table)
    parts = names.row.transform.save(np.broadcast_to(np.int8(0), leaf.shape[names.lead :]))
    for keys in names.keys.reshape(-1, names.keys.shape[-1]):
      shapes |= {key: part.shape for key, part in zip(keys, parts, strict=True)}
  return shapes


def inputs(
  vocab_size: int = _TEXT["vocab_size"], side: int = _VISION["image_size"][0]
) -> dict[str, np.ndarray]:
  """Two rows with a tile each, the second padded on the right; the arrays that `verify` reads."""
  words = draw("input_ids", (2, LENGTH)) / (2 * 3**0.5) + 0.5
  ids = FIRST_WORD + (words * (vocab_size - FIRST_WORD)).astype(np.int64)
  ids[:, 2:6] = IMAGE_TOKEN
  mask = np.ones_like(ids)
  mask[1, LENGTH - PADDING :] = 0
  labels = np.where(mask > 0, ids, -100)
  labels[0, :8] = labels[1, :11] = -100
  return {
    "pixel_values": draw("pixel_values", (2, 3, side, side)),
    "image_flags": np.ones(2, np.int64),
    "input_ids": ids,
    "labels": labels,
    "attention_mask": mask,
    "image_token_id": np.array(IMAGE_TOKEN),
  }


def tiles(side: int = _VISION["image_size"][0]) -> np.ndarray:
  """The two tiles of a batch, uint8 [2, side, side, 3]."""
  return (draw("tiles", (2, side, side, 3)) * 70 + 128).astype(np.uint8)


def gradient_norms(source: Source, grads: dict[str, Any]) -> dict[str, float]:
  """The norm of the gradient of each of a checkpoint's tensors, by key."""
  tensors = saving.tensors(grads, source.table, np.dtype(np.float32))
  return {key: float(np.linalg.norm(tensor.astype(np.float64))) for key, tensor in tensors}
