"""The batches that the data room makes and the step consumes.

Letters: A micro-batches of an optimizer step, R rows, S tokens of a row, D data shards (each with R/D rows),
T tiles of a shard's pool, P tokens of a tile.

NamedTuples of numpy arrays: JAX takes them as pytrees, and worker processes need not import JAX.
"""

from typing import Any, NamedTuple, TypeAlias

Array: TypeAlias = Any
"""np.ndarray on the host, jax.Array inside the step, a sharding where placement is described."""

IGNORE_INDEX = -100
"""Label of a token that is not supervised (the convention of PyTorch's cross-entropy)."""

NO_IMAGE = -1
"""Value of `image_index` at a token that is not part of an image."""


PIXEL_STATISTICS = {
  "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.2757711)),
  "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation of red, green and blue on [0, 1], by normalize_type.

They are the reference's. Of CLIP's, OpenAI's last is 0.27577711; the reference lost a digit, and trained with that.
"""


class SFTBatch(NamedTuple):
  """One optimizer step's batch for supervised fine-tuning.

  Rows are dealt to data shards in blocks of R/D; a row may point only into its own shard's pool of tiles.

  Attributes:
    input_ids: int32 [A, R, S], 0 where padded.
    targets: int32 [A, R, S], the token to predict at each place: the *next* token's label, already shifted;
      `IGNORE_INDEX` where nothing is to be predicted.
    loss_weight: float32 [A, R, S], weight of each target before normalization; 0 where ignored.
    positions: int32 [A, R, S], counted from 0 within each segment; see `PreferenceBatch.shared` for the exception.
    segment_ids: int32 [A, R, S], from 1; 0 is padding. A token attends within its own segment only.
    image_index: int32 [A, R, S], which of the T*P features of the shard's pool stands here, or `NO_IMAGE`.
    tiles: uint8 [A, D, T, H, W, 3], not normalized; T may be 0.
  """

  input_ids: Array
  targets: Array
  loss_weight: Array
  positions: Array
  segment_ids: Array
  image_index: Array
  tiles: Array

  @property
  def rows(self) -> "SFTBatch":
    """The batch itself: what every kind of batch has."""
    return self


class PreferenceBatch(NamedTuple):
  """One optimizer step's batch for preference optimization.

  K, the most pairs that a row has room for, is fixed by the length of rows: see `pairs_of_row`.

  Attributes:
    rows: as for supervised fine-tuning. Segments 2p - 1 and 2p of a row are the chosen and the rejected answer of its
      p-th pair, p from 1, each behind the whole prompt; they point at the same features of the pool. `loss_weight`
      is 1 at every supervised token. Where a pair shares its prompt, the prompt stands in the first segment only, and
      the second begins with a copy of its last token, whose target there is the rejected answer's first token.
    pair_weight: float32 [A, R, K], 1 where the row has such a pair, before normalization; else 0.
    pair_index: int32 [A, R, K], index of the sample in the mixture; -1 where there is none.
    reference: float32 [A, R, K, 2], log-probabilities of the chosen and the rejected answer by the reference policy,
      where they were computed before; NaN elsewhere.
    shared: bool [A, R, S], prompt tokens of a pair's first segment that its second segment sees as well, and whose
      positions its own go on from; all False where prompts are not shared.
  """

  rows: SFTBatch
  pair_weight: Array
  pair_index: Array
  reference: Array
  shared: Array


Batch: TypeAlias = SFTBatch | PreferenceBatch
"""What a step takes; its tokens and tiles are its `rows`."""


def pairs_of_row(length: int) -> int:
  """K for rows of so many tokens: a pair has at least four, a token to read and one to predict in each answer."""
  return max(1, length // 4)


class BatchCounts(NamedTuple):
  """What of a batch is not padding.

  Attributes:
    supervised: tokens that a loss is computed on.
    tokens: tokens of all segments.
    image_tokens: those of them that stand for an image; P a tile.
    pairs: pairs of a token and one that it attends to: float32, since a large batch has more than an int32 holds.
  """

  supervised: Array
  tokens: Array
  image_tokens: Array
  pairs: Array


def count(batch: Batch) -> BatchCounts:
  """Counts a batch of numpy arrays on the host, or of jax arrays inside the step."""
  batch = batch.rows
  real = batch.segment_ids > 0
  return BatchCounts(
    supervised=(batch.targets != IGNORE_INDEX).sum(),
    tokens=real.sum(),
    image_tokens=(batch.image_index != NO_IMAGE).sum(),
    pairs=((batch.positions + 1) * real).sum(dtype="float32"),
  )
