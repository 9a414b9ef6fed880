"""What is left of a preference pair that is longer than it may be."""

from collections.abc import Sequence

import numpy as np

from internvl_jax.data.sample.fitting import Layout, Limited, Limits, Piece
from internvl_jax.data.sample.tokenize import Chat
from internvl_jax.data.where import OverLengthError, UnsupervisedError, Where


def limited_pair(
  chats: Sequence[Chat],
  tiles: Sequence[int],
  tokens_per_tile: int,
  limits: Limits,
  where: Where,
  *,
  shared: int = 0,
) -> tuple[Limited, ...]:
  """Returns what is left of a preference pair under the limits, one piece of each of its conversations.

  Each conversation is limited to `limits.max_length` tokens by itself, and cut at its end, so that the prompt stays
  whole in both. The two and their images, which they share, must fit one row: a pair is never split.

  Args:
    chats: that of the chosen and that of the rejected answer; all images are in the prompt.
    tiles: of each image, shared by both.
    tokens_per_tile: image tokens of one tile.
    limits: see `Limits`.
    where: its line, for errors.
    shared: tokens of their prompt that are in the row once.

  Raises:
    OverLengthError: it is lost, by the policy, because an image is too large or because a row has no room for both.
    UnsupervisedError: nothing of an answer is left, or the same of both.
  """
  image_tokens = [count * tokens_per_tile for count in tiles]
  lengths = [chat.length(image_tokens) for chat in chats]
  kept = [min(length, limits.max_length) for length in lengths]
  size = f"a chosen answer of {lengths[0]} and a rejected one of {lengths[1]} tokens, prompts included, with {sum(tiles)} tiles"
  if not limits.hold_together(lengths, sum(tiles), shared) and limits.policy in ("error", "drop"):
    raise where.error(
      f"{size} exceed {limits}; raise it, lower max_dynamic_patch, or let loader.on_over_length shorten the pair",
      OverLengthError,
    )
  if not limits.hold_together(kept, sum(tiles), shared):
    raise where.error(
      f"{size} are {sum(kept) - shared} tokens of one row, more than it has room for ({limits}), and a pair is not split; raise "
      "it, lower max_dynamic_patch or data.max_seq_length, or set loader.on_over_length='shrink_tiles'",
      OverLengthError,
    )
  if kept != lengths:
    _check_cut(chats, tiles, image_tokens, kept, f"{size} exceed {limits}", where)
  return tuple(
    Limited((Piece(0, stop, 0, len(tiles)),), stop == length)
    for stop, length in zip(kept, lengths, strict=True)
  )


def _check_cut(
  chats: Sequence[Chat],
  tiles: Sequence[int],
  image_tokens: Sequence[int],
  kept: Sequence[int],
  size: str,
  where: Where,
) -> None:
  """Refuses a pair that has nothing to tell apart after its conversations were cut to so many tokens."""
  remedy = "raise it, lower max_dynamic_patch or set loader.on_over_length='shrink_tiles'"
  for chat, stop in zip(chats, kept, strict=True):
    layout = Layout(chat, np.array(tiles, np.int64), np.array(image_tokens, np.int64))
    if not layout.teaches(Piece(0, stop, 0, len(tiles)), at_least=0):
      lost = int((layout.ends > stop).sum())
      raise where.error(
        f"{size}: {stop} tokens are kept{f', without {lost} of the images' if lost else ''}, and none of an answer; "
        f"{remedy}",
        OverLengthError if lost else UnsupervisedError,
      )
  chosen, rejected = (
    chat.expand(image_tokens).input_ids[:stop] for chat, stop in zip(chats, kept, strict=True)
  )
  if np.array_equal(chosen, rejected):
    raise where.error(
      f"{size}: the {kept[0]} tokens that are kept are the same for both answers; {remedy}", UnsupervisedError
    )
