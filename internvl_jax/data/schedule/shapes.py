"""The shapes that batches may have: few, and known before anything is read, so that the step compiles once for each."""

import dataclasses
from collections.abc import Sequence

from internvl_jax.arguments import DataTrainingArguments, LoaderConfig
from internvl_jax.data.schedule.packing import PackSettings, look_ahead_of
from internvl_jax.data.where import DataError

_SHORTEST_BUCKET = 256


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BatchShapes:
  """The shapes of batches.

  Attributes:
    sequence_sizes: buckets of the row length S, ascending.
    tile_sizes: buckets of the pool size T that the user sets; see `tile_bucket`.
  """

  sequence_sizes: tuple[int, ...]
  tile_sizes: tuple[int, ...]

  @classmethod
  def of(
    cls, data: DataTrainingArguments, loader: LoaderConfig, rows: int, longest_sample: int, longest_name: str
  ) -> "BatchShapes":
    """The shapes that the settings allow.

    Args:
      data: budgets of rows.
      loader: buckets.
      rows: of a device in a micro-batch.
      longest_sample: tokens of the longest sample.
      longest_name: what that is, for errors.

    Raises:
      DataError: a bucket is not positive, or none holds the longest row.
    """
    name = "data.max_packed_tokens" if data.use_packed_ds else longest_name
    if data.use_packed_ds and data.allow_overflow:
      name += " and a sample beyond it"
    longest = longest_row(data, longest_sample)
    return cls(
      sequence_sizes=sequence_buckets(longest, loader.sequence_buckets, name),
      tile_sizes=tile_sizes(data, loader, rows),
    )

  def fitting(self, tokens: int, tiles: int) -> tuple[int, int]:
    """The shape (S, T) of a batch whose longest row and fullest pool have so many tokens and tiles."""
    length = next((size for size in self.sequence_sizes if size >= tokens), self.sequence_sizes[-1])
    return length, tile_bucket(tiles, self.tile_sizes)

  def programs_line(self, most_tiles: int) -> str:
    """Says which programs there may be, for pools of up to so many tiles."""
    pools, largest = {0}, tile_bucket(most_tiles, self.tile_sizes)
    while max(pools) < largest:
      pools.add(tile_bucket(max(pools) + 1, self.tile_sizes))
    tiles = [size for size in sorted(pools) if size or not self.tile_sizes]
    return (
      f"rows of {_listed(self.sequence_sizes)} tokens, pools of {_listed(tiles)} tiles: at most "
      f"{len(self.sequence_sizes) * len(tiles)} programs, each compiled when the first batch of its shape comes"
    )


def _listed(sizes: Sequence[int]) -> str:
  return ", ".join(map(str, sizes))


def pack_settings(data: DataTrainingArguments) -> PackSettings:
  """The budgets of packed rows."""
  return PackSettings(
    max_tokens=data.max_packed_tokens,
    max_tiles=data.num_images_expected,
    look_ahead=look_ahead_of(data.max_buffer_size),
    allow_overflow=data.allow_overflow,
    over_long="drop",
  )


def longest_row(data: DataTrainingArguments, longest_sample: int) -> int:
  """The most tokens of a row: of a packed one with `allow_overflow` the last sample may exceed the limit."""
  if not data.use_packed_ds:
    return longest_sample
  return data.max_packed_tokens + (longest_sample if data.allow_overflow else 0)


def tile_sizes(data: DataTrainingArguments, loader: LoaderConfig, rows: int) -> tuple[int, ...]:
  """The sizes of a shard's pool of tiles: the full budget of its rows alone in strict mode."""
  if data.use_packed_ds and data.strict_mode:
    return (data.num_images_expected * rows,)
  return loader.tile_buckets


def sequence_buckets(
  max_length: int, buckets: Sequence[int] = (), name: str = "data.max_seq_length"
) -> tuple[int, ...]:
  """The row lengths S in use, ascending.

  Args:
    max_length: longest row in tokens.
    buckets: lengths set by the user; empty: max_length and its halves down to 256 tokens.
    name: what max_length is, for errors.

  Raises:
    DataError: a length is not positive, or none holds the longest sample.
  """
  if buckets:
    return _checked_buckets("sequence_buckets", buckets, max_length, name)
  lengths = [max_length]
  while lengths[-1] % 2 == 0 and lengths[-1] // 2 >= _SHORTEST_BUCKET:
    lengths.append(lengths[-1] // 2)
  return tuple(reversed(lengths))


def tile_bucket(needed: int, buckets: Sequence[int] = ()) -> int:
  """The pool size T for so many tiles.

  Args:
    needed: tiles of the fullest pool; 0 stays 0 (a batch of text only).
    buckets: sizes set by the user. Above them, and without them, the sizes are 1, 2, 3, 4, 6, 8, 12, 16, 24, ...
  """
  if not needed:
    return 0
  fitting = [size for size in buckets if size >= needed]
  if fitting:
    return min(fitting)
  power = 1 << (needed - 1).bit_length()
  return power * 3 // 4 if power >= 4 and needed <= power * 3 // 4 else power


def _checked_buckets(name: str, buckets: Sequence[int], needed: int, what: str) -> tuple[int, ...]:
  buckets = tuple(sorted(set(buckets)))
  if buckets[0] < 1:
    raise DataError(f"loader.{name}: sizes must be 1 or more, got {buckets[0]}")
  if buckets[-1] < needed:
    raise DataError(
      f"loader.{name}: the largest, {buckets[-1]}, is below {what}, {needed}; add a bucket of {needed}"
    )
  return buckets
