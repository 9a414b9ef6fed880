"""What all vision towers share: their sizes, the transformer around their blocks, and their entry in the registry.

A tower is a file beside this one with a `VisionConfig` (sizes, `build`), an embedding and a block as NNX modules, and
a `Tower` that says how checkpoints hold it; `hf.towers` has a line for it.

Letters: I tiles, P patches of a tile, N tokens of a tile (patches, and the class token of towers that have one),
C width.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from internvl_jax.errors import UserError
from internvl_jax.models import lora
from internvl_jax.models.base_weights import quantize_layer
from internvl_jax.models.checkpoint_names import Row, Transform
from internvl_jax.models.kernels import Kernels
from internvl_jax.models.layers import LayerStack
from internvl_jax.models.lora import LoRASpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(abc.ABC):
  """Sizes of a vision tower; a tower's own class adds its switches.

  Attributes:
    split: the layer at which the stack is stored in two, because those before it do not train and the others
      do; None or 0 is one piece.
    lora: adapters of the layers' linear maps.
    quantize_base: see `decoder.DecoderConfig`.
    class_tokens: tokens in front of the patches, which the projector does not read.
    The others are named as in the checkpoints' config.
  """

  class_tokens: ClassVar[int] = 0

  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  patch_size: int
  image_size: int
  split: int | None = None
  lora: LoRASpec | None = None
  quantize_base: str = "none"

  @property
  def num_patches(self) -> int:
    return (self.image_size // self.patch_size) ** 2

  @property
  def num_tokens(self) -> int:
    """Tokens of a tile inside the tower."""
    return self.class_tokens + self.num_patches

  def layers_run(self, select_layer: int) -> int:
    """How many layers the selected one of the num_layers + 1 hidden states needs; the embedding is the first.

    Raises:
      ValueError: there is no such hidden state.
    """
    n = self.num_layers
    if not -(n + 1) <= select_layer <= n:
      raise ValueError(
        f"vision_select_layer={select_layer} is outside the {n + 1} hidden states of a ViT of {n} layers; use "
        f"{-(n + 1)} to {n}"
      )
    return select_layer % (n + 1)

  @abc.abstractmethod
  def build(self, *, select_layer: int, rngs: nnx.Rngs) -> "VisionTransformer":
    """The module with fresh parameters, up to the selected hidden state."""


class VisionEncoder(nnx.Module):
  """The stack of blocks."""

  def __init__(
    self, make_layer: Callable[[nnx.Rngs], nnx.Module], *, bounds: tuple[int, ...], rngs: nnx.Rngs
  ):
    self.layers = LayerStack(make_layer, bounds=bounds, rngs=rngs)


class VisionTransformer(nnx.Module):
  """A vision tower up to the hidden state that the projector reads.

  `select_layer` indexes the hidden states (`VisionConfig.layers_run`); layers after the selected one are kept, so
  that a checkpoint comes out whole, and never run.
  """

  def __init__(
    self,
    config: VisionConfig,
    *,
    make_embeddings: Callable[[nnx.Rngs], nnx.Module],
    make_layer: Callable[[nnx.Rngs], nnx.Module],
    make_norm: Callable[[], nnx.Module] | None = None,
    select_layer: int,
    rngs: nnx.Rngs,
  ):
    """Makes the tower.

    Args:
      config: its sizes.
      make_embeddings: makes a module from tiles [I, side, side, 3] to [I, N, C].
      make_layer: makes a block, called as `layer(x, keep, kernels=kernels)` with x [I, N, C] and the drop path's
        factors of its two branches `keep` [2, I] or None.
      make_norm: makes the norm that the last hidden state goes through, if any; the others do not.
      select_layer: see above.
      rngs: randomness of fresh parameters.
    """
    self.num_layers = config.num_layers
    self.run_layers = config.layers_run(select_layer)
    self.embeddings: Any = make_embeddings(rngs)
    bounds = tuple(sorted({0, config.split or 0, self.run_layers, config.num_layers}))

    def make(rngs: nnx.Rngs) -> nnx.Module:
      layer = make_layer(rngs)
      if config.lora is not None:
        lora.attach(layer, config.lora, rngs)
      quantize_layer(layer, config.quantize_base)
      return layer

    self.encoder = VisionEncoder(make, bounds=bounds, rngs=rngs)
    self.post_layernorm: Any = make_norm() if make_norm else None

  def __call__(
    self,
    tiles: Float[Array, "I side side 3"],
    *,
    drop_path: tuple[Float[np.ndarray, " L"], Key[Array, ""]] | None = None,
    dropout_key: Key[Array, ""] | None = None,
    kernels: Kernels | None = None,
    remat: Callable[..., Any] | None = None,
    unroll: int = 1,
  ) -> Float[Array, "I N C"]:
    """Encodes normalized tiles [I, side, side, 3] as the selected hidden state [I, N, C].

    Args:
      tiles: normalized pixels in the compute dtype.
      drop_path: (rate of each layer, random key); None is evaluation.
      dropout_key: randomness of the adapters' dropout; None is evaluation.
      kernels: the backends; None is XLA's.
      remat, unroll: see `LayerStack.scan`.
    """
    x = self.embeddings(tiles)
    backends = kernels or Kernels()
    xs = {} if drop_path is None else {"keep": _keep_branches(x.shape[0], *drop_path)}
    if dropout_key is not None:
      xs["dropout"] = jax.random.split(dropout_key, self.num_layers)

    def apply(layer: Any, x: jax.Array, xs: dict[str, jax.Array]):
      if "dropout" in xs:
        lora.start_dropout(layer, xs["dropout"])
      return layer(x, xs.get("keep"), kernels=backends), {}

    x, _ = self.encoder.layers.scan(apply, x, xs=xs, stop=self.run_layers, remat=remat, unroll=unroll)
    is_last = self.run_layers == self.num_layers
    return self.post_layernorm(x) if self.post_layernorm is not None and is_last else x


def _keep_branches(num_tiles: int, rates: np.ndarray, key: jax.Array) -> jax.Array:
  """Stochastic depth (arXiv:1603.09382): 0 or 1/(1-rate) for each layer, branch and tile."""
  keep = 1 - jnp.asarray(rates, jnp.float32)[:, None, None]
  kept = jax.random.bernoulli(key, keep, (len(rates), 2, num_tiles))
  return jnp.where(kept, 1 / keep, 0.0)


def drop_branch(
  branch: Float[Array, "I N C"], keep: Float[Array, "2 I"] | None, index: int
) -> Float[Array, "I N C"]:
  """A block's branch [I, N, C] under drop path: scaled by row `index` of `keep` [2, I], if any."""
  return branch if keep is None else branch * keep[index, :, None, None].astype(branch.dtype)


