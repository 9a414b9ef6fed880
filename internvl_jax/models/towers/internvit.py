"""InternViT (300M and 6B): a pre-norm vision transformer with layer scale and no final norm.

Letters: I tiles, P patches of a tile, C width, N heads, H head width.
Reference: InternVL (arXiv:2312.14238); parameter names follow its checkpoints.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from internvl_jax.models.activations import activations
from internvl_jax.models.attention import Mask, attention
from internvl_jax.models.checkpoint_names import (
  CLASS_TOKEN,
  CONV,
  Row,
  concatenated,
  concatenated_linear,
  linear,
  norm,
  row,
)
from internvl_jax.models.gradients import matmul, scale, shift
from internvl_jax.models.kernels import Kernels
from internvl_jax.models.layers import LayerNorm, Linear, RMSNorm, make_param
from internvl_jax.models.towers.tower import (
  Form,
  Tower,
  VisionConfig,
  VisionTransformer,
  cut_patches,
  drop_branch,
  positions_transform,
  square_side,
)
from internvl_jax.parallel.rules import Product, constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class InternViTConfig(VisionConfig):
  """Sizes and switches of an InternViT, named as in the checkpoints' config.

  Attributes:
    norm_type: "layer_norm" (300M) or "rms_norm" (6B).
    initializer_factor: the layer scale of fresh weights.
  """

  class_tokens = 1

  norm_type: str = "layer_norm"
  qkv_bias: bool = True
  qk_normalization: bool = False
  layer_norm_eps: float = 1e-6
  initializer_factor: float = 1.0

  def build(self, *, select_layer: int = -1, rngs: nnx.Rngs) -> VisionTransformer:
    """The module with fresh parameters, up to the selected hidden state."""
    return VisionTransformer(
      self,
      make_embeddings=lambda rngs: VisionEmbeddings(self, rngs),
      make_layer=lambda rngs: VisionLayer(self, rngs),
      select_layer=select_layer,
      rngs=rngs,
    )


class VisionAttention(nnx.Module):
  """Self-attention over the patches of a tile, with a fused qkv projection.

  With `qk_normalization` q and k are normalized over their whole width, before it is split into heads.
  """

  def __init__(self, config: InternViTConfig, rngs: nnx.Rngs):
    C = config.hidden_size
    self.num_heads = config.num_heads
    self.qkv = Linear(C, 3 * C, bias=config.qkv_bias, axes=("embed", "vision"), over="tiles", rngs=rngs)
    self.proj = Linear(C, C, bias=True, axes=("vision", "embed"), over="tiles", rngs=rngs)
    normed = config.qk_normalization
    self.q_norm = RMSNorm(C, eps=config.layer_norm_eps, axis="vision") if normed else None
    self.k_norm = RMSNorm(C, eps=config.layer_norm_eps, axis="vision") if normed else None

  def __call__(self, x: Float[Array, "I N C"], *, backend: str) -> Float[Array, "I N C"]:
    q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
    if self.q_norm is not None and self.k_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    heads = (*x.shape[:2], self.num_heads, -1)
    q, k, v = (x.reshape(heads) for x in (q, k, v))
    out = attention(q, k, v, Mask(causal=False), over="tiles", backend=backend)
    return self.proj(out.reshape(x.shape))


class VisionMLP(nnx.Module):
  """Two linear layers around an exact GELU."""

  def __init__(self, config: InternViTConfig, rngs: nnx.Rngs):
    C, F = config.hidden_size, config.intermediate_size
    self.fc1 = Linear(C, F, bias=True, axes=("embed", "vision"), over="tiles", rngs=rngs)
    self.fc2 = Linear(F, C, bias=True, axes=("vision", "embed"), over="tiles", rngs=rngs)

  def __call__(self, x: Float[Array, "I N C"], *, backend: str) -> Float[Array, "I N C"]:
    return self.fc2(activations(backend).gelu(self.fc1(x)))


class VisionLayer(nnx.Module):
  """One block: x + ls1 * attn(norm1(x)), then x + ls2 * mlp(norm2(x)), each branch under drop path."""

  def __init__(self, config: InternViTConfig, rngs: nnx.Rngs):
    C = config.hidden_size
    norm = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}[config.norm_type]
    self.attn = VisionAttention(config, rngs)
    self.mlp = VisionMLP(config, rngs)
    self.norm1 = norm(C, eps=config.layer_norm_eps)
    self.norm2 = norm(C, eps=config.layer_norm_eps)
    self.ls1 = make_param(jnp.full(C, config.initializer_factor), ("embed",))
    self.ls2 = make_param(jnp.full(C, config.initializer_factor), ("embed",))

  def __call__(
    self, x: Float[Array, "I N C"], keep: Float[Array, "2 I"] | None, *, kernels: Kernels
  ) -> Float[Array, "I N C"]:
    """Applies the block to x [I, 1+P, C]; `keep` [2, I] scales the branches of each tile (drop path)."""
    x = constrain(x, "tiles", None, None)
    y = scale(self.attn(self.norm1(x), backend=kernels.attention), self.ls1[...].astype(x.dtype))
    x = x + drop_branch(y, keep, 0)
    y = scale(self.mlp(self.norm2(x), backend=kernels.activations), self.ls2[...].astype(x.dtype))
    return constrain(x + drop_branch(y, keep, 1), "tiles", None, None)


_PATCHES = Product((None, "embed"), over="tiles")


class VisionEmbeddings(nnx.Module):
  """Patches through a linear map, a class token in front, learned positions added.

  Fresh positions and class token are small (standard deviation 0.02, as in ViT, arXiv:2010.11929), and patches
  stand out from them: their kernel has 3/sqrt(fan_in). A small model from scratch then tells shapes apart in
  half the steps that 1/sqrt(fan_in) takes (docs/quickstart.md).
  """

  def __init__(self, config: InternViTConfig, rngs: nnx.Rngs):
    C, p = config.hidden_size, config.patch_size
    self.patch_size = p
    kernel = 3 * (3 * p * p) ** -0.5 * jax.random.normal(rngs.params(), (p, p, 3, C))
    self.patch_kernel = make_param(kernel, (None, None, None, "embed"))
    self.patch_bias = make_param(jnp.zeros(C), ("embed",))
    self.class_embedding = make_param(0.02 * jax.random.normal(rngs.params(), (C,)), ("embed",))
    positions = 0.02 * jax.random.normal(rngs.params(), (config.num_tokens, C))
    self.position_embedding = make_param(positions, (None, "embed"))

  def __call__(self, tiles: Float[Array, "I side side 3"]) -> Float[Array, "I N C"]:
    """Embeds tiles [I, side, side, 3] as [I, 1+P, C]."""
    patches, dtype = cut_patches(tiles, self.patch_size), tiles.dtype
    kernel = self.patch_kernel[...].reshape(patches.shape[-1], -1).astype(dtype)
    x = shift(matmul(patches, kernel, _PATCHES), self.patch_bias[...].astype(dtype))
    first = jnp.broadcast_to(self.class_embedding[...].astype(dtype), (tiles.shape[0], 1, x.shape[-1]))
    return jnp.concatenate([first, x], axis=1) + self.position_embedding[...].astype(dtype)


# --- How checkpoints hold it ----------------------------------------------------------------------------------

_POSITIONS = positions_transform(class_tokens=1, lead=1)
_VIT = "vision_model.embeddings"
_LAYER = "vision_model.encoder.layers.{i}"
_HF_VIT = "vision_tower.embeddings"
_HF_LAYER = "vision_tower.encoder.layer.{i}"


def _internvl_names(config: InternViTConfig) -> list[Row]:
  """InternViT under the reference's names."""
  del config
  return [
    row(f"{_VIT}.class_embedding", f"{_VIT}.class_embedding", CLASS_TOKEN),
    row(f"{_VIT}.position_embedding", f"{_VIT}.position_embedding", _POSITIONS),
    row(f"{_VIT}.patch_kernel", f"{_VIT}.patch_embedding.weight", CONV),
    row(f"{_VIT}.patch_bias", f"{_VIT}.patch_embedding.bias"),
    *linear(f"{_LAYER}.attn.qkv"),
    *linear(f"{_LAYER}.attn.proj"),
    *linear(f"{_LAYER}.mlp.fc1"),
    *linear(f"{_LAYER}.mlp.fc2"),
    *norm(f"{_LAYER}.norm1"),
    *norm(f"{_LAYER}.norm2"),
    *norm(f"{_LAYER}.attn.q_norm"),
    *norm(f"{_LAYER}.attn.k_norm"),
    row(f"{_LAYER}.ls1", f"{_LAYER}.ls1"),
    row(f"{_LAYER}.ls2", f"{_LAYER}.ls2"),
  ]


