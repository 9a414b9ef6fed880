"""InternVL: ViT, projector and language model put together.

Letters: D data shards, R rows, S tokens, T tiles of a shard's pool, P tokens of a tile, Q of one that a Flash compresses,
E width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key, UInt8

from internvl_jax.batch import NO_IMAGE, PIXEL_STATISTICS
from internvl_jax.models.decoder import OUTPUT_AXES, CausalLM, DecoderConfig
from internvl_jax.models.flash import CompressingProjector, FlashConfig, Gating, TokenPooling
from internvl_jax.models.gradients import matmul
from internvl_jax.models.kernels import Kernels
from internvl_jax.models.layers import remat_by_name
from internvl_jax.models.projector import Projector, pixel_shuffle
from internvl_jax.models.quantized import quantize
from internvl_jax.models.towers.tower import VisionConfig
from internvl_jax.parallel.rules import Product, constrain
from internvl_jax.parallel.sharded_gather import take_features


@dataclasses.dataclass(frozen=True, kw_only=True)
class InternVLConfig:
  """Everything that fixes the model's shapes and numbers.

  Attributes:
    vision, text: the parts.
    select_layer, downsample_ratio, ps_version: as in the reference.
    flash: the router of InternVL3.5-Flash; None for a model without.
    quantize: one of `quantized.FORMATS`, or "none".
  """

  vision: VisionConfig
  text: DecoderConfig
  select_layer: int = -1
  downsample_ratio: float = 0.5
  ps_version: str = "v2"
  flash: FlashConfig | None = None
  quantize: str = "none"

  @property
  def tokens_per_tile(self) -> int:
    return round(self.vision.num_patches * self.downsample_ratio**2)

  @property
  def tokens_per_compressed_tile(self) -> int:
    """Q, image tokens of a tile that a Flash compresses."""
    return round(self.vision.num_patches * self.downsample_ratio**4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
  """How a forward pass is computed, as opposed to what: the compute dtype and the choices of RuntimeConfig."""

  dtype: jnp.dtype = jnp.float32
  kernels: Kernels = dataclasses.field(default_factory=Kernels)
  remat: str | None = None
  scan_unroll: int = 1

  @property
  def scan_options(self) -> dict[str, Any]:
    """The options that both parts' scans over layers take."""
    return {"kernels": self.kernels, "remat": remat_by_name(self.remat), "unroll": self.scan_unroll}


SCOPES = ("vision_model", "mlp1", "mlp2", "tile_router", "embed", "language_model", "lm_head")
"""The parts by the names that traces and the compiler's reports have for them."""


def normalize_tiles(tiles: UInt8[Array, "*tiles 3"], kind: str) -> Float[Array, "*tiles 3"]:
  """Turns uint8 tiles [..., 3] into normalized float32, equal to ToTensor + Normalize."""
  mean, std = PIXEL_STATISTICS[kind]
  return (tiles.astype(jnp.float32) / 255.0 - jnp.array(mean)) / jnp.array(std)


