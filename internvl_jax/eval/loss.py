"""The loss on held-out samples: the cross-entropy of what training would learn of them, without an update.

Letters: B rows, S tokens of a padded row, T tiles, P tokens of a tile.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.data.sample.sample import Sample
from internvl_jax.eval.embedding import embed_rows, pool_tiles
from internvl_jax.losses.vocab_parallel import linear_token_losses
from internvl_jax.models.functional import ModelDef
from internvl_jax.models.internvl import Execution, InternVL
from internvl_jax.parallel import rules
from internvl_jax.parallel.host_arrays import fetch

_SHORTEST = 128


class TokenLoss(NamedTuple):
  """The loss of a sample.

  Attributes:
    total: the sum over its tokens that are learned.
    tokens: how many these are.
  """

  total: float
  tokens: int

  @staticmethod
  def mean(losses: "Sequence[TokenLoss]") -> float:
    """The mean over the tokens of several samples."""
    return sum(loss.total for loss in losses) / max(1, sum(loss.tokens for loss in losses))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class HeldOutLoss:
  """Computes the loss of samples in batches of one size; nothing is dropped.

  Rows are padded to a power of two, so that few programs are compiled. Where the parameters are sharded over a mesh, so is
  what is computed.

  Attributes:
    model: the model's definition.
    how: how the forward pass is computed.
    normalize_type: statistics of the pixels.
    image_token_id: id of <IMG_CONTEXT>.
    batch_size: B; a smaller last batch is filled up.
  """

  model: ModelDef[InternVL]
  how: Execution
  normalize_type: str
  image_token_id: int
  batch_size: int

  def __call__(self, params: dict[str, jax.Array], samples: Sequence[Sample]) -> list[TokenLoss]:
    """The loss of each sample; those of at most B fit into a batch."""
    found: list[TokenLoss] = []
    mesh = rules.mesh_of(params)
    for start in range(0, len(samples), self.batch_size):
      group = samples[start : start + self.batch_size]
      ids, targets, segments, tiles = self._pad(group)
      with rules.scope(mesh):
        totals = fetch(self._totals(params, ids, targets, segments, tiles))
      tokens = np.sum(targets != IGNORE_INDEX, axis=1)
      found += [TokenLoss(float(totals[row]), int(tokens[row])) for row in range(len(group))]
    return found

  def _pad(self, group: Sequence[Sample]) -> tuple[np.ndarray, ...]:
    """input_ids, targets and segment_ids [B, S], and the tiles [T, H, W, 3] of all rows in order."""
    longest = max(len(sample.input_ids) for sample in group)
    shape = self.batch_size, max(_SHORTEST, 1 << (longest - 1).bit_length())
    ids, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    targets = np.full(shape, IGNORE_INDEX, np.int32)
    for row, sample in enumerate(group):
      length = len(sample.input_ids)
      ids[row, :length], segments[row, :length] = sample.input_ids, 1
      # A token's target is the one behind it.
      targets[row, : length - 1] = sample.labels[1:]
    return ids, targets, segments, pool_tiles([sample.tiles for sample in group])

  @functools.partial(jax.jit, static_argnums=0)
  def _totals(self, params, input_ids, targets, segment_ids, tiles):
    """The sums of the rows' token losses, float32 [B]."""
    model = self.model.bind(params)
    x = embed_rows(
      model,
      self.how,
      input_ids,
      segment_ids,
      tiles,
      image_token_id=self.image_token_id,
      normalize_type=self.normalize_type,
    )
    positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
    hidden, _ = model.decode(x, self.how, positions=positions, segment_ids=segment_ids)
    losses = linear_token_losses(hidden, model.language_model.output_embedding, targets)
    return jnp.sum(losses, axis=1)