def _hf_names(config: InternViTConfig) -> list[Row]:
  """InternViT under transformers' names, with q, k and v apart."""
  width, heads = config.hidden_size, [f"{_HF_LAYER}.attention.{name}_proj" for name in "qkv"]
  return [
    row(f"{_VIT}.class_embedding", f"{_HF_VIT}.cls_token", CLASS_TOKEN),
    row(f"{_VIT}.position_embedding", f"{_HF_VIT}.position_embeddings", _POSITIONS),
    row(f"{_VIT}.patch_kernel", f"{_HF_VIT}.patch_embeddings.projection.weight", CONV),
    row(f"{_VIT}.patch_bias", f"{_HF_VIT}.patch_embeddings.projection.bias"),
    *concatenated_linear(f"{_LAYER}.attn.qkv", heads, concatenated(width, width, width)),
    *linear(f"{_LAYER}.attn.proj", f"{_HF_LAYER}.attention.projection_layer"),
    *linear(f"{_LAYER}.mlp.fc1", f"{_HF_LAYER}.mlp.fc1"),
    *linear(f"{_LAYER}.mlp.fc2", f"{_HF_LAYER}.mlp.fc2"),
    *norm(f"{_LAYER}.norm1", f"{_HF_LAYER}.layernorm_before"),
    *norm(f"{_LAYER}.norm2", f"{_HF_LAYER}.layernorm_after"),
    *norm(f"{_LAYER}.attn.q_norm", f"{_HF_LAYER}.attention.q_norm"),
    *norm(f"{_LAYER}.attn.k_norm", f"{_HF_LAYER}.attention.k_norm"),
    row(f"{_LAYER}.ls1", f"{_HF_LAYER}.lambda_1"),
    row(f"{_LAYER}.ls2", f"{_HF_LAYER}.lambda_2"),
  ]


