"""Which samples share a row: planned from their sizes alone, before anything is decoded.

A row has two budgets, tokens and tiles, and which of them is scarce depends on the data. The stream of
samples is packed in order, with a look-ahead:

1. A row takes the oldest waiting samples, but leaves room of both budgets for one or two more.
2. It is completed by the two samples that leave the least behind: after them, the rows that the
   waiting samples would fill if samples could be divided, max(tokens / max_tokens, tiles / max_tiles), are fewest. So
   the scarcer budget is filled first, and both where both are scarce. This is repeated while a sample fits.

**Bounds.** A row takes no sample that has `look_ahead` or more older ones still waiting, and always takes the
oldest. So fewer than `look_ahead` rows pass from the row that first overtakes a sample to its own.

The arithmetic is on integers, so rows are the same on every host. They do not depend on how the stream is cut
into chunks, nor on where a run was interrupted.

    >>> settings = PackSettings(max_tokens=100, max_tiles=4)
    >>> list(pack([[60, 1], [70, 2], [30, 2], [40, 3]], settings))
    [[0, 3], [1, 2]]

The reference keeps `max_buffer_size` open rows and looks for one that has room for the next sample; here one
row is open and looks for samples, the further, the more open rows are asked for (`look_ahead_of`). With `allow_overflow` the reference cuts off
what exceeds a row and moves it to the next; here no sample is cut, and the row is longer.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

DEFAULT_LOOK_AHEAD = 256

# Changes whenever the same sizes would be packed into other rows: a state of another number is refused.
ALGORITHM = 1
# The oldest leave room for 1.5 average samples, and are enough when room for 2.5 is left or 32 were passed
# over: then about two complete the row, and the sizes that wait keep the distribution of the stream. Both
# budgets count. On text alone mixed with images almost without text, with both budgets about as scarce, rows
# are 0.2 to 1.3 % above the ideal; up to 2.1 % when either budget ends this, 4.4 % without _OTHER_BUDGET too.
_HALVES_RESERVED, _HALVES_ENOUGH = 3, 5
_PASSED_OVER = 32
# What is left of the less scarce budget counts 1/256 as much. The samples that wait may happen to be short of
# one budget while the stream is short of both.
_OTHER_BUDGET = 256
# Pairs are sought among so many of the oldest that fit. Measured on 6,000 samples of the recipes' sizes: 128
# make rows no fuller and take 1.4 times as long.
_CANDIDATES = 64
# `max_buffer_size` of all recipes, and the reference's default: what looks DEFAULT_LOOK_AHEAD far.
_USUAL_OPEN_ROWS = 20
# Sizes that `pack` hands over at a time.
_CHUNK = 1 << 16

_TOKENS, _TILES, _POSITION = range(3)
_NEVER = np.iinfo(np.int64).max


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PackSettings:
  """The budgets of rows, and how far to look for samples.

  Attributes:
    max_tokens: tokens of a row.
    max_tiles: tiles of a row; 0 for text only.
    look_ahead: samples among which a row chooses, besides those that it holds.
    allow_overflow: a row may exceed max_tokens by its last sample, if that is nearer to a full row.
    over_long: a sample that fits no row: `error` raises ValueError, `drop` leaves it out and counts it.
  """

  max_tokens: int
  max_tiles: int
  look_ahead: int = DEFAULT_LOOK_AHEAD
  allow_overflow: bool = False
  over_long: Literal["error", "drop"] = "error"

  def __post_init__(self):
    for name, least in (("max_tokens", 1), ("max_tiles", 0), ("look_ahead", 1)):
      if getattr(self, name) < least:
        raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")
    if self.over_long not in ("error", "drop"):
      raise ValueError(f"over_long must be 'error' or 'drop', got {self.over_long!r}")

  def fits(self, tokens: ArrayLike, tiles: ArrayLike) -> np.ndarray:
    """Computes bool, of the arguments' shape: whether a sample of this size fits an empty row."""
    return (np.asarray(tokens) <= self.max_tokens) & (np.asarray(tiles) <= self.max_tiles)


