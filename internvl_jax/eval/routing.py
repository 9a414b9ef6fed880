"""Routing of tiles: which tiles of a question an InternVL3.5-Flash compresses, and what is left of the prompt.

    tiles -> features of both resolutions, probabilities -> host: which tiles are compressed -> shorter prompts

The ViT runs once: its features stay on the devices until the prompts, whose lengths depend on the probabilities, are read.

Letters: B rows, S tokens of a padded prompt, T tiles, P image tokens of a tile, Q of one that is compressed, D width of the
language model.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from internvl_jax.batch import NO_IMAGE
from internvl_jax.eval.compression import Rule, rule_of
from internvl_jax.eval.embedding import pool_tiles
from internvl_jax.models.functional import ModelDef
from internvl_jax.models.internvl import Execution, InternVL, InternVLConfig, normalize_tiles
from internvl_jax.parallel.host_arrays import fetch


class Counts(NamedTuple):
  """How many tiles were compressed.

  Attributes:
    tiles: in all.
    compressed: of them.
    saved: share of the image tokens that this saved.
  """

  tiles: int
  compressed: int
  saved: float

  def line(self) -> str:
    """The counts as a text."""
    return f"Compressed {self.compressed} of {self.tiles} tiles: {self.saved:.1%} fewer image tokens"


@dataclasses.dataclass(eq=False)
class Tally:
  """Counts tiles, of all questions since it was last read."""

  tiles: int = 0
  compressed: int = 0

  def add(self, compressed: np.ndarray) -> None:
    """Adds the tiles of a question, bool [t]."""
    self.tiles += len(compressed)
    self.compressed += int(compressed.sum())


class RoutedPrompts(NamedTuple):
  """A batch of prompts whose tiles are routed.

  Attributes:
    ids: token ids of each prompt that are left.
    image_index: of each prompt's tokens, the index of the token's feature, or NO_IMAGE.
    features: [1, T*(P+Q), D], those of all tiles in both resolutions.
  """

  ids: list[np.ndarray]
  image_index: list[np.ndarray]
  features: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileRouter:
  """Routes the tiles of prompts, each prompt's by themselves, as the published code does for one question.

  Attributes:
    model: the definition of a Flash.
    how: how the forward pass is computed.
    normalize_type: statistics of the pixels.
    image_token_id: id of <IMG_CONTEXT>.
    tokens_per_tile, tokens_per_compressed_tile: P and Q.
    rule: which tiles are compressed.
  """

  model: ModelDef[InternVL]
  how: Execution
  normalize_type: str
  image_token_id: int
  tokens_per_tile: int
  tokens_per_compressed_tile: int
  rule: Rule = dataclasses.field(compare=False)
  _tally: Tally = dataclasses.field(default_factory=Tally, compare=False, init=False)

  def __call__(
    self, params: dict[str, jax.Array], ids: Sequence[np.ndarray], tiles: Sequence[np.ndarray]
  ) -> RoutedPrompts:
    """Routes the tiles of prompts, and shortens the prompts.

    Args:
      params: the weights.
      ids: token ids of each prompt, with P image tokens for each of its tiles.
      tiles: uint8 [t, H, W, 3], the tiles of each prompt; at least one has some.
    """
    features, logits = self._encode(params, pool_tiles(tiles))
    probabilities = softmax(np.asarray(fetch(logits)))[:, 0]
    shorter, index, first = list[np.ndarray](), list[np.ndarray](), 0
    for prompt, own in zip(ids, tiles, strict=True):
      compressed = self.rule(probabilities[first : first + len(own)])
      self._tally.add(compressed)
      kept, places = self.shortened(prompt, compressed, first)
      shorter.append(kept)
      index.append(places)
      first += len(own)
    return RoutedPrompts(shorter, index, features)

  def shortened(self, ids: np.ndarray, compressed: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """The token ids that are left of a prompt, and the index of each one's feature.

    Of a compressed tile's P image tokens the first Q stay.

    Args:
      ids: the prompt's.
      compressed: bool [t], which of its tiles are compressed.
      first: the number of its first tile in the pool.
    """
    is_image = ids == self.image_token_id
    assert is_image.sum() == len(compressed) * self.tokens_per_tile, "image tokens are those of the tiles"
    tile, place = np.divmod(np.arange(is_image.sum()), self.tokens_per_tile)
    index = np.full(len(ids), NO_IMAGE, np.int32)
    index[is_image] = (
      (first + tile) * (self.tokens_per_tile + self.tokens_per_compressed_tile)
      + place
      + self.tokens_per_tile * compressed[tile]
    )
    kept = np.ones(len(ids), np.bool_)
    kept[is_image] = ~compressed[tile] | (place < self.tokens_per_compressed_tile)
    return ids[kept], index[kept]

  def take_counts(self) -> Counts | None:
    """What was routed since this was last asked; None if nothing was."""
    tally = self._tally
    if not tally.tiles:
      return None
    saved = 1 - self.tokens_per_compressed_tile / self.tokens_per_tile
    saved *= tally.compressed / tally.tiles
    found = Counts(tally.tiles, tally.compressed, saved)
    tally.tiles = tally.compressed = 0
    return found

  @functools.partial(jax.jit, static_argnums=0)
  def _encode(self, params, tiles):
    """Features [1, T*(P+Q), D] of both resolutions and the gate's logits [T, 2] of tiles [T, H, W, 3]."""
    model = self.model.bind(params)
    hidden = model.encode(normalize_tiles(tiles, self.normalize_type), self.how)
    features = model.project_both(hidden)
    return features.reshape(1, -1, features.shape[-1]), model.gate(hidden)


def softmax(logits: np.ndarray) -> np.ndarray:
  """Probabilities of float32 logits along their last axis."""
  shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return shares / shares.sum(axis=-1, keepdims=True)


def make_router(
  config: InternVLConfig,
  compress: str,
  *,
  model: ModelDef[InternVL],
  how: Execution,
  normalize_type: str,
  image_token_id: int,
) -> TileRouter | None:
  """The router that the setting `compress` asks for (`rule_of`); None where no tile is compressed.

  Raises:
    UserError: the setting cannot be followed.
  """
  rule = rule_of(compress, config.flash)
  if rule is None:
    return None
  return TileRouter(
    model=model,
    how=how,
    normalize_type=normalize_type,
    image_token_id=image_token_id,
    tokens_per_tile=config.tokens_per_tile,
    tokens_per_compressed_tile=config.tokens_per_compressed_tile,
    rule=rule,
  )
