"""SigLIP (arXiv:2303.15343) as a vision tower: no class token, q, k and v apart, no layer scale, a norm at the end.

All that a new tower takes: this file, in `internvl_jax/models/towers/`, and its line in `internvl_jax/hf/towers.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from internvl_jax.models.attention import Mask, attention
from internvl_jax.models.checkpoint_names import CONV, Row, linear, norm, row
from internvl_jax.models.kernels import Kernels
from internvl_jax.models.layers import LayerNorm, Linear, make_param
from internvl_jax.models.towers.tower import (
  Form,
  Tower,
  VisionConfig,
  VisionTransformer,
  cut_patches,
  drop_branch,
  positions_transform,
)
from internvl_jax.parallel.rules import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipConfig(VisionConfig):
  """Sizes of a SigLIP."""

  layer_norm_eps: float = 1e-6

  def build(self, *, select_layer: int = -1, rngs: nnx.Rngs) -> VisionTransformer:
    return VisionTransformer(
      self,
      make_embeddings=lambda rngs: SiglipEmbeddings(self, rngs),
      make_layer=lambda rngs: SiglipLayer(self, rngs),
      make_norm=lambda: LayerNorm(self.hidden_size, eps=self.layer_norm_eps),
      select_layer=select_layer,
      rngs=rngs,
    )


class SiglipEmbeddings(nnx.Module):
  """Patches through a linear map, learned positions added."""

  def __init__(self, config: SiglipConfig, rngs: nnx.Rngs):
    C, p = config.hidden_size, config.patch_size
    self.patch_size = p
    kernel = jax.random.normal(rngs.params(), (p, p, 3, C)) * (3 * p * p) ** -0.5
    self.patch_kernel = make_param(kernel, (None, None, None, "embed"))
    self.patch_bias = make_param(jnp.zeros(C), ("embed",))
    positions = 0.02 * jax.random.normal(rngs.params(), (config.num_patches, C))
    self.position_embedding = make_param(positions, (None, "embed"))

  def __call__(self, tiles: jax.Array) -> jax.Array:
    patches = cut_patches(tiles, self.patch_size)
    kernel = self.patch_kernel[...].reshape(patches.shape[-1], -1).astype(tiles.dtype)
    offset = self.patch_bias[...] + self.position_embedding[...]
    return patches @ kernel + offset.astype(tiles.dtype)


class SiglipLayer(nnx.Module):
  """One block: x + attn(norm(x)), then x + mlp(norm(x)), with the tanh form of GELU."""

  def __init__(self, config: SiglipConfig, rngs: nnx.Rngs):
    C, F, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
    self.num_heads = config.num_heads
    into = {"bias": True, "axes": ("embed", "vision"), "over": "tiles", "rngs": rngs}
    back = {**into, "axes": ("vision", "embed")}
    self.layer_norm1, self.layer_norm2 = LayerNorm(C, eps=eps), LayerNorm(C, eps=eps)
    self.q_proj, self.k_proj, self.v_proj = (Linear(C, C, **into) for _ in "qkv")
    self.out_proj = Linear(C, C, **back)
    self.fc1, self.fc2 = Linear(C, F, **into), Linear(F, C, **back)

  def __call__(self, x: jax.Array, keep: jax.Array | None, *, kernels: Kernels) -> jax.Array:
    x = constrain(x, "tiles", None, None)
    y, heads = self.layer_norm1(x), (*x.shape[:2], self.num_heads, -1)
    q, k, v = (make(y).reshape(heads) for make in (self.q_proj, self.k_proj, self.v_proj))
    y = attention(q, k, v, Mask(causal=False), over="tiles", backend=kernels.attention)
    x = x + drop_branch(self.out_proj(y.reshape(x.shape)), keep, 0)
    y = self.fc2(jax.nn.gelu(self.fc1(self.layer_norm2(x)), approximate=True))
    return constrain(x + drop_branch(y, keep, 1), "tiles", None, None)


_OURS, _THEIRS = "vision_model", "vision_tower.vision_model"
_LAYER, _THEIR_LAYER = (f"{name}.encoder.layers.{{i}}" for name in (_OURS, _THEIRS))
_POSITIONS = positions_transform(class_tokens=0, lead=0)


def _names(config: SiglipConfig) -> list[Row]:
  del config
  embeddings = f"{_OURS}.embeddings", f"{_THEIRS}.embeddings"
  return [
    row(f"{embeddings[0]}.patch_kernel", f"{embeddings[1]}.patch_embedding.weight", CONV),
    row(f"{embeddings[0]}.patch_bias", f"{embeddings[1]}.patch_embedding.bias"),
    row(f"{embeddings[0]}.position_embedding", f"{embeddings[1]}.position_embedding.weight", _POSITIONS),
    *norm(f"{_LAYER}.layer_norm1", f"{_THEIR_LAYER}.layer_norm1"),
    *norm(f"{_LAYER}.layer_norm2", f"{_THEIR_LAYER}.layer_norm2"),
    *(
      line
      for name in ("q_proj", "k_proj", "v_proj", "out_proj")
      for line in linear(f"{_LAYER}.{name}", f"{_THEIR_LAYER}.self_attn.{name}")
    ),
    *(line for name in ("fc1", "fc2") for line in linear(f"{_LAYER}.{name}", f"{_THEIR_LAYER}.mlp.{name}")),
    *norm(f"{_OURS}.post_layernorm", f"{_THEIRS}.post_layernorm"),
  ]


_FIELDS = {
  "hidden_size": "hidden_size",
  "intermediate_size": "intermediate_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "patch_size": "patch_size",
  "image_size": "image_size",
  "layer_norm_eps": "layer_norm_eps",
}


def _read(config: Mapping[str, Any]) -> SiglipConfig:
  return SiglipConfig(**{ours: config[theirs] for ours, theirs in _FIELDS.items()})


def _write(vision: SiglipConfig) -> dict[str, Any]:
  sizes = {theirs: getattr(vision, ours) for ours, theirs in _FIELDS.items()}
  return {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model", **_CONSTANTS, **sizes}


_CONSTANTS = {
  "hidden_act": "gelu_pytorch_tanh",
  "attention_dropout": 0.0,
  "num_channels": 3,
  "vision_use_head": False,
}

TOWER = Tower(
  name="SigLIP",
  config=SiglipConfig,
  forms={
    "hf": Form(
      model_type="siglip_vision_model",
      read=_read,
      write=_write,
      table=_names,
      constants=_CONSTANTS,
      defaults={"layer_norm_eps": 1e-6},
    )
  },
)