class PackStats(NamedTuple):
  """How full the rows are that a packer has decided so far.

  Attributes:
    rows: their number.
    samples: samples in them.
    dropped: samples left out because they fit no row.
    token_fill: tokens over max_tokens, mean of the rows.
    tile_fill: tiles over max_tiles, mean of the rows.
    samples_per_row: mean of the rows.
  """

  rows: int
  samples: int
  dropped: int
  token_fill: float
  tile_fill: float
  samples_per_row: float


class Packer:
  """Rows of a stream of sizes, decided as early as the look-ahead allows.

  The stream is fed in chunks of any size. Positions count from 0, also over dropped samples and over flushes.

  Attributes:
    settings: budgets and look-ahead.
    position: the place of the stream to feed next; all before it are in rows, waiting or dropped.
  """

  def __init__(self, settings: PackSettings):
    self.settings = settings
    self.position = 0
    # int64 [3, n]: tokens, tiles and position of the samples that wait, oldest first.
    self._waiting = np.zeros((3, 0), np.int64)
    self._rows = self._samples = self._tokens = self._tiles = 0

  def feed(self, sizes: ArrayLike) -> Iterator[list[int]]:
    """Yields the rows, positions ascending, that the next samples of the stream decide.

    Samples are taken from `sizes` as rows need them, so read all rows before the next call; or stop at any
    row, keep `get_state()`, and go on later with the stream from `position` on.

    Args:
      sizes: int [n, 2], tokens and tiles of each sample.

    Raises:
      ValueError: a size is wrong, or fits no row and `over_long` is `error`. Nothing of the chunk was taken.
    """
    chunk = _checked(sizes, self.settings, self.position)
    return self._decide(chunk, end=self.position + np.shape(sizes)[0], flush=False)

  def flush(self) -> Iterator[list[int]]:
    """Yields the rows of all that wait: the end of an epoch or a run. The stream may go on after it."""
    return self._decide(np.zeros((3, 0), np.int64), end=self.position, flush=True)

  @property
  def decided(self) -> int:
    """The place of the stream before which every sample is in a row or dropped."""
    return int(self._waiting[_POSITION, 0]) if self._waiting.shape[1] else self.position

  @property
  def stats(self) -> PackStats:
    settings, rows = self.settings, max(self._rows, 1)
    return PackStats(
      rows=self._rows,
      samples=self._samples,
      dropped=self.position - self._samples - self._waiting.shape[1],
      token_fill=self._tokens / (rows * settings.max_tokens),
      tile_fill=self._tiles / (rows * max(settings.max_tiles, 1)),
      samples_per_row=self._samples / rows,
    )

  def get_state(self) -> dict[str, Any]:
    """The state that the rows to come depend on, for JSON: a few integers and the samples that wait."""
    return {
      "algorithm": ALGORITHM,
      "settings": dataclasses.asdict(self.settings),
      "position": self.position,
      "decided": [self._rows, self._samples, self._tokens, self._tiles],
      "waiting": self._waiting.tolist(),
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to the place where `get_state` was called.

    Raises:
      ValueError: the state is of other settings or of another version of the algorithm.
    """
    ours = {"algorithm": ALGORITHM, "settings": dataclasses.asdict(self.settings)}
    for name, value in ours.items():
      if state[name] != value:
        raise ValueError(
          f"packing state of other {name}: saved {state[name]}, now {value}; rows would differ"
        )
    self.position = state["position"]
    self._rows, self._samples, self._tokens, self._tiles = state["decided"]
    self._waiting = np.array(state["waiting"], np.int64).reshape(3, -1)

  def _decide(self, chunk: np.ndarray, *, end: int, flush: bool) -> Iterator[list[int]]:
    """Yields the rows that can be decided; at each, this packer is in the state that goes on after it."""
    queue = np.concatenate([self._waiting, chunk], axis=1)
    while queue.shape[1] and (decided := _next_row(queue, self.settings, flush)):
      row, seen = decided
      seen = max(seen, self._waiting.shape[1])
      tokens, tiles, positions = queue[:, row].tolist()
      if seen > self._waiting.shape[1]:
        self.position = int(queue[_POSITION, seen - 1]) + 1
      self._rows += 1
      self._samples += len(row)
      self._tokens += sum(tokens)
      self._tiles += sum(tiles)
      queue = _without(queue, row)
      self._waiting = waiting = queue[:, : seen - len(row)].copy()
      yield positions
      assert self._waiting is waiting, "the packer was used again before all rows were read"
    self._waiting = queue.copy()  # not a view that keeps the whole chunk
    self.position = end


def pack(sizes: ArrayLike, settings: PackSettings) -> Iterator[list[int]]:
  """Yields the rows of a whole stream; see `Packer.feed`."""
  packer, sizes = Packer(settings), np.asarray(sizes)
  for start in range(0, len(sizes), _CHUNK):
    yield from packer.feed(sizes[start : start + _CHUNK])
  yield from packer.flush()


def count_rows(
  sizes: ArrayLike, settings: PackSettings, progress: Callable[[int], Any] = lambda samples: None
) -> int:
  """How many rows these samples need in this order, e.g. those of an epoch; says how many are placed."""
  rows = 0
  for row in pack(sizes, settings):
    rows += 1
    progress(len(row))
  return rows


def look_ahead_of(max_buffer_size: int) -> int:
  """The look-ahead for so many open rows of the reference: in proportion, 256 samples for the usual 20."""
  return -(-DEFAULT_LOOK_AHEAD * max_buffer_size // _USUAL_OPEN_ROWS)


def _checked(sizes: ArrayLike, settings: PackSettings, start: int) -> np.ndarray:
  """Computes int64 [3, n]: tokens, tiles and position of the samples that fit a row."""
  sizes = np.asarray(sizes)
  if not sizes.size:
    return np.zeros((3, 0), np.int64)
  if sizes.ndim != 2 or sizes.shape[1] != 2 or sizes.dtype.kind not in "iu":
    raise ValueError(
      f"sizes must be integers [n, 2], tokens and tiles; got {sizes.dtype} {list(sizes.shape)}"
    )
  tokens, tiles = sizes.astype(np.int64).T
  positions = np.arange(start, start + len(sizes))
  impossible, fits = (tokens < 1) | (tiles < 0), settings.fits(tokens, tiles)
  for wrong, why in (
    (impossible, "a sample has 1 token or more and 0 tiles or more"),
    (~fits, f"a row holds {settings.max_tokens} tokens and {settings.max_tiles} tiles"),
  ):
    if wrong.any() and (wrong is impossible or settings.over_long == "error"):
      at = int(wrong.argmax())
      raise ValueError(
        f"the sample at position {positions[at]} of the stream has {tokens[at]} tokens and {tiles[at]} "
        f"tiles, but {why}; this holds for {wrong.sum()} of the {len(sizes)} samples of this chunk"
      )
  return np.stack([tokens, tiles, positions])[:, fits]


class _Sizes(NamedTuple):
  """Tokens and tiles of samples, or of the room of a row: int64 [n] or scalars."""

  tokens: Any
  tiles: Any

  def at(self, indices: Any) -> "_Sizes":
    return _Sizes(self.tokens[indices], self.tiles[indices])

  def sums(self) -> "_Sizes":
    return _Sizes(self.tokens.sum(), self.tiles.sum())

  def without(self, other: "_Sizes") -> "_Sizes":
    return _Sizes(self.tokens - other.tokens, self.tiles - other.tiles)

  def fits_in(self, room: "_Sizes", overflow: bool) -> np.ndarray:
    """Computes bool [n]; with overflow, tokens fit while there is room for one."""
    tokens_fit = room.tokens > 0 if overflow else self.tokens <= room.tokens
    return tokens_fit & (self.tiles <= room.tiles)


def _next_row(queue: np.ndarray, settings: PackSettings, flush: bool) -> tuple[list[int], int] | None:
  """The next row as indices into the queue, ascending, and how much of the queue was looked at.

  None: it depends on samples that are yet to come.
  """
  if not flush and queue.shape[1] < settings.look_ahead:
    return None
  row = _oldest(queue, settings)
  seen = len(row) + settings.look_ahead
  if queue.shape[1] < seen:
    if not flush:
      return None
    seen = queue.shape[1]
  # Both budgets in one unit, in which a full row is `full` of either.
  per_token, per_tile = max(settings.max_tiles, 1), settings.max_tokens
  full = per_token * per_tile
  sizes = _Sizes(queue[_TOKENS, :seen] * per_token, queue[_TILES, :seen] * per_tile)
  room = _Sizes(np.int64(full), np.int64(settings.max_tiles * per_tile))
  waits, added = np.ones(seen, np.bool_), np.array(row)
  while len(added):
    waits[added] = False
    room = room.without(sizes.at(added).sums())
    left = np.flatnonzero(waits)
    added = left[_completion(sizes.at(left), room, settings.allow_overflow)]
    row += added.tolist()
  return sorted(row), seen


def _oldest(queue: np.ndarray, settings: PackSettings) -> list[int]:
  """The indices of the samples that begin a row: the oldest of all, and those that leave room."""
  near = queue[:2, : settings.look_ahead]
  # Room times this is compared with halves of an average sample, in integers.
  twice = 2 * near.shape[1]
  reserve_tokens, reserve_tiles = (_HALVES_RESERVED * near.sum(axis=1)).tolist()
  enough_tokens, enough_tiles = (_HALVES_ENOUGH * near.sum(axis=1)).tolist()
  passed_over = min(_PASSED_OVER, settings.look_ahead)
  row = [0]
  room_tokens, room_tiles = (int(room) for room in (settings.max_tokens, settings.max_tiles) - queue[:2, 0])
  for at in range(1, queue.shape[1]):
    if at - len(row) >= passed_over:
      break
    if room_tokens * twice < enough_tokens and room_tiles * twice < enough_tiles:
      break
    tokens, tiles = room_tokens - int(queue[_TOKENS, at]), room_tiles - int(queue[_TILES, at])
    if min(tokens, tiles) >= 0 and tokens * twice >= reserve_tokens and tiles * twice >= reserve_tiles:
      row.append(at)
      room_tokens, room_tiles = tokens, tiles
  return row


def _completion(waiting: _Sizes, room: _Sizes, overflow: bool) -> list[int]:
  """The one or two of the waiting samples that complete a row best; none if none does.

  Args:
    waiting: oldest first.
    room: what the row has left.
    overflow: the larger may exceed the room for tokens, if that is nearer to a full row than without it.
  """
  fits = np.flatnonzero(waiting.fits_in(room, overflow))[:_CANDIDATES]
  if not len(fits):
    return []
  # What is left behind when all room is filled; a pair leaves more by the room that it leaves.
  after = waiting.sums().without(room)
  # The last, of no size, is no sample: so one sample is a pair too, and none, where any would overflow.
  sizes = _Sizes(np.append(waiting.tokens[fits], 0), np.append(waiting.tiles[fits], 0))
  tokens = np.subtract.outer(room.tokens - sizes.tokens, sizes.tokens)
  tiles = np.subtract.outer(room.tiles - sizes.tiles, sizes.tiles)
  if overflow:
    too_large = np.minimum.outer(sizes.tokens, sizes.tokens) >= room.tokens
    np.abs(tokens, out=tokens)
  else:
    too_large = tokens < 0
  too_large |= tiles < 0
  tokens += after.tokens
  tiles += after.tiles
  cost = np.maximum(tokens, tiles) * _OTHER_BUDGET
  cost += tokens
  cost += tiles
  cost[too_large] = _NEVER
  cost.ravel()[: -1 : len(cost) + 1] = _NEVER  # a sample is no pair with itself; nobody is, with nobody
  pair = divmod(int(cost.argmin()), len(cost))  # of equals the oldest
  return [int(fits[sample]) for sample in pair if sample < len(fits)]


def _without(queue: np.ndarray, row: list[int]) -> np.ndarray:
  """The queue without a row, in place: those that were passed over move up to its new beginning."""
  top = row[-1] + 1
  passed = np.delete(queue[:, :top], row, axis=1)
  queue[:, len(row) : top] = passed
  return queue[:, len(row) :]
