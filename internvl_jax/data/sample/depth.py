"""Gray images of 16 or 32 bits, or of floats, scaled to the 8 bits that a model sees.

Pillow's own conversion, which is the reference's, cuts such values off at 255: an X-ray becomes white, fractions become
black. Here values that fit 8 bits are taken as Pillow takes them, and others are scaled by the least of these ranges
that holds them, so that one factor serves all images of one kind and their brightness can be compared:

    floats of 0 to 1      x 255
    0 to 65535            / 257
    others                least to greatest, image by image: nothing says what is black and what white

A tenth beyond a range is cut off: resampling overshoots.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image

_TOPS = (255, 65535)
_OVERSHOOT = 0.1
# Values scaled at a time: an image may have hundreds of millions.
_BAND = 1 << 20


def is_deep(image: Image.Image) -> bool:
  """Says whether an image's values may not fit 8 bits: modes I;16 (and its byte orders), I and F."""
  return image.mode in ("I", "F") or image.mode.startswith("I;16")


def to_rgb(image: Image.Image) -> tuple[Image.Image, str]:
  """An image as RGB, and what was done to its values; "" where they are taken as Pillow takes them."""
  if not is_deep(image):
    return image.convert("RGB"), ""
  values = np.asarray(image)
  finite, low, high = _extremes(values)
  bottom, top = _range(low, high, fractions=values.dtype.kind == "f")
  if finite and (bottom, top) == (0, 255):
    return image.convert("RGB"), ""
  scaled = np.empty(values.shape, np.uint8)
  # Single precision is enough for 16 bits, and faster; in it, a difference of large values has no digits, or no end.
  precise = np.float32 if bottom == 0 and top in (1, *_TOPS) else np.float64
  factor = precise(255 / (top - bottom) if top > bottom else 0)
  for rows in _bands(values):
    band = np.nan_to_num(values[rows].astype(precise), nan=bottom)
    scaled[rows] = np.rint((np.clip(band, bottom, top) - precise(bottom)) * factor)
  told = f"holds values of {low:g} to {high:g}" + ("" if finite else " and some that are not finite")
  return Image.fromarray(scaled).convert("RGB"), f"{told}: {bottom:g} to {top:g} become 0 to 255"


def _range(low: float, high: float, *, fractions: bool) -> tuple[float, float]:
  """The values that become black and white."""
  for top in (1, *_TOPS) if fractions else _TOPS:
    if -_OVERSHOOT * high <= low and high <= (1 + _OVERSHOOT) * top:
      return 0, top
  return low, high


def _extremes(values: np.ndarray) -> tuple[bool, float, float]:
  """Whether all values are finite, and the least and the greatest of those that are; 0 if none is."""
  finite, lows, highs = True, [], []
  for rows in _bands(values):
    band = values[rows]
    if band.dtype.kind == "f" and not (known := np.isfinite(band)).all():
      finite, band = False, band[known]
    if band.size:
      lows.append(float(band.min()))
      highs.append(float(band.max()))
  return finite, min(lows, default=0.0), max(highs, default=0.0)


def _bands(values: np.ndarray) -> Iterator[slice]:
  rows = max(1, _BAND // values.shape[1])
  return (slice(first, first + rows) for first in range(0, len(values), rows))
