"""InternViT (300M and 6B): a pre-norm vision transformer with layer scale and no final norm.

Letters: I tiles, P patches of a tile, C width, N heads, H head width.
Reference: InternVL (arXiv:2312.14238); parameter names follow its checkpoints.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from internvl_jax.models import lora
from internvl_jax.models.attention import Mask, attention
from internvl_jax.models.gradients import matmul, scale, shift
from internvl_jax.models.kernels import Kernels
from internvl_jax.models.layers import LayerNorm, LayerStack, Linear, RMSNorm, make_param
from internvl_jax.models.lora import LoRASpec
from internvl_jax.parallel.rules import Product, constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
  """Sizes of an InternViT.

  Attributes:
    initializer_factor: the layer scale of fresh weights.
    split: the layer at which the stack is stored in two, because those before it do not train and the others
      do; None or 0 is one piece.
    lora: adapters of the layers' linear maps.
    The others are named as in the checkpoints' config.
  """

  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  patch_size: int
  image_size: int
  norm_type: str = "layer_norm"  # or "rms_norm" (6B)
  qkv_bias: bool = True
  qk_normalization: bool = False
  layer_norm_eps: float = 1e-6
  initializer_factor: float = 1.0
  split: int | None = None
  lora: LoRASpec | None = None

  @property
  def num_patches(self) -> int:
    return (self.image_size // self.patch_size) ** 2


class VisionAttention(nnx.Module):
  """Self-attention over the patches of a tile, with a fused qkv projection.

  With `qk_normalization` q and k are normalised over their whole width, before it is split into heads.
  """

  def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
    C = config.hidden_size
    self.num_heads = config.num_heads
    self.qkv = Linear(C, 3 * C, bias=config.qkv_bias, axes=("embed", "vision"), over="tiles", rngs=rngs)
    self.proj = Linear(C, C, bias=True, axes=("vision", "embed"), over="tiles", rngs=rngs)
    normed = config.qk_normalization
    self.q_norm = RMSNorm(C, eps=config.layer_norm_eps, axis="vision") if normed else None
    self.k_norm = RMSNorm(C, eps=config.layer_norm_eps, axis="vision") if normed else None

  def __call__(self, x: jax.Array, *, backend: str) -> jax.Array:
    q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
    if self.q_norm is not None and self.k_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    heads = (*x.shape[:2], self.num_heads, -1)
    q, k, v = (x.reshape(heads) for x in (q, k, v))
    out = attention(q, k, v, Mask(causal=False), over="tiles", backend=backend)
    return self.proj(out.reshape(x.shape))


class VisionMLP(nnx.Module):
  """Two linear layers around an exact GELU."""

  def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
    C, F = config.hidden_size, config.intermediate_size
    self.fc1 = Linear(C, F, bias=True, axes=("embed", "vision"), over="tiles", rngs=rngs)
    self.fc2 = Linear(F, C, bias=True, axes=("vision", "embed"), over="tiles", rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class VisionLayer(nnx.Module):
  """One block: x + ls1 * attn(norm1(x)), then x + ls2 * mlp(norm2(x)), each branch under drop path."""

  def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
    C = config.hidden_size
    norm = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}[config.norm_type]
    self.attn = VisionAttention(config, rngs)
    self.mlp = VisionMLP(config, rngs)
    self.norm1 = norm(C, eps=config.layer_norm_eps)
    self.norm2 = norm(C, eps=config.layer_norm_eps)
    self.ls1 = make_param(jnp.full(C, config.initializer_factor), ("embed",))
    self.ls2 = make_param(jnp.full(C, config.initializer_factor), ("embed",))
    if config.lora is not None:
      lora.attach(self, config.lora, rngs)

  def __call__(self, x: jax.Array, keep: jax.Array | None, *, backend: str) -> jax.Array:
    """Applies the block to x [I, 1+P, C]; `keep` [2, I] scales the branches of each tile (drop path)."""
    x = constrain(x, "tiles", None, None)
    y = scale(self.attn(self.norm1(x), backend=backend), self.ls1[...].astype(x.dtype))
    x = x + (y if keep is None else y * keep[0, :, None, None].astype(x.dtype))
    y = scale(self.mlp(self.norm2(x)), self.ls2[...].astype(x.dtype))
    return constrain(
      x + (y if keep is None else y * keep[1, :, None, None].astype(x.dtype)), "tiles", None, None
    )


_PATCHES = Product((None, "embed"), over="tiles")


class VisionEmbeddings(nnx.Module):
  """Patches through a linear map, a class token in front, learned positions added.

  Fresh positions and class token are small (standard deviation 0.02, as in ViT, arXiv:2010.11929), and patches
  stand out from them: their kernel has 3/sqrt(fan_in). A small model from scratch then tells shapes apart in
  half the steps that 1/sqrt(fan_in) takes (docs/quickstart.md).
  """

  def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
    C, p = config.hidden_size, config.patch_size
    self.patch_size = p
    kernel = 3 * (3 * p * p) ** -0.5 * jax.random.normal(rngs.params(), (p, p, 3, C))
    self.patch_kernel = make_param(kernel, (None, None, None, "embed"))
    self.patch_bias = make_param(jnp.zeros(C), ("embed",))
    self.class_embedding = make_param(0.02 * jax.random.normal(rngs.params(), (C,)), ("embed",))
    positions = 0.02 * jax.random.normal(rngs.params(), (1 + config.num_patches, C))
    self.position_embedding = make_param(positions, (None, "embed"))

  def __call__(self, tiles: jax.Array) -> jax.Array:
    """Embeds tiles [I, side, side, 3] as [I, 1+P, C]."""
    I, side = tiles.shape[:2]
    p, n = self.patch_size, side // self.patch_size
    patches = tiles.reshape(I, n, p, n, p, 3).transpose(0, 1, 3, 2, 4, 5).reshape(I, n * n, p * p * 3)
    dtype = tiles.dtype
    kernel = self.patch_kernel[...].reshape(p * p * 3, -1).astype(dtype)
    x = shift(matmul(patches, kernel, _PATCHES), self.patch_bias[...].astype(dtype))
    first = jnp.broadcast_to(self.class_embedding[...].astype(dtype), (I, 1, x.shape[-1]))
    return jnp.concatenate([first, x], axis=1) + self.position_embedding[...].astype(dtype)


class VisionEncoder(nnx.Module):
  """The stack of blocks."""

  def __init__(self, config: VisionConfig, *, bounds: tuple[int, ...], rngs: nnx.Rngs):
    self.layers = LayerStack(lambda r: VisionLayer(config, r), bounds=bounds, rngs=rngs)


class VisionTransformer(nnx.Module):
  """InternViT up to the hidden state that the projector reads.

  `select_layer` indexes the num_layers + 1 hidden states (the embedding is the first); layers after the
  selected one are kept, so that a checkpoint comes out whole, and never run.
  """

  def __init__(self, config: VisionConfig, *, select_layer: int = -1, rngs: nnx.Rngs):
    n = config.num_layers
    if not -(n + 1) <= select_layer <= n:
      raise ValueError(
        f"vision_select_layer={select_layer} is outside the {n + 1} hidden states of a ViT of {n} layers"
      )
    self.num_layers = n
    self.run_layers = select_layer % (n + 1)
    self.embeddings = VisionEmbeddings(config, rngs)
    bounds = tuple(sorted({0, config.split or 0, self.run_layers, n}))
    self.encoder = VisionEncoder(config, bounds=bounds, rngs=rngs)

  def __call__(
    self,
    tiles: jax.Array,
    *,
    drop_path: tuple[np.ndarray, jax.Array] | None = None,
    dropout_key: jax.Array | None = None,
    kernels: Kernels | None = None,
    remat: Callable | None = None,
    unroll: int = 1,
  ) -> jax.Array:
    """Encodes normalised tiles [I, side, side, 3] as the selected hidden state [I, 1+P, C].

    Args:
      tiles: normalised pixels in the compute dtype.
      drop_path: (rate of each layer, random key); None is evaluation.
      dropout_key: randomness of the adapters' dropout; None is evaluation.
      kernels: the backends; None is XLA's.
      remat, unroll: see `LayerStack.scan`.
    """
    x = self.embeddings(tiles)
    backend = (kernels or Kernels()).attention
    xs = {} if drop_path is None else {"keep": _keep_branches(x.shape[0], *drop_path)}
    if dropout_key is not None:
      xs["dropout"] = jax.random.split(dropout_key, self.num_layers)

    def apply(layer, x, xs):
      if "dropout" in xs:
        lora.start_dropout(layer, xs["dropout"])
      return layer(x, xs.get("keep"), backend=backend), {}

    x, _ = self.encoder.layers.scan(apply, x, xs=xs, stop=self.run_layers, remat=remat, unroll=unroll)
    return x


def _keep_branches(num_tiles: int, rates: np.ndarray, key: jax.Array) -> jax.Array:
  """Stochastic depth (arXiv:1603.09382): 0 or 1/(1-rate) for each layer, branch and tile."""
  keep = 1 - jnp.asarray(rates, jnp.float32)[:, None, None]
  kept = jax.random.bernoulli(key, keep, (len(rates), 2, num_tiles))
  return jnp.where(kept, 1 / keep, 0.0)


def resize_position_embedding(positions: np.ndarray, num_patches: int) -> np.ndarray:
  """Resamples learned positions [1+P, C] to [1+num_patches, C] for another tile size.

  The class token's row is kept; the square grid of the others is interpolated bicubically with half-pixel
  centres, clamped borders and a = -0.75, as PyTorch's `interpolate(mode="bicubic")` does it.
  """
  if positions.shape[0] == 1 + num_patches:
    return positions
  first, grid = positions[:1], positions[1:].astype(np.float64)
  old, new = round(len(grid) ** 0.5), round(num_patches**0.5)
  assert old * old == len(grid) and new * new == num_patches, (positions.shape, num_patches)
  weights = _bicubic_weights(old, new)
  grid = np.einsum("ai,bj,ijc->abc", weights, weights, grid.reshape(old, old, -1))
  return np.concatenate([first, grid.reshape(num_patches, -1).astype(positions.dtype)])


def _bicubic_weights(old: int, new: int, a: float = -0.75) -> np.ndarray:
  """The matrix [new, old] of cubic convolution (Keys, 1981)."""
  weights = np.zeros((new, old))
  for i in range(new):
    center = (i + 0.5) * old / new - 0.5
    base = int(np.floor(center))
    for j in range(base - 1, base + 3):
      t = abs(center - j)
      w = (a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1 else a * (t**3 - 5 * t**2 + 8 * t - 4)
      weights[i, min(max(j, 0), old - 1)] += w
  return weights
