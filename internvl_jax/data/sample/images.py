"""From an image file to uint8 tiles.

Tiles stay uint8 up to the device, where they become `(tile / 255 - mean) / std` with the constants of `internvl_jax.batch`.
"""

import contextlib
import dataclasses
import io
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from internvl_jax.batch import PIXEL_STATISTICS
from internvl_jax.data.sample import compiled, content, depth, notes, tiling
from internvl_jax.data.sample.notes import Note, note
from internvl_jax.data.sample.pool import TilePool
from internvl_jax.data.source import files
from internvl_jax.data.source.media import Content, Media, name_of
from internvl_jax.data.where import DataError, Where
from internvl_jax.errors import did_you_mean

# Qualities of the JPEG augmentation, both included (the set that the reference draws from).
JPEG_QUALITY = (75, 100)

# The reference takes images of any size, where Pillow by itself warns above 89 million pixels and refuses twice as
# many. Scans and maps are that large; so this warns above 268 million, and refuses what would take 2 GiB decoded,
# before it is decoded.
Image.MAX_IMAGE_PIXELS = 1 << 28
# Pillow refuses a PNG of which one text is longer than 1 MiB, as image editors write them. The reference raises this
# limit too; that of all texts together, 64 MiB, stays.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


Picture = Image.Image | np.ndarray
"""A decoded RGB image: Pillow's, or uint8 [height, width, 3] where a faster decoder made it."""


def normalization(normalize_type: str) -> tuple[np.ndarray, np.ndarray]:
  """Computes float32 mean [3] and standard deviation [3] of a `normalize_type`.

  Raises:
    DataError: the name is unknown.
  """
  if normalize_type not in PIXEL_STATISTICS:
    raise DataError(
      f"data.normalize_type: unknown normalization {normalize_type!r}{did_you_mean(normalize_type, PIXEL_STATISTICS)}"
    )
  mean, std = PIXEL_STATISTICS[normalize_type]
  return np.asarray(mean, np.float32), np.asarray(std, np.float32)


def fetched(source: Media, where: Where) -> Media:
  """Fetches a remote image, of which both the size and the pixels will be read; others stay as they are.

  Raises:
    DataError: it cannot be fetched.
  """
  if not isinstance(source, str) or not files.is_remote(source):
    return source
  with _named_errors(source, lambda: source, where):
    return Content(source, files.read_bytes(source))


def open_image(source: Media, where: Where, noted: list[Note] | None = None) -> Picture:
  """The decoded image as RGB, in the orientation in which it is stored.

  Values of more than 8 bits are scaled, see `depth`. Else it is what Pillow makes of it, as in the reference.

  Args:
    source: the image file.
    where: the line that names it, for errors.
    noted: gets what was decided that one should know; None: nobody wants to.

  Raises:
    DataError: the file is missing, empty or damaged, or cannot be fetched.
  """
  with _opened(source, where, header=False) as image:
    whole, scaled = _decoded(image)
    if noted is not None:
      name = name_of(source)
      noted += [note(kind, where, f"image {name} {what}") for kind, what in _remarks(image, scaled)]
    return whole


def _decoded(image: Any) -> tuple[Picture, str]:
  """An opened image as RGB, and what was done to its values."""
  decode = compiled.found(image.width * image.height).decode_jpeg
  # Of four channels, as printers need, Pillow makes RGB in a way of its own.
  if decode is not None and image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
    image.fp.seek(0)
    if (pixels := decode(image.fp.read())) is not None:
      return pixels, ""
  image.load()
  # Converting what is RGB already would copy it.
  return depth.to_rgb(image) if image.mode != "RGB" else (image, "")


def _remarks(image: Image.Image, scaled: str) -> Iterator[tuple[str, str]]:
  """Yields (kind, remark) where an image, which is decoded, is taken otherwise than it is shown."""
  if scaled:
    yield notes.SCALED, f"{scaled} (the reference cuts off above 255)"
  if (turn := _orientation(image)) > 1:
    what = "it is taken as it is stored, as in the reference"
    yield notes.STORED, f"asks to be turned (EXIF orientation {turn}): {what}"
  if _shows_through(image):
    yield notes.HIDDEN, "has transparent pixels: the colors beneath are taken, as in the reference"
  if _has_more_frames(image):
    yield notes.FIRST, "has several frames or pages: the first is taken, as in the reference"


# EXIF's tag for the orientation; 1 is upright.
_ORIENTATION = 0x0112


def _orientation(image: Image.Image) -> int:
  """EXIF's orientation; 0 where none can be read. Pillow turns TIFFs by theirs, and takes it away."""
  if "exif" not in image.info:
    return 0
  try:
    turn = image.getexif().get(_ORIENTATION, 0)
  except Exception:  # Pillow has no list of what damaged EXIF raises; the pixels are whole.
    return 0
  return turn if isinstance(turn, int) and 1 <= turn <= 8 else 0


def _has_more_frames(image: Any) -> bool:
  """Says whether there are frames behind the first. Those that a photograph has beside it (MPO) are not meant."""
  if image.format == "TIFF":
    return bool(image.tag_v2.next)
  if image.format == "GIF":
    try:
      return image.is_animated
    except Exception:  # Pillow has no list of what a damaged second frame raises; the first is whole.
      return False
  return image.format in ("PNG", "WEBP", "AVIF") and bool(getattr(image, "is_animated", False))


