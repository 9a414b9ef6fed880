"""The bicubic resize of RGB images as Pillow does it, to the bit, by compiled loops.

Nothing of Pillow's filter is written down here. Its weights are asked of Pillow: an image of single bright points, resized, is
a table of them. In which order Pillow's two passes go depends on its version, and decides about the last bit, so it is
found out by trying: `find` compares with Pillow, and gives nothing where it does not find the same bits.
"""

import functools
from collections.abc import Callable

import numpy as np
from PIL import Image

# The bicubic filter reaches so many pixels to each side: of the smaller of both images.
_REACH = 2
# Sums take weights in groups of this many.
_GROUP = 4
# More than this many times smaller, Pillow resizes: the table of weights grows as the square of it.
_MOST_SHRUNK = 32

Order = Callable[[int, int, int, int], bool]
"""Says, from (width, height) before and after, whether the pass along columns goes first."""


def _rows_first(width: int, height: int, new_width: int, new_height: int) -> bool:
  """Pillow up to 12."""
  return False


def _columns_first_if_shorter(width: int, height: int, new_width: int, new_height: int) -> bool:
  """Pillow 13: where the height shrinks, and by more than twice what the width does."""
  return height - new_height > max(0, 2 * (width - new_width))


ORDERS: tuple[Order, ...] = (_rows_first, _columns_first_if_shorter)


@functools.lru_cache(maxsize=512)
def weights(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray]:
  """Finds the weighted sums by which one side of an image is resized.

  Args:
    size: pixels of the side.
    new_size: pixels of the resized side, n.

  Returns:
    int64 [n], the first pixel of each sum, ascending; int32 [n, t], the weights in units of 2^-22, 0 beyond the image.
  """
  from internvl_jax.data.sample.resize_loops import BITS

  scale = size / new_size
  reach = _REACH * max(scale, 1.0)
  taps = -(-int(np.ceil(2 * reach)) // _GROUP) * _GROUP
  # Pixel i is centered at i + 0.5.
  first = np.floor((np.arange(new_size) + 0.5) * scale - reach + 0.5).astype(np.int64).clip(0)
  # No sum reaches two of a row's points, which are `taps` apart: what Pillow makes of them is a single weight.
  points = np.zeros((taps, size), np.int32)
  for row in range(taps):
    points[row, row::taps] = 1 << BITS
  spread = np.asarray(Image.fromarray(points).resize((new_size, taps), Image.Resampling.BICUBIC))
  pixel = first[:, None] + np.arange(taps)
  found = np.where(pixel < size, spread[pixel % taps, np.arange(new_size)[:, None]], 0).astype(np.int32)
  if (found.sum(1, dtype=np.int64) != spread.sum(0, dtype=np.int64)).any():
    raise ValueError(f"Pillow {Image.__version__} weighs pixels that are further away than {_REACH}")
  return first, found


class Resizer:
  """Resizes to grids of tiles with one order of passes."""

  def __init__(self, order: Order):
    """Loads the compiled loops.

    Raises:
      ImportError: Numba is not installed, or not for this numpy.
      RuntimeError: it cannot be used here.
    """
    from internvl_jax.data.sample import resize_loops

    self._order, self._resize = order, resize_loops.resize

  def suits(self, size: tuple[int, int], side: int) -> bool:
    """Says whether an image of (width, height) can be resized here, to tiles of this side and larger."""
    return max(size) <= _MOST_SHRUNK * side

  def __call__(self, pixels: np.ndarray, columns: int, tiles: np.ndarray) -> None:
    """Resizes an image to a grid of tiles.

    Args:
        pixels: uint8 [height, width, 3], contiguous and writeable, as Numba's types say.
      columns: of the grid.
      tiles: uint8 [tiles, side, side, 3], written to; the grid's first row first.
    """
    (height, width), (count, side) = pixels.shape[:2], tiles.shape[:2]
    new_width, new_height = columns * side, count // columns * side
    self._resize(
      pixels.reshape(height, 3 * width),
      *weights(width, new_width),
      *weights(height, new_height),
      self._order(width, height, new_width, new_height),
      tiles.reshape(count, side, 3 * side),
    )


# (width, height), (columns, rows) and side of the images that are compared: larger, smaller and both; where the orders
# of passes differ and where they do not; sides smaller than a filter; equal sides.
_TRIED = (
  ((40, 60), (1, 1), 48),
  ((47, 50), (2, 2), 24),
  ((50, 47), (2, 2), 24),
  ((150, 96), (3, 1), 40),
  ((49, 50), (1, 1), 48),
  ((49, 51), (1, 1), 48),
  ((130, 170), (1, 1), 16),
  ((3, 1), (2, 3), 16),
  ((32, 100), (2, 1), 16),
  ((100, 48), (1, 3), 16),
)


def find() -> Resizer:
  """A resizer that gives Pillow's bits.

  Raises:
    ImportError, RuntimeError: as for `Resizer`.
    ValueError: none does.
  """
  images = [
    np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8) for (width, height), *_ in _TRIED
  ]
  for order in ORDERS:
    resizer = Resizer(order)
    if all(_equal(resizer, image, grid, side) for image, (_, grid, side) in zip(images, _TRIED, strict=True)):
      return resizer
  raise ValueError(f"Pillow {Image.__version__} gives other bits")


def _equal(resizer: Resizer, pixels: np.ndarray, grid: tuple[int, int], side: int) -> bool:
  columns, rows = grid
  tiles = np.empty((rows * columns, side, side, 3), np.uint8)
  resizer(pixels, columns, tiles)
  wanted = np.asarray(Image.fromarray(pixels).resize((columns * side, rows * side), Image.Resampling.BICUBIC))
  return np.array_equal(
    tiles, wanted.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(tiles.shape)
  )