class InternVL(nnx.Module):
  """The whole model. Attribute names follow the reference's checkpoints.

  The scopes that its parts run in name them in traces of a run and in the compiler's reports (`SCOPES`).
  """

  def __init__(self, config: InternVLConfig, *, rngs: nnx.Rngs):
    merged = round(1 / config.downsample_ratio**2)
    self.downsample_ratio = config.downsample_ratio
    self.ps_version = config.ps_version
    self.class_tokens = config.vision.class_tokens
    self.vision_model = config.vision.build(select_layer=config.select_layer, rngs=rngs)
    self.mlp1 = Projector(config.vision.hidden_size * merged, config.text.hidden_size, rngs=rngs)
    self.language_model = CausalLM(config.text, rngs=rngs)
    C, is_flash = config.vision.hidden_size, config.flash is not None
    self.mlp2 = CompressingProjector(C * merged**2, config.text.hidden_size, rngs=rngs) if is_flash else None
    self.pooling_before_gating = TokenPooling(C, rngs=rngs) if is_flash else None
    self.gating = Gating(C, rngs=rngs) if is_flash else None
    if config.quantize != "none":
      quantize(self, config.quantize)

  def extract_features(
    self,
    tiles: Float[Array, "I side side 3"],
    how: Execution,
    *,
    drop_path: tuple[Float[np.ndarray, " L"], Key[Array, ""]] | None = None,
    dropout_key: Key[Array, ""] | None = None,
    both: bool = False,
  ) -> Float[Array, "I P E"]:
    """Encodes normalized tiles [I, side, side, 3] as features [I, P, E] in the language model's width.

    With `both`, which takes a Flash, they are [I, P + Q, E]: each tile's P features, and then the Q that it has compressed.
    """
    x = self.encode(tiles, how, drop_path=drop_path, dropout_key=dropout_key)
    return self.projected(x, how, both=both)

  def projected(
    self, vision_hidden: Float[Array, "I N C"], how: Execution, *, both: bool = False
  ) -> Float[Array, "I P E"]:
    """Features [I, P, E] of hidden states [I, N, C], or with `both` [I, P + Q, E]; see `extract_features`."""
    project = self.project_both if both else self.project
    # Tiles are few, but kept at the language model's width they would wait for all of its backward pass.
    remat = remat_by_name(how.remat, in_scan=False)
    return remat(project)(vision_hidden) if remat else project(vision_hidden)

  def encode(
    self,
    tiles: Float[Array, "I side side 3"],
    how: Execution,
    *,
    drop_path: tuple[Float[np.ndarray, " L"], Key[Array, ""]] | None = None,
    dropout_key: Key[Array, ""] | None = None,
  ) -> Float[Array, "I N C"]:
    """The ViT's hidden states [I, N, C] of normalized tiles [I, side, side, 3], class tokens included."""
    with jax.named_scope("vision_model"):
      return self.vision_model(
        tiles.astype(how.dtype), drop_path=drop_path, dropout_key=dropout_key, **how.scan_options
      )

  def project(self, vision_hidden: Float[Array, "I N C"]) -> Float[Array, "I P E"]:
    """Drops the class token of hidden states [I, N, C], shuffles pixels and projects to [I, P, E]."""
    with jax.named_scope("mlp1"):
      return self.mlp1(self._shuffled(vision_hidden, self.downsample_ratio))

  def compress(self, vision_hidden: Float[Array, "I N C"]) -> Float[Array, "I Q E"]:
    """What a Flash makes of hidden states [I, N, C] of tiles that it compresses: features [I, Q, E]."""
    assert self.mlp2 is not None, "the model is no Flash"
    with jax.named_scope("mlp2"):
      return self.mlp2(self._shuffled(vision_hidden, self.downsample_ratio**2))

  def project_both(self, vision_hidden: Float[Array, "I N C"]) -> Float[Array, "I PQ E"]:
    """Features [I, P + Q, E] of hidden states [I, N, C]: those of `project`, and then those of `compress`."""
    return jnp.concatenate([self.project(vision_hidden), self.compress(vision_hidden)], axis=1)

  def gate(self, vision_hidden: Float[Array, "I N C"]) -> Float[Array, "I 2"]:
    """A Flash's logits [I, 2] in float32 for each tile of hidden states [I, N, C]: to compress it, and not to."""
    assert self.pooling_before_gating is not None and self.gating is not None, "the model is no Flash"
    with jax.named_scope("tile_router"):
      return self.gating(self.pooling_before_gating(vision_hidden[:, self.class_tokens :]))

  def _shuffled(self, vision_hidden: Float[Array, "I N C"], ratio: float) -> Float[Array, "I new wide"]:
    """The patches of hidden states [I, N, C], their pixels shuffled by that ratio."""
    x = pixel_shuffle(vision_hidden[:, self.class_tokens :], ratio=ratio, version=self.ps_version)
    # XLA's TPU compiler (libtpu 0.0.52) aborts when it fuses cutting the class token off with what follows.
    return jax.lax.optimization_barrier(x)

  def embed(
    self,
    input_ids: Int[Array, "R S"],
    image_index: Int[Array, "R S"],
    features: Float[Array, "D Q E"],
    how: Execution,
  ) -> Float[Array, "R S E"]:
    """Token embeddings with image features in their places.

    Args:
      input_ids: int [R, S].
      image_index: int [R, S] into the shard's features, or NO_IMAGE.
      features: [D, T*P, E], or [D, T*(P+Q), E] of `both`; rows belong to shards in blocks of R/D. T may be 0.
      how: the compute dtype.

    Returns:
      [R, S, E].
    """
    with jax.named_scope("embed"):
      x = self.language_model.model.embed_tokens(input_ids, dtype=how.dtype)
      if features.shape[1] == 0:
        return x
      # NO_IMAGE is clipped and not used.
      x = jnp.where((image_index != NO_IMAGE)[..., None], take_features(features, image_index), x)
      return constrain(x, "rows", "tokens", None)

  def decode(
    self,
    x: Float[Array, "R S E"],
    how: Execution,
    *,
    positions: Int[Array, "R S"],
    segment_ids: Int[Array, "R S"] | None,
    **options: Any,
  ) -> tuple[Float[Array, "R S E"], dict[str, jax.Array]]:
    """Hidden states [R, S, E] of the language model, ready for `logits`, and its routers' statistics."""
    decoder: Callable[..., Any] = self.language_model.model
    with jax.named_scope("language_model"):
      return decoder(x, positions=positions, segment_ids=segment_ids, **options, **how.scan_options)

  def logits(self, hidden: Float[Array, "*rows E"]) -> Float[Array, "*rows V"]:
    """Scores [..., V] in float32."""
    with jax.named_scope("lm_head"):
      kernel = self.language_model.output_embedding.astype(hidden.dtype)
      return matmul(hidden, kernel, Product(OUTPUT_AXES)).astype(jnp.float32)