def _shows_through(image: Image.Image) -> bool:
  if image.mode in ("RGBA", "LA", "PA"):
    return bool((np.asarray(image.getchannel("A")) < 255).any())
  if image.mode != "P" or (clear := image.info.get("transparency")) is None:
    return False
  used = image.histogram()
  opacity = clear if isinstance(clear, bytes) else bytes(255 * (i != clear) for i in range(256))
  return any(count and alpha < 255 for count, alpha in zip(used, opacity, strict=False))


def image_size(source: Media, where: Where) -> tuple[int, int]:
  """Finds (width, height) from an image's header. Of a remote image no more is fetched, where its format has one.

  Pillow reads all of a WebP or AVIF file before it tells its size.

  Raises:
    DataError: the file is missing, empty or no image, or cannot be fetched.
  """
  with _opened(source, where, header=True) as image:
    return image.size


@contextlib.contextmanager
def _opened(source: Media, where: Where, *, header: bool) -> Iterator[Image.Image]:
  """An image that is open, with what goes wrong in the body named. With `header`, its pixels will not be read."""
  if isinstance(source, str) and not files.is_remote(source):
    _check_file(source, where)
  opened: Any = source
  with _named_errors(source, lambda: opened, where):
    if not isinstance(source, str):
      opened = io.BytesIO(source.content)
    elif files.is_remote(source):
      opened = files.open_file(source) if header else io.BytesIO(files.read_bytes(source))
    with Image.open(opened) as image:
      if image.format == "EPS":
        raise OSError(
          "Pillow would start Ghostscript, which draws what a file's program says, without an end"
        )
      yield image


@contextlib.contextmanager
def _named_errors(source: Media, opened: Callable[[], Any], where: Where) -> Iterator[None]:
  """Names the image that cannot be fetched or decoded; `opened` tells what Pillow was given."""
  path = name_of(source)
  try:
    yield
  except FileNotFoundError as error:
    raise where.error(f"image not found: {path}; check {where.root}") from error
  except files.FetchError as error:
    raise where.error(f"image {path} cannot be fetched: {error}") from error
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise where.error(f"image {path} is too large ({error}); scale it down or delete the line") from error
  except Exception as error:
    # Pillow has no list of what its decoders raise for damaged files: RuntimeError from AVIF, NotImplementedError
    # from DDS, struct.error and others were seen.
    if _is_empty(source):
      raise where.error(f"image {path} is empty (0 bytes); restore it or delete the line") from error
    if kind := _kind_of_file(path, opened()):
      what = f"cannot be decoded: it is {kind}; {content.remedy(kind, image=True)}"
      raise where.error(f"image {path} {what}") from error
    # Pillow names what it was given, which is an object in memory if the image is remote.
    cause = f"{type(error).__name__}: {error}".replace(repr(opened()), repr(path))
    raise where.error(f"image {path} cannot be decoded ({cause}); restore it or delete the line") from error


def _check_file(path: str, where: Where) -> None:
  """Refuses what is no file on a local disk, or has no content."""
  try:
    status = os.stat(path)
  except (FileNotFoundError, NotADirectoryError) as error:
    raise where.error(f"image not found: {path}; check {where.root}") from error
  except (OSError, ValueError) as error:  # ValueError: a zero byte or half a surrogate pair in the path
    cause = getattr(error, "strerror", None) or error
    raise where.error(
      f"image {path} cannot be opened ({cause}); correct its path or delete the line"
    ) from error
  if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
    raise where.error(f"image {path} is not a file; correct its path or delete the line")
  if not status.st_size:
    raise where.error(f"image {path} is empty (0 bytes); restore it or delete the line")


def _kind_of_file(path: str, opened: Any) -> str | None:
  """The kind of a file that is no image; None if that is not known."""
  if isinstance(opened, str):
    return content.kind_of_file(path)
  try:
    opened.seek(0)
    return content.kind_of(opened.read(content.HEAD_BYTES))
  except (OSError, ValueError, files.FetchError):  # What went wrong with the content is the better message.
    return None


def _is_empty(source: Media) -> bool:
  if not isinstance(source, str):
    return not source.content
  try:
    status = files.status_of(source)
  except OSError:  # What went wrong with the content is the better message.
    return False
  return status.is_file and status.size == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cutting:
  """How an image is cut into tiles.

  Attributes:
    tile_size: side of a tile, in pixels.
    min_tiles: fewest tiles of the grid.
    max_tiles: most tiles of the grid.
    use_thumbnail: add the thumbnail.
    dynamic: cut into a grid.
  """

  tile_size: int
  min_tiles: int = 1
  max_tiles: int = 1
  use_thumbnail: bool = False
  dynamic: bool = False