def _read_internvl(config: Mapping[str, Any]) -> InternViTConfig:
  return InternViTConfig(
    **_read_sizes(config),
    qkv_bias=config["qkv_bias"],
    qk_normalization=config["qk_normalization"],
    initializer_factor=config["initializer_factor"],
  )


def _read_hf(config: Mapping[str, Any]) -> InternViTConfig:
  return InternViTConfig(
    **_read_sizes(config),
    qkv_bias=config["attention_bias"],
    qk_normalization=config["use_qk_norm"],
    initializer_factor=config["layer_scale_init_value"],
  )


def _read_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
  return {
    "hidden_size": config["hidden_size"],
    "intermediate_size": config["intermediate_size"],
    "num_layers": config["num_hidden_layers"],
    "num_heads": config["num_attention_heads"],
    "patch_size": square_side(config["patch_size"]),
    "image_size": square_side(config["image_size"]),
    "norm_type": config["norm_type"],
    "layer_norm_eps": config["layer_norm_eps"],
  }


def _write_internvl(vision: InternViTConfig) -> dict[str, Any]:
  return {
    "architectures": ["InternVisionModel"],
    "model_type": "intern_vit_6b",
    **_written_sizes(vision),
    "image_size": vision.image_size,
    "patch_size": vision.patch_size,
    "qkv_bias": vision.qkv_bias,
    "qk_normalization": vision.qk_normalization,
    "initializer_factor": vision.initializer_factor,
    "dropout": 0.0,
    "drop_path_rate": 0.0,
    "use_flash_attn": True,
  }


def _write_hf(vision: InternViTConfig) -> dict[str, Any]:
  return {
    "architectures": ["InternVLVisionModel"],
    "model_type": "internvl_vision",
    **_written_sizes(vision),
    "patch_size": [vision.patch_size, vision.patch_size],
    "attention_bias": vision.qkv_bias,
    "use_qk_norm": vision.qk_normalization,
    "layer_scale_init_value": vision.initializer_factor,
    "hidden_dropout_prob": 0.0,
    "projection_dropout": 0.0,
    "use_absolute_position_embeddings": True,
    "use_mask_token": False,
    "use_mean_pooling": True,
    "image_size": [vision.image_size, vision.image_size],
  }


def _written_sizes(vision: InternViTConfig) -> dict[str, Any]:
  return {
    "attention_dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": vision.hidden_size,
    "intermediate_size": vision.intermediate_size,
    "layer_norm_eps": vision.layer_norm_eps,
    "norm_type": vision.norm_type,
    "num_attention_heads": vision.num_heads,
    "num_channels": 3,
    "num_hidden_layers": vision.num_layers,
  }


_CONSTANTS = {"hidden_act": "gelu", "attention_dropout": 0.0, "num_channels": 3}

TOWER = Tower(
  name="InternViT",
  config=InternViTConfig,
  forms={
    "internvl": Form(
      model_type="intern_vit_6b",  # The class has this name for both sizes.
      read=_read_internvl,
      write=_write_internvl,
      table=_internvl_names,
      constants={**_CONSTANTS, "dropout": 0.0},
      defaults={"norm_type": "rms_norm", "initializer_factor": 0.1},
    ),
    "hf": Form(
      model_type="internvl_vision",
      read=_read_hf,
      write=_write_hf,
      table=_hf_names,
      constants={
        **_CONSTANTS,
        "hidden_dropout_prob": 0.0,
        "projection_dropout": 0.0,
        "use_mask_token": False,
        "use_absolute_position_embeddings": True,
        "use_mean_pooling": True,
      },
      defaults={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 448,
        "norm_type": "layer_norm",
        "attention_bias": False,
        "use_qk_norm": False,
        "layer_norm_eps": 1e-6,
        "layer_scale_init_value": 0.1,
      },
    ),
  },
)
