"""The batches that `data/` makes and the step consumes.

Letters: A micro-batches of an optimizer step, R rows, S tokens of a row, D data shards (each with R/D rows),
T tiles of a shard's pool, P tokens of a tile.

NamedTuples of numpy arrays: JAX takes them as pytrees, and worker processes need not import JAX.
"""

import functools
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, Protocol, TypeAlias

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


class Axes:
  """The dtype and the axes of a field of a batch, at the field's declaration.

  Rows and pools are sharded over the data-parallel devices; `parallel.batches.batch_shardings` reads it from here.

  Attributes:
    dtype: numpy's name.
    names: of each axis a letter (A, R, S, D, T, and letters of a kind of batch's own), or its size.
  """

  def __init__(self, dtype: str, *names: str | int):
    """Names dtype and axes."""
    self.dtype, self.names = dtype, names


class TokenBatch(NamedTuple):
  """The tokens and tiles of an optimizer step, which every task's batch has as its `rows`; some tasks need no more.

  Rows are dealt to data shards in blocks of R/D; a row may point only into its own shard's pool of tiles.

  Attributes:
    input_ids: int32 [A, R, S], 0 where padded.
    targets: int32 [A, R, S], the token to predict at each place: the *next* token's label, already shifted;
      `IGNORE_INDEX` where nothing is to be predicted.
    loss_weight: float32 [A, R, S], weight of each target before normalization; 0 where ignored.
    positions: int32 [A, R, S], counted from 0 within each segment, or on from the prompt that it shares.
    segment_ids: int32 [A, R, S], from 1; 0 is padding. A token attends within its own segment only.
    image_index: int32 [A, R, S], the index of the token's feature in the T*P of the shard's pool, or `NO_IMAGE`.
    tiles: uint8 [A, D, T, H, W, 3], not normalized; T may be 0.
  """

  input_ids: Annotated[Array, Axes("int32", "A", "R", "S")]
  targets: Annotated[Array, Axes("int32", "A", "R", "S")]
  loss_weight: Annotated[Array, Axes("float32", "A", "R", "S")]
  positions: Annotated[Array, Axes("int32", "A", "R", "S")]
  segment_ids: Annotated[Array, Axes("int32", "A", "R", "S")]
  image_index: Annotated[Array, Axes("int32", "A", "R", "S")]
  tiles: Annotated[Array, Axes("uint8", "A", "D", "T", "H", "W", 3)]

  @property
  def rows(self) -> "TokenBatch":
    """The batch itself: what every kind of batch has."""
    return self


class Batch(Protocol):
  """What a step takes: a NamedTuple whose fields declare their axes. Each kind of batch has tokens and tiles."""

  @property
  def rows(self) -> TokenBatch:
    """The tokens and tiles."""
    ...


def abstract_batch(kind: type, sizes: Mapping[str, int], make: Callable[[tuple[int, ...], str], Any]) -> Any:
  """A batch of a kind, made field by field: shapes to compile for, or arrays of zeros.

  Args:
    kind: the NamedTuple.
    sizes: of the axes, by their letters.
    make: function (shape, dtype) -> a field.
  """
  fields = {}
  for name, declared in fields_of(kind).items():
    if isinstance(declared, Axes):
      shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in declared.names)
      fields[name] = make(shape, declared.dtype)
    else:
      fields[name] = abstract_batch(declared, sizes, make)
  return kind(**fields)


@functools.cache
def fields_of(kind: type) -> dict[str, "Axes | type"]:
  """The axes of every field of a kind of batch; for a field that is a batch itself, its kind."""
  hints = typing.get_type_hints(kind, include_extras=True)
  return {name: getattr(hint, "__metadata__", (hint,))[0] for name, hint in hints.items()}


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