def image_tiles(
  image: Picture,
  cutting: Cutting,
  *,
  pad_color: tuple[int, int, int] | None = None,
  rng: np.random.Generator | None = None,
  pool: TilePool | None = None,
) -> np.ndarray:
  """Cuts an image into tiles.

  With `cutting.dynamic`, the image is resized to the grid nearest to its aspect ratio and cut row by row; a thumbnail
  of the whole comes last when there is more than one tile. Without, the whole image is the one tile.
  Padding and JPEG augmentation work on each tile before it gets its final size, as in the reference.

  Args:
    image: RGB.
    cutting: into which tiles.
    pad_color: pad to a square with this color (0-255) before resizing; None: stretch to a square.
    rng: draws the quality of the JPEG augmentation, tile by tile; None: no augmentation, else no padding.
    pool: the tiles are written to its end; None: to memory of their own.

  Returns:
    uint8 [tiles, tile_size, tile_size, 3].
  """
  pool = pool or TilePool(cutting.tile_size)
  if rng is not None:
    return _augmented(_as_image(image), cutting, rng, pool)
  # The tiles of a grid are squares of their final size: padding would change nothing.
  if pad_color is not None and not cutting.dynamic:
    image = pad_to_square(_as_image(image), pad_color)
  columns, rows = _grid(image, cutting)
  count = columns * rows
  tiles = pool.take(count + _with_thumbnail(cutting, count))
  resize, pixels = _resizer(image, cutting.tile_size, count)
  resize(pixels, columns, tiles[:count])
  if len(tiles) > count:
    resize(pixels, 1, tiles[count:])
  return tiles


def _grid(image: Picture, cutting: Cutting) -> tuple[int, int]:
  """Finds (columns, rows) of an image's tiles, the thumbnail not counted."""
  if not cutting.dynamic:
    return 1, 1
  return tiling.grid(*_size(image), cutting.min_tiles, cutting.max_tiles, cutting.tile_size)


def _with_thumbnail(cutting: Cutting, count: int) -> bool:
  return cutting.dynamic and cutting.use_thumbnail and count > 1


def _resizer(image: Picture, side: int, count: int) -> tuple[Callable[[Any, int, np.ndarray], None], Picture]:
  """Finds what resizes an image to so many tiles of this side, and the image as it takes it."""
  width, height = _size(image)
  compiled_resize = compiled.found(max(width * height, count * side * side)).resize
  if compiled_resize is not None and compiled_resize.suits((width, height), side):
    return compiled_resize, np.require(np.asarray(image), requirements=["C", "W"])
  return _pillow_resize, _as_image(image)


def _pillow_resize(image: Image.Image, columns: int, tiles: np.ndarray) -> None:
  """Resizes an image to a grid of tiles, uint8 [tiles, side, side, 3], the first row's first."""
  count, side = tiles.shape[:2]
  rows = count // columns
  whole = image.resize((columns * side, rows * side), Image.Resampling.BICUBIC)
  # Written to where they stay: other ways, by Pillow's crop or through a contiguous array, copy once more.
  grid = tiles.reshape(rows, columns, side, side, 3)
  grid[:] = np.asarray(whole).reshape(rows, side, columns, side, 3).swapaxes(1, 2)


def _augmented(image: Image.Image, cutting: Cutting, rng: np.random.Generator, pool: TilePool) -> np.ndarray:
  """Computes the tiles, each after a round trip through JPEG, with Pillow alone."""
  side, parts = cutting.tile_size, [image]
  if cutting.dynamic:
    columns, rows = _grid(image, cutting)
    whole = image.resize((columns * side, rows * side), Image.Resampling.BICUBIC)
    parts = [whole.crop(box) for box in _boxes(columns, rows, side)]
    if _with_thumbnail(cutting, len(parts)):
      parts.append(image.resize((side, side), Image.Resampling.BICUBIC))
  parts = [jpeg_reencode(part, int(rng.integers(*JPEG_QUALITY, endpoint=True))) for part in parts]
  tiles = pool.take(len(parts))
  for tile, part in zip(tiles, parts, strict=True):
    _pillow_resize(part, 1, tile[None])
  return tiles


def _size(image: Picture) -> tuple[int, int]:
  """Finds (width, height)."""
  return image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])


def _as_image(image: Picture) -> Image.Image:
  return image if isinstance(image, Image.Image) else Image.fromarray(image)


def _boxes(columns: int, rows: int, side: int) -> list[tuple[int, int, int, int]]:
  """Finds (left, top, right, bottom) of the tiles, the first row's first."""
  corners = [(x * side, y * side) for y in range(rows) for x in range(columns)]
  return [(x, y, x + side, y + side) for x, y in corners]


def pad_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
  """The image centered on a square of its longer side."""
  side = max(image.size)
  square = Image.new("RGB", (side, side), color)
  square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
  return square


def mean_color(normalize_type: str) -> tuple[int, int, int]:
  """The color (0-255) that padding uses: the mean, rounded down."""
  red, green, blue = (int(255 * value) for value in PIXEL_STATISTICS[normalize_type][0])
  return red, green, blue


def jpeg_reencode(image: Image.Image, quality: int) -> Image.Image:
  """The image after a round trip through JPEG."""
  buffer = io.BytesIO()
  image.save(buffer, format="JPEG", quality=quality)
  return Image.open(buffer).convert("RGB")
