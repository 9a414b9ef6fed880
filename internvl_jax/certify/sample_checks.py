"""Compares samples: token ids, labels, tiles and pixels of every recorded line with what this program makes of it."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from internvl_jax.batch import IGNORE_INDEX, PIXEL_STATISTICS
from internvl_jax.certify.findings import Finding, Status, absent
from internvl_jax.certify.recording import Arrays, Recording
from internvl_jax.data.sample.sample import Sample
from internvl_jax.data.sample.tokenize import ChatTokenizer

# A step of an 8-bit pixel: resizing rounds, and two programs do not round alike.
_STEP = 1.01 / 255
# Normalized pixels are computed by two operations in float32.
_EXACT = 2e-6
# Means and deviations are fitted to pixels that were rounded.
_SAME_STATISTICS = 1e-3


def check(recording: Recording, samples: Sequence[Sample], chat: ChatTokenizer, kind: str) -> list[Finding]:
  """The findings about samples.

  Args:
    recording: theirs.
    samples: ours, of the same lines.
    chat: the tokenizer, for what a message shows.
    kind: the `normalize_type` that ours are normalized by.
  """
  pairs = list(zip(recording.samples, samples, strict=True))
  return [
    _first(recording, "token ids", pairs, lambda theirs, ours: _ids(theirs, ours, chat), _count_tokens),
    _first(recording, "labels", pairs, lambda theirs, ours: _labels(theirs, ours, chat), _count_labels),
    _first(recording, "tiles", pairs, _tiles, _count_tiles),
    _pixels(recording, pairs, kind),
  ]


Pair = tuple[Arrays, Sample]
Difference = tuple[str, str]
"""Where two samples first differ, and the cause."""


def _first(
  recording: Recording,
  stage: str,
  pairs: Sequence[Pair],
  compare: Callable[[Arrays, Sample], Difference | None],
  count: Callable[[Sequence[Pair]], str],
) -> Finding:
  """The finding of a stage whose values are equal or not."""
  found = [(number, compare(*pair)) for number, pair in enumerate(pairs)]
  differing = [(number, difference) for number, difference in found if difference]
  if not differing:
    return Finding(stage=stage, status=Status.AGREES, compared=count(pairs))
  number, (where, cause) = differing[0]
  return Finding(
    stage=stage,
    status=Status.DEPARTS,
    compared=f"{count(pairs)}; {len(differing)} of {len(pairs)} samples differ",
    where=f"{recording.place(number)}, {where}",
    cause=cause,
  )


def _count_tokens(pairs: Sequence[Pair]) -> str:
  return f"{sum(len(theirs['input_ids']) for theirs, _ in pairs):,} tokens"


def _count_labels(pairs: Sequence[Pair]) -> str:
  return f"{sum(int((theirs['labels'] != IGNORE_INDEX).sum()) for theirs, _ in pairs):,} supervised tokens"


def _count_tiles(pairs: Sequence[Pair]) -> str:
  return f"{sum(len(theirs['pixel_values']) for theirs, _ in pairs):,} tiles"


# --- Tokens -------------------------------------------------------------------------------------------------


def first_difference(a: np.ndarray, b: np.ndarray) -> int | None:
  """The first place at which two lists differ; None where they are equal."""
  if np.array_equal(a, b):
    return None
  shorter = min(len(a), len(b))
  differing = np.flatnonzero(a[:shorter] != b[:shorter])
  return int(differing[0]) if len(differing) else shorter


def _ids(theirs: Arrays, ours: Sample, chat: ChatTokenizer) -> Difference | None:
  a, b = theirs["input_ids"], ours.input_ids
  place = first_difference(a, b)
  if place is None:
    return None
  where = f"token {place}"
  images = [int((ids == chat.image_token_id).sum()) for ids in (a, b)]
  first, second = _middles(a, b)
  texts = f"theirs {_shown(first, chat)}, ours {_shown(second, chat)}"
  opening = chat.template.openings["human"]
  heads = [chat.decode(ids, special=True).split(opening, 1) for ids in (a, b)]
  if heads[0][0] != heads[1][0] and heads[0][1:] == heads[1][1:]:
    return where, (
      f"the system message of the template: theirs {_quoted(heads[0][0])}, ours {_quoted(heads[1][0])}; set "
      "--conv_style when recording, or the checkpoint's chat template"
    )
  if images[0] != images[1]:
    return (
      where,
      f"{images[0]} image tokens in theirs, {images[1]} in ours: another number of tiles (see tiles)",
    )
  return where, f"the text between what is equal before and behind it: {texts}"


def _middles(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """What is left of two lists without the beginning and the end that they share."""

  def same(pairs: zip) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

  start = same(zip(a, b, strict=False))
  end = min(same(zip(a[::-1], b[::-1], strict=False)), min(len(a), len(b)) - start)
  return a[start : len(a) - end], b[start : len(b) - end]


def _shown(ids: np.ndarray, chat: ChatTokenizer) -> str:
  return _quoted(chat.decode(ids[:40], special=True)) if len(ids) else "nothing"


def _quoted(text: str) -> str:
  return repr(text if len(text) <= 60 else text[:57] + "...")


def _labels(theirs: Arrays, ours: Sample, chat: ChatTokenizer) -> Difference | None:
  a, b = theirs["labels"], ours.labels
  place = first_difference(a, b)
  if place is None:
    return None
  where = f"token {place}"
  if len(a) == len(b):
    for shift in (-1, 1):
      rolled = np.full_like(b, IGNORE_INDEX)
      rolled[max(0, shift) : len(b) + min(0, shift)] = b[max(0, -shift) : len(b) - max(0, shift)]
      if np.array_equal(a, rolled):
        ahead = "of the next token" if shift < 0 else "of the token before"
        return where, f"labels are shifted by one: theirs are those {ahead}; the model shifts them once more"
  if not np.array_equal(theirs["input_ids"], ours.input_ids):
    return where, "the token ids differ (see token ids)"
  more = (a != IGNORE_INDEX) & (b == IGNORE_INDEX)
  fewer = (a == IGNORE_INDEX) & (b != IGNORE_INDEX)
  ids = theirs["input_ids"]
  said = [f"theirs also supervises {_shown(ids[more], chat)}"] if more.any() else []
  said += [f"theirs does not supervise {_shown(ids[fewer], chat)}"] if fewer.any() else []
  return where, "; ".join(said) or "labels are not the tokens' own ids"


# --- Pixels -------------------------------------------------------------------------------------------------


def _tiles(theirs: Arrays, ours: Sample) -> Difference | None:
  a, b = theirs["pixel_values"], ours.tiles
  if len(a) == len(b) and (not len(a) or a.shape[-2:] == b.shape[1:3]):
    return None
  if len(a) and len(b) and a.shape[-2:] != b.shape[1:3]:
    return "tile 0", f"tiles of {a.shape[-1]} pixels in theirs, of {b.shape[1]} in ours: force_image_size"
  cause = "min_dynamic_patch, max_dynamic_patch or dynamic_image_size"
  if abs(len(a) - len(b)) == 1:
    cause = "use_thumbnail"
  return f"tile {min(len(a), len(b))}", f"{len(a)} tiles in theirs, {len(b)} in ours: {cause}"


def normalized(tiles: np.ndarray, kind: str) -> np.ndarray:
  """Tiles [T, H, W, 3] of uint8 as theirs are: [T, 3, H, W], normalized."""
  mean, std = (np.array(values, np.float32) for values in PIXEL_STATISTICS[kind])
  return ((tiles.astype(np.float32) / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)


def _pixels(recording: Recording, pairs: Sequence[Pair], kind: str) -> Finding:
  largest, rounded, count = 0.0, False, 0
  for number, (theirs, ours) in enumerate(pairs):
    a, b = theirs["pixel_values"], normalized(ours.tiles, kind)
    if a.shape != b.shape or not a.size:
      continue
    count += a.size
    apart = np.abs(a - b)
    if (apart <= _EXACT).all():
      largest = max(largest, float(apart.max() / np.abs(a).max()))
      continue
    found = _pixel_difference(a, b, ours.tiles, kind)
    if found is None:
      rounded = True
      continue
    (tile, channel, row, column), cause = found
    return Finding(
      stage="pixels",
      status=Status.DEPARTS,
      compared=f"{count:,} numbers",
      difference=float(apart.max() / np.abs(a).max()),
      where=f"{recording.place(number)}, tile {tile}, channel {channel} ({'RGB'[channel]}), row {row}, column {column}",
      cause=cause,
    )
  finding = Finding(stage="pixels", status=Status.AGREES, compared=f"{count:,} numbers", difference=largest)
  if not count:
    return absent("pixels", "no sample has as many tiles on both sides")
  if not rounded:
    return finding
  return dataclasses.replace(
    finding,
    status=Status.KNOWN,
    difference=None,
    cause="within one step of 8 bits: their resizing is torchvision's, which does not round as Pillow does",
  )


def _pixel_difference(
  theirs: np.ndarray, ours: np.ndarray, tiles: np.ndarray, kind: str
) -> tuple[list[int], str] | None:
  """Where pixels first differ by more than rounding, [tile, channel, row, column], and why; None where they do not."""
  apart = np.abs(theirs - ours)
  known = PIXEL_STATISTICS[kind]
  statistics = _statistics(theirs, tiles)
  if statistics is not None and np.abs(np.array(statistics) - np.array(known)).max() > _SAME_STATISTICS:
    names = [_statistic_of(values, which) for which, values in enumerate(statistics)]
    cause = f"normalized by the mean {names[0]} and the standard deviation {names[1]} (normalize_type)"
    return np.argwhere(apart > _EXACT)[0].tolist(), cause
  beyond = np.argwhere(apart > _STEP / np.array(known[1])[:, None, None])
  return (beyond[0].tolist(), _pixel_cause(theirs, ours)) if len(beyond) else None


# Largest difference of a normalized pixel that is the same but for rounding.
_SAME = 0.1


def _pixel_cause(theirs: np.ndarray, ours: np.ndarray) -> str:
  """What would make theirs of ours."""
  if np.abs(theirs[:, ::-1] - ours).max() < _SAME:
    return "channels are in the order blue, green, red"
  count = len(ours)

  def is_order(order: Sequence[int]) -> bool:
    return bool(np.abs(ours[list(order)] - theirs).max() < _SAME)

  if is_order([count - 1, *range(count - 1)]):
    return "the thumbnail comes first, ours is last"
  for cut in (count - 1, count):  # With a thumbnail at the end, and without.
    for rows in (n for n in range(2, cut) if cut % n == 0):
      by_columns = np.arange(cut).reshape(rows, -1).T.ravel().tolist()
      if is_order([*by_columns, *range(cut, count)]):
        return f"tiles are in another order: column by column, ours row by row ({rows} rows of {cut // rows})"
  order = _order(theirs, ours)
  if order is not None:
    return f"tiles are in another order: theirs are our tiles {order}"
  return "the pixels are of another picture, or were augmented or resized otherwise"


def _statistics(theirs: np.ndarray, tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
  """The mean and deviation [3] by which theirs are our tiles normalized, if there are such."""
  x = tiles.transpose(0, 3, 1, 2) / 255.0
  means, stds = [], []
  for channel in range(3):
    a, b = theirs[:, channel].ravel().astype(np.float64), x[:, channel].ravel()
    if np.ptp(b) == 0:
      return None
    slope, offset = np.polyfit(b, a, 1)
    if slope <= 0 or np.abs(slope * b + offset - a).max() > _STEP * slope:
      return None
    stds.append(1 / slope)
    means.append(-offset / slope)
  return np.array(means), np.array(stds)


def _order(theirs: np.ndarray, ours: np.ndarray) -> list[int] | None:
  """Which of our tiles each of theirs is, each of ours once, if there is such an order."""
  left = list(range(len(ours)))
  order = []
  for tile in theirs:
    nearest = min(left, key=lambda i, tile=tile: float(np.abs(ours[i] - tile).max()))
    if np.abs(ours[nearest] - tile).max() >= _SAME:
      return None
    left.remove(nearest)
    order.append(nearest)
  return order


def _statistic_of(values: np.ndarray, which: int) -> str:
  """A mean (0) or deviation (1) in numbers, with the normalize_type that has it."""
  names = [name for name, known in PIXEL_STATISTICS.items() if np.abs(values - known[which]).max() < 1e-3]
  return _numbers(values) + (f" of {names[0]!r}" if names else "")


def _numbers(values: np.ndarray) -> str:
  return "(" + ", ".join(f"{value:.3f}" for value in values) + ")"
