"""A tiny InternVL3.5-Flash in the internvl layout, without a stored number, and a question with tiles for it.

Weights and tiles are drawn from seeds that are their names (`families.draw`), so that the recording of what the published code
computes, `assets/flash.npz`, holds nothing but that. In it are, for `question()`:

    probabilities          [t, 2] of the gate
    features, compressed   [t, 16, D] and [t, 4, D], those of mlp1 and of mlp2
    logits                 [S, V] of the whole prompt, every tile with all of its tokens: `forward`
    routed_logits          [n, V] of the prompt that `generate` reads, its compressed tiles shortened
    answer                 the six likeliest tokens that follow
"""

from pathlib import Path
from typing import Any

import numpy as np

from internvl_jax.eval.greedy import Prompt
from internvl_jax.hf import saving
from internvl_jax.hf.model import open_source
from tests.support import families
from tests.support.toy import ASSETS

RECORDING = ASSETS / "flash.npz"
SIDE, TOKENS, COMPRESSED, TILES = 56, 16, 4, 5
IMAGE_TOKEN = families.IMAGE_TOKEN
RELATIVE, ABSOLUTE = 0.3, 0.02
SHARPNESS = 2
"""A factor of the pooling's first projections: else all tiles look alike to the gate."""


def config() -> dict[str, Any]:
  """Its config.json."""
  text = families.config_of("qwen3")["text_config"]
  rope = {key: value for key, value in text.items() if key != "rope_parameters"}
  return {
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "vision_config": {
      "model_type": "intern_vit_6b",
      "architectures": ["InternVisionModel"],
      "hidden_size": 32,
      "intermediate_size": 48,
      "num_hidden_layers": 2,
      "num_attention_heads": 2,
      "image_size": SIDE,
      "patch_size": 7,
      "qkv_bias": True,
      "qk_normalization": False,
      "norm_type": "layer_norm",
      "layer_norm_eps": 1e-6,
      "use_flash_attn": False,
    },
    "llm_config": {
      **rope,
      "architectures": ["Qwen3ForCausalLM"],
      "rope_theta": 10000.0,
      "max_position_embeddings": 256,
    },
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "select_layer": -1,
    "force_image_size": SIDE,
    "template": "internvl2_5",
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 4,
    "flash_mode": True,
    "flash_relative_threshold": RELATIVE,
    "flash_absolute_threshold": ABSOLUTE,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
  }


def write_checkpoint(folder: Path, **entries: Any) -> Path:
  """Writes its config.json, with other entries, tokenizer and weights to a new folder."""
  folder.mkdir(parents=True)
  families.write_config(folder, {**config(), **entries})
  families.write_tokenizer(folder, rows=96)
  shapes = families.tensor_shapes(open_source(folder, with_weights=False))
  saving.save(folder, ((key, _tensor(key, shape)) for key, shape in shapes.items()))
  return folder


def _tensor(key: str, shape: tuple[int, ...]) -> np.ndarray:
  return families.tensor(key, shape) * np.float32(SHARPNESS if ".in_proj_weight" in key else 1)


def question() -> Prompt:
  """A prompt with five tiles, of one image and of another."""
  words = (families.draw("flash words", (20,)) / (2 * 3**0.5) + 0.5) * (96 - families.FIRST_WORD)
  ids = families.FIRST_WORD + words.astype(np.int32)
  images = (np.full(2 * TOKENS, IMAGE_TOKEN), ids[4:9], np.full(3 * TOKENS, IMAGE_TOKEN))
  tiles = families.draw("flash tiles", (TILES, SIDE, SIDE, 3)) * 40 + 128
  tiles += families.draw("flash colors", (TILES, 1, 1, 3)) * 35
  return Prompt(
    np.concatenate([ids[:4], *images, ids[9:]]).astype(np.int32), tiles.clip(0, 255).astype(np.uint8)
  )