def cut_patches(tiles: Float[Array, "I side side 3"], patch_size: int) -> Float[Array, "I P pixels"]:
  """Cuts tiles [I, side, side, 3] into patches [I, P, patch_size * patch_size * 3], row by row."""
  I, side = tiles.shape[:2]
  p, n = patch_size, side // patch_size
  return tiles.reshape(I, n, p, n, p, 3).transpose(0, 1, 3, 2, 4, 5).reshape(I, n * n, p * p * 3)


# --- How checkpoints hold a tower -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
  """A tower in one layout of checkpoints.

  Attributes:
    model_type: what the `vision_config` of config.json says.
    read: a `vision_config` -> the sizes.
    write: the sizes -> a `vision_config`.
    table: the sizes -> names of the tensors; ours begin with "vision_model.".
    constants: entries whose other values would need other code: they are checked, so that no switch of a
      checkpoint is ignored.
    defaults: entries that may be left out.
  """

  model_type: str
  read: Callable[[Mapping[str, Any]], VisionConfig]
  write: Callable[[Any], dict[str, Any]]
  table: Callable[[Any], list[Row]]
  constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tower:
  """A vision tower, as the registry has it.

  Attributes:
    name: for messages.
    config: the class of its sizes.
    forms: how the layouts "internvl" and "hf" hold it; one of them may be missing.
  """

  name: str
  config: type[VisionConfig]
  forms: Mapping[str, Form]


def square_side(value: Any) -> int:
  """The side of a square that a config gives as a number or as (height, width).

  Raises:
    UserError: it is no square.
  """
  if isinstance(value, list | tuple):
    if len(set(value)) != 1:
      raise UserError(f"config.json: vision_config has the size {value}; only squares are supported")
    return value[0]
  return value


def positions_transform(*, class_tokens: int, lead: int) -> Transform:
  """Learned positions [N, C], resampled for tiles of another size.

  Args:
    class_tokens: rows in front of those of the patches.
    lead: axes of size 1 that the checkpoint has in front.
  """
  return Transform(
    lambda x, shape: resize_position_embedding(
      x[0].reshape(x[0].shape[lead:]), shape[0] - class_tokens, class_tokens=class_tokens
    ),
    lambda x: [x.reshape((1,) * lead + x.shape)],
    resizes=True,
  )


def resize_position_embedding(
  positions: Float[np.ndarray, "N C"], num_patches: int, *, class_tokens: int = 1
) -> Float[np.ndarray, "M C"]:
  """Resamples learned positions [class_tokens + P, C] to [class_tokens + num_patches, C] for another tile size.

  The class token's row is kept; the square grid of the others is interpolated bicubically with half-pixel
  centers, clamped borders and a = -0.75, as PyTorch's `interpolate(mode="bicubic")` does it.
  """
  if positions.shape[0] == class_tokens + num_patches:
    return positions
  first, grid = positions[:class_tokens], positions[class_tokens:].astype(np.float64)
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
