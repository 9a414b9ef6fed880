"""Faster ways than Pillow's to the same pixels, where the extra `decode` is installed: JPEGs by simplejpeg, resizing by Numba.

Both are compared with Pillow on small images when a process first decodes, and Pillow does what either cannot do, or does
otherwise. So pixels never depend on what is installed.
"""

import contextlib
import functools
import importlib.metadata
import io
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from PIL import Image

from internvl_jax.data.sample.resizing import Resizer, find

EXTRA = "decode"
WORTH = 1 << 16
"""Pixels, before or after resizing, from which on an image is not Pillow's. It takes Pillow about a millisecond."""

_PACKAGES = ("simplejpeg", "numba")


class Compiled(NamedTuple):
  """The compiled functions that this process has.

  Attributes:
    resize: resizes to a grid of tiles; None: Pillow does.
    decode_jpeg: uint8 [height, width, 3] of a JPEG file's bytes, None of one that it cannot do; None: Pillow does all.
  """

  resize: Resizer | None = None
  decode_jpeg: Callable[[bytes], np.ndarray | None] | None = None


def note() -> str:
  """One line on what decodes images here, from the packages that are installed; loads none of them."""
  versions = dict[str, str]()
  for package in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[package] = importlib.metadata.version(package)
  if len(versions) == len(_PACKAGES):
    return "images: {} {} decodes JPEGs, {} {} resizes; the pixels are Pillow's".format(
      *(part for item in versions.items() for part in item)
    )
  missing = " and ".join(package for package in _PACKAGES if package not in versions)
  return (
    f"images: Pillow decodes and resizes them; {missing} would make the same pixels faster: "
    f"pip install 'internvl_jax[{EXTRA}]'"
  )


def found(pixels: int) -> Compiled:
  """The compiled functions for an image of so many pixels: none for small ones, which are not worth the time to load them."""
  return load() if pixels >= WORTH else Compiled()


@functools.lru_cache(maxsize=1)
def load() -> Compiled:
  """Loads and checks what is installed: seconds for the first process on a machine, half a second afterwards."""
  resize: Resizer | None = None
  decode: Callable[[bytes], np.ndarray | None] | None = None
  with _pillow_instead("resizes", "Numba"):
    resize = find()
    # Within, since its arrays would have to become Pillow's images for Pillow to resize them.
    with _pillow_instead("decodes JPEGs", "simplejpeg"):
      decode = _jpeg_decoder()
  return Compiled(resize, decode)


@contextlib.contextmanager
def _pillow_instead(does: str, name: str) -> Iterator[None]:
  """Warns where a package that is installed cannot be used."""
  try:
    yield
  except Exception as error:
    # Numba has no list of what it raises where it does not fit numpy, Python or the system.
    if not isinstance(error, ModuleNotFoundError) or error.name not in _PACKAGES:
      logging.warning("images: Pillow %s, since %s cannot be used here: %s", does, name, error)


def _jpeg_decoder() -> Callable[[bytes], np.ndarray | None]:
  """The decoder of simplejpeg.

  Raises:
    ModuleNotFoundError: it is not installed.
    ValueError: it does not give Pillow's pixels.
  """
  import simplejpeg

  decode: Callable[..., np.ndarray] = simplejpeg.decode_jpeg

  def decoded(file: bytes) -> np.ndarray | None:
    try:
      # With the slower, accurate transform and chroma interpolation, as Pillow; and no pixels where libjpeg warns.
      return decode(file, "RGB", fastdct=False, fastupsample=False, strict=True)
    except ValueError:
      return None

  for file in _probes():
    with Image.open(io.BytesIO(file)) as image:
      found = decoded(file)
      if found is None or not np.array_equal(found, np.asarray(image.convert("RGB"))):
        raise ValueError("it gives other pixels than Pillow")
  return decoded


def _probes() -> Iterator[bytes]:
  """Small JPEGs of each kind of chroma subsampling, progressive and gray."""
  noise = np.random.default_rng(0).integers(0, 256, (37, 61, 3), np.uint8)
  image = Image.fromarray(noise)
  kinds: list[dict[str, Any]] = [{"subsampling": kind} for kind in ("4:4:4", "4:2:2", "4:2:0", "4:1:1")]
  for options in (*kinds, {"progressive": True}):
    yield _jpeg(image, **options)
  yield _jpeg(image.convert("L"))


def _jpeg(image: Image.Image, **options: Any) -> bytes:
  file = io.BytesIO()
  image.save(file, "JPEG", quality=80, **options)
  return file.getvalue()
