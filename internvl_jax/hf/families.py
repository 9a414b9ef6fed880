"""Two-way tables of parameter names, one per part and family, and the registry of families.

A row pairs one of our paths with the checkpoint's keys. `{i}` stands for the layer's index on both sides;
our stacks hold many layers in one array, and the tables speak of one. Rows that a model has no parameter
for (a bias that a variant lacks) are not used; a parameter without a row is an error.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from internvl_jax.models.decoder import DecoderConfig
from internvl_jax.models.vit import resize_position_embedding


@dataclasses.dataclass(frozen=True)
class Transform:
  """How a checkpoint's tensor becomes ours (`load`, which knows the shape wanted) and back (`save`)."""

  load: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
  save: Callable[[np.ndarray], np.ndarray]


SAME = Transform(lambda x, shape: x, lambda x: x)
TRANSPOSE = Transform(lambda x, shape: x.T, lambda x: x.T)
# A convolution's [out, in, height, width] as [height, width, in, out].
CONV = Transform(lambda x, shape: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
CLASS_TOKEN = Transform(lambda x, shape: x.reshape(-1), lambda x: x.reshape(1, 1, -1))
POSITIONS = Transform(lambda x, shape: resize_position_embedding(x[0], shape[0] - 1), lambda x: x[None])


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of a table."""

  ours: str
  theirs: str
  transform: Transform = SAME


def linear(path: str, key: str | None = None) -> list[Row]:
  """Rows of a linear layer: its kernel, transposed, and its bias."""
  key = key or path
  return [Row(f"{path}.kernel", f"{key}.weight", TRANSPOSE), Row(f"{path}.bias", f"{key}.bias")]


def norm(path: str, key: str | None = None) -> list[Row]:
  """Rows of a norm: its scale, and the bias that layer norms have."""
  key = key or path
  return [Row(f"{path}.scale", f"{key}.weight"), Row(f"{path}.bias", f"{key}.bias")]


_VIT = "vision_model.embeddings"
_VIT_LAYER = "vision_model.encoder.layers.{i}"

VISION_TABLE = [
  Row(f"{_VIT}.class_embedding", f"{_VIT}.class_embedding", CLASS_TOKEN),
  Row(f"{_VIT}.position_embedding", f"{_VIT}.position_embedding", POSITIONS),
  Row(f"{_VIT}.patch_kernel", f"{_VIT}.patch_embedding.weight", CONV),
  Row(f"{_VIT}.patch_bias", f"{_VIT}.patch_embedding.bias"),
  *(
    row for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2") for row in linear(f"{_VIT_LAYER}.{name}")
  ),
  *(row for name in ("norm1", "norm2", "attn.q_norm", "attn.k_norm") for row in norm(f"{_VIT_LAYER}.{name}")),
  Row(f"{_VIT_LAYER}.ls1", f"{_VIT_LAYER}.ls1"),
  Row(f"{_VIT_LAYER}.ls2", f"{_VIT_LAYER}.ls2"),
]

PROJECTOR_TABLE = [
  *norm("mlp1.layer_norm", "mlp1.0"),
  *linear("mlp1.linear_1", "mlp1.1"),
  *linear("mlp1.linear_2", "mlp1.3"),
]

_LM = "language_model.model"
_LM_LAYER = "language_model.model.layers.{i}"

# Qwen2's names are Hugging Face's usual ones.
QWEN2_TABLE = [
  Row(f"{_LM}.embed_tokens.embedding", f"{_LM}.embed_tokens.weight"),
  *(row for name in "qkvo" for row in linear(f"{_LM_LAYER}.self_attn.{name}_proj")),
  *(row for name in ("gate", "up", "down") for row in linear(f"{_LM_LAYER}.mlp.{name}_proj")),
  *(row for name in ("input", "post_attention") for row in norm(f"{_LM_LAYER}.{name}_layernorm")),
  *norm(f"{_LM}.norm"),
  *linear("language_model.lm_head"),
]


@dataclasses.dataclass(frozen=True)
class Family:
  """A language model family: how to read its config, and its table of names.

  `constants` lists the config's switches whose other values would need other code: they are checked, so
  that no switch of a checkpoint is ignored.
  """

  decoder: Callable[[Mapping[str, Any]], DecoderConfig]
  table: list[Row]
  constants: Mapping[str, Any]


def _qwen2(config: Mapping[str, Any]) -> DecoderConfig:
  heads = config["num_attention_heads"]
  return DecoderConfig(
    vocab_size=config["vocab_size"],
    hidden_size=config["hidden_size"],
    intermediate_size=config["intermediate_size"],
    num_layers=config["num_hidden_layers"],
    num_heads=heads,
    num_kv_heads=config.get("num_key_value_heads") or heads,
    head_dim=config["hidden_size"] // heads,
    rms_norm_eps=config["rms_norm_eps"],
    rope_theta=config["rope_theta"],
    qkv_bias=True,
  )


FAMILIES: dict[str, Family] = {
  "qwen2": Family(
    _qwen2,
    QWEN2_TABLE,
    {
      "hidden_act": "silu",
      "use_sliding_window": False,
      "rope_scaling": None,
      "tie_word_embeddings": False,
      "attention_dropout": 0.0,
    },
  ),
}
"""Language model families by the `model_type` of a checkpoint's llm_config."""
