"""Fits a sample that is longer than it may be: integers in, integers out.

`loader.on_over_length` says what is done about a sample of more than `data.max_seq_length` tokens:

    error         the run stops
    drop          it is lost, and counted
    shrink_tiles  its images get fewer tiles, or its video fewer frames, until it fits; what is still too long is
                  truncated
    truncate      its end is cut off, before an image rather than through it

A packed row may be shorter still. What exceeds it, in tokens or in tiles, is an over-long sample under the first three
policies too, and whatever is left above it is split into pieces, again never through an image; a piece of which
less than 1/256 is supervised is dropped. (Both are the reference's rules for packed data.)
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.data.sample.tokenize import Chat
from internvl_jax.data.where import OverLengthError, UnsupervisedError, Where

Policy = Literal["error", "drop", "shrink_tiles", "truncate"]

# A piece must have one supervised token in so many.
_SUPERVISED_AMONG = 256


class Limits(NamedTuple):
  """How long samples may be, and what is done about longer ones.

  Attributes:
    max_length: tokens of a sample: data.max_seq_length.
    row_tokens: tokens of a packed row: data.max_packed_tokens; None where rows are not packed.
    row_tiles: tiles of a packed row: data.num_images_expected; None likewise.
    policy: loader.on_over_length.
  """

  max_length: int
  row_tokens: int | None = None
  row_tiles: int | None = None
  policy: Policy = "truncate"

  @property
  def tokens(self) -> int:
    """The most tokens of a sample that stays as it is."""
    return min(self.max_length, self.row_tokens or self.max_length)

  def hold(self, tokens: int, tiles: int) -> bool:
    """Says whether a sample of that size stays as it is."""
    return tokens <= self.tokens and (self.row_tiles is None or tiles <= self.row_tiles)

  def hold_together(self, lengths: Sequence[int], tiles: int, shared: int = 0) -> bool:
    """Says whether a sample's conversations, of so many tokens each, stay as they are and fit one row.

    Args:
      lengths: tokens of each.
      tiles: of the sample.
      shared: tokens that two of them have in common and that are in the row once.
    """
    fits_row = self.row_tokens is None or sum(lengths) - shared <= self.row_tokens
    return fits_row and self.hold(max(lengths), tiles)

  def __str__(self) -> str:
    named = {"max_seq_length": self.max_length, "max_packed_tokens": self.row_tokens}
    named["num_images_expected"] = self.row_tiles
    return ", ".join(f"data.{name}={value}" for name, value in named.items() if value is not None)


class Piece(NamedTuple):
  """A part of a sample that takes a row of its own or, packed, beside other samples.

  Attributes:
    start: its first token.
    stop: the token after its last.
    first_image: its first image.
    end_image: the image after its last.
  """

  start: int
  stop: int
  first_image: int
  end_image: int


class Limited(NamedTuple):
  """A sample, cut to its limits.

  Attributes:
    pieces: one or more.
    complete: every token of the sample is in one of them.
  """

  pieces: tuple[Piece, ...]
  complete: bool


def limited(chat: Chat, tiles: Sequence[int], tokens_per_tile: int, limits: Limits, where: Where) -> Limited:
  """Truncates or splits a sample to the limits; shrinking comes before.

  Args:
    chat: its conversation.
    tiles: of each image.
    tokens_per_tile: image tokens of one tile.
    limits: see `Limits`.
    where: its line, for errors.

  Raises:
    OverLengthError: it is lost, by the policy or because an image is too large.
    UnsupervisedError: nothing that could be learned is left.
  """
  image_tokens = [count * tokens_per_tile for count in tiles]
  total = chat.length(image_tokens)
  if limits.hold(total, sum(tiles)):
    return Limited((Piece(0, total, 0, len(tiles)),), True)
  size = f"{total} tokens and {sum(tiles)} tiles"
  if limits.policy in ("error", "drop"):
    raise where.error(
      f"{size} exceed {limits}; raise it, lower max_dynamic_patch, or let loader.on_over_length shorten the sample",
      OverLengthError,
    )
  layout = Layout(chat, np.array(tiles, np.int64), np.array(image_tokens, np.int64))
  length = layout.stop(0, limits.max_length, None, total)
  pieces = tuple(_split(layout, length, limits, where))
  taught = [piece for piece in pieces if layout.teaches(piece, at_least=1 if len(pieces) > 1 else 0)]
  if not taught:
    lost = len(tiles) - (pieces[-1].end_image if pieces else 0)
    raise where.error(
      f"{size} exceed {limits}: {length} tokens are kept{f', without {lost} of the images' if lost else ''}, and too "
      "few of them are supervised; raise it, lower max_dynamic_patch or set loader.on_over_length='shrink_tiles'",
      OverLengthError if lost else UnsupervisedError,
    )
  return Limited(tuple(taught), sum(piece.stop - piece.start for piece in taught) == total)


def _split(layout: "Layout", length: int, limits: Limits, where: Where) -> Iterator[Piece]:
  """Yields the pieces of the first tokens that fit a row each."""
  start = 0
  while start < length:
    stop = layout.stop(start, limits.row_tokens or length, limits.row_tiles, length)
    first, end = np.searchsorted(layout.begins, (start, stop)).tolist()
    if stop == start:
      raise where.error(
        f"image {first + 1} alone has {layout.tiles[first]} tiles and {layout.ends[first] - layout.begins[first]} "
        f"tokens, more than a row ({limits}); raise it or lower max_dynamic_patch",
        OverLengthError,
      )
    yield Piece(start, stop, first, end)
    start = stop


class Layout:
  """Positions of the images and supervised tokens of a sample.

  Attributes:
    begins, ends: int64 [images], the first token of each, `<img>` included, and the one after the last.
    tiles: int64 [images].
  """

  def __init__(self, chat: Chat, tiles: np.ndarray, image_tokens: np.ndarray):
    """Lays out a conversation whose images have so many tiles and tokens, [images] each."""
    # Of each image, <img> and </img> included: the first token and the one after the last.
    self.begins = chat.contexts - 1 + np.cumsum(image_tokens - 1) - (image_tokens - 1)
    self.ends = self.begins + image_tokens + 2
    self.tiles = tiles
    labels = chat.expand(image_tokens.tolist()).labels
    self._taught = np.concatenate([[0], np.cumsum(labels != IGNORE_INDEX)])

  def stop(self, start: int, tokens: int, tiles: int | None, end: int) -> int:
    """Where a piece that begins at `start` stops: at most at `end`, and before an image that does not fit."""
    stop = min(start + tokens, end)
    first = int(np.searchsorted(self.begins, start))
    too_far = self.ends[first:] > stop
    if tiles is not None:
      too_far |= np.cumsum(self.tiles[first:]) > tiles
    return min(stop, int(self.begins[first:][too_far.argmax()])) if too_far.any() else stop

  def teaches(self, piece: Piece, at_least: int) -> bool:
    """Whether enough tokens of a piece are supervised, its first one not counted; see `tokenize.supervised`.

    Args:
      piece: a part of the sample.
      at_least: 1 asks for one supervised token in 256, 0 for any.
    """
    supervised = int(self._taught[piece.stop] - self._taught[min(piece.start + 1, piece.stop)])
    return supervised > 0 and supervised * _SUPERVISED_AMONG >= at_least * (piece.stop - piece.start)
