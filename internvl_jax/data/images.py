"""From an image file to uint8 tiles.

Tiles stay uint8 up to the device, where they become `(tile / 255 - mean) / std` with the constants of `internvl_jax.batch`.
"""

import contextlib
import io
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image

from internvl_jax.batch import PIXEL_STATISTICS
from internvl_jax.data import files, tiling
from internvl_jax.data.errors import DataError, Where, did_you_mean

# Qualities of the JPEG augmentation, both included (the set that the reference draws from).
JPEG_QUALITY = (75, 100)

# What Pillow's decoders raise for a damaged file, besides OSError.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def normalization(normalize_type: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns float32 mean [3] and standard deviation [3] of a `normalize_type`.

  Raises:
    DataError: the name is unknown.
  """
  if normalize_type not in PIXEL_STATISTICS:
    raise DataError(
      f"data.normalize_type: unknown normalisation {normalize_type!r}{did_you_mean(normalize_type, PIXEL_STATISTICS)}"
    )
  mean, std = PIXEL_STATISTICS[normalize_type]
  return np.asarray(mean, np.float32), np.asarray(std, np.float32)


def open_image(path: str, where: Where) -> Image.Image:
  """Returns the decoded image as RGB, in the orientation in which it is stored.

  Args:
    path: the image file, a path or a URL.
    where: the line that names it, for errors.

  Raises:
    DataError: the file is missing, empty or damaged, or cannot be fetched.
  """
  with _opened(path, where, header=False) as image:
    return image.convert("RGB")


def image_size(path: str, where: Where) -> tuple[int, int]:
  """Returns (width, height) from an image's header. Of a remote image no more is fetched, where its format has one.

  Pillow reads all of a WebP or AVIF file before it tells its size.

  Raises:
    DataError: the file is missing, empty or no image, or cannot be fetched.
  """
  with _opened(path, where, header=True) as image:
    return image.size


@contextlib.contextmanager
def _opened(path: str, where: Where, *, header: bool) -> Iterator[Image.Image]:
  """An image that is open, with what goes wrong in the body named. With `header`, its pixels will not be read."""
  source = path
  try:
    if files.is_remote(path):
      source = files.open_file(path) if header else io.BytesIO(files.read_bytes(path))
    with Image.open(source) as image:
      yield image
  except FileNotFoundError as error:
    raise where.error(f"image not found: {path}; check the dataset's root in the meta file") from error
  except files.FetchError as error:
    raise where.error(f"image {path} cannot be fetched: {error}") from error
  except _DECODE_ERRORS as error:
    if _is_empty(path):
      raise where.error(f"image {path} is empty (0 bytes); restore it or delete the line") from error
    # Pillow names what it was given, which is an object in memory if the image is remote.
    cause = f"{type(error).__name__}: {error}".replace(repr(source), repr(path))
    raise where.error(f"image {path} cannot be decoded ({cause}); restore it or delete the line") from error


def _is_empty(path: str) -> bool:
  try:
    status = files.look(path)
  except OSError:  # What went wrong with the content is the better message.
    return False
  return status.is_file and status.size == 0


def image_tiles(
  image: Image.Image,
  *,
  tile_size: int,
  min_tiles: int,
  max_tiles: int,
  use_thumbnail: bool,
  dynamic: bool,
  pad_color: tuple[int, int, int] | None = None,
  rng: np.random.Generator | None = None,
) -> np.ndarray:
  """Cuts an image into tiles.

  With `dynamic`, the image is resized to the grid nearest to its aspect ratio and cut row by row; a thumbnail
  of the whole comes last when there is more than one tile. Without, the whole image is the one tile.
  Padding and JPEG augmentation work on each tile before it gets its final size, as in the reference.

  Args:
    image: RGB.
    tile_size: side of a tile, in pixels.
    min_tiles: fewest tiles of the grid.
    max_tiles: most tiles of the grid.
    use_thumbnail: add the thumbnail.
    dynamic: cut into a grid.
    pad_color: pad to a square with this colour (0-255) before resizing; None: stretch to a square.
    rng: draws the quality of the JPEG augmentation, tile by tile; None: no augmentation, else no padding.

  Returns:
    uint8 [tiles, tile_size, tile_size, 3].
  """
  if not dynamic:
    parts = [image]
  else:
    columns, rows = tiling.grid(image.width, image.height, min_tiles, max_tiles, tile_size)
    whole = image.resize((columns * tile_size, rows * tile_size), Image.Resampling.BICUBIC)
    if rng is None and not (use_thumbnail and columns * rows > 1):
      return _cut(whole, columns, rows, tile_size)
    parts = [Image.fromarray(tile) for tile in _cut(whole, columns, rows, tile_size)]
    if use_thumbnail and len(parts) > 1:
      parts.append(image.resize((tile_size, tile_size), Image.Resampling.BICUBIC))
  if rng is not None:
    parts = [jpeg_reencode(part, int(rng.integers(*JPEG_QUALITY, endpoint=True))) for part in parts]
  elif pad_color is not None:
    parts = [pad_to_square(part, pad_color) for part in parts]
  size = (tile_size, tile_size)
  # A tile of the grid has its size already; resizing it again would change nothing.
  parts = [part if part.size == size else part.resize(size, Image.Resampling.BICUBIC) for part in parts]
  return np.stack([np.asarray(part) for part in parts])


def _cut(image: Image.Image, columns: int, rows: int, tile_size: int) -> np.ndarray:
  """Returns uint8 [rows * columns, tile_size, tile_size, 3], the first row's tiles first."""
  pixels = np.asarray(image).reshape(rows, tile_size, columns, tile_size, 3)
  return np.ascontiguousarray(pixels.swapaxes(1, 2)).reshape(-1, tile_size, tile_size, 3)


def pad_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
  """Returns the image centred on a square of its longer side."""
  side = max(image.size)
  square = Image.new("RGB", (side, side), color)
  square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
  return square


def mean_color(normalize_type: str) -> tuple[int, int, int]:
  """Returns the colour (0-255) that padding uses: the mean, rounded down."""
  red, green, blue = (int(255 * value) for value in PIXEL_STATISTICS[normalize_type][0])
  return red, green, blue


def jpeg_reencode(image: Image.Image, quality: int) -> Image.Image:
  """Returns the image after a round trip through JPEG."""
  buffer = io.BytesIO()
  image.save(buffer, format="JPEG", quality=quality)
  return Image.open(buffer).convert("RGB")
