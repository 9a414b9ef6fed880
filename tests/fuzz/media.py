"""Images and videos, small ones of many formats, and what disks, networks and editors do to them."""

import io
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from tests.fuzz import odd

FOLDER = "a folder of images"


def _picture(seed: int, width: int = 40, height: int = 24) -> Image.Image:
  x, y = np.meshgrid(np.arange(width), np.arange(height))
  pixels = np.stack([x * 6 + 10 * seed, y * 10, (x * y + seed * 40)], -1) % 256
  return Image.fromarray(pixels.astype(np.uint8))


def _saved(mode: str = "RGB", **options: Any) -> bytes:
  buffer = io.BytesIO()
  _picture(0).convert(mode).save(buffer, **options)
  return buffer.getvalue()


def _moving(**options: Any) -> bytes:
  return _saved(save_all=True, append_images=[_picture(seed) for seed in range(1, 4)], **options)


def _deep(mode: str, dtype: type, **options: Any) -> bytes:
  buffer = io.BytesIO()
  pixels = (np.arange(960).reshape(24, 40) * 60).astype(dtype)
  Image.fromarray(pixels, mode).save(buffer, **options) if mode else Image.fromarray(pixels).save(
    buffer, **options
  )
  return buffer.getvalue()


def images() -> dict[str, bytes]:
  """Returns small images by the suffix that they have."""
  return {
    "rgb.png": _saved(format="PNG"),
    "rgba.png": _saved("RGBA", format="PNG"),
    "palette.png": _saved("P", format="PNG"),
    "deep.png": _deep("", np.uint16, format="PNG"),
    "moving.png": _moving(format="PNG"),
    "plain.jpg": _saved(format="JPEG"),
    "progressive.jpg": _saved(format="JPEG", progressive=True),
    "cmyk.jpg": _saved("CMYK", format="JPEG"),
    "grey.jpg": _saved("L", format="JPEG"),
    "still.gif": _saved("P", format="GIF"),
    "moving.gif": _moving(format="GIF"),
    "lossy.webp": _saved(format="WEBP"),
    "lossless.webp": _saved(format="WEBP", lossless=True),
    "moving.webp": _moving(format="WEBP"),
    "rgb.bmp": _saved(format="BMP"),
    "rgb.tif": _saved(format="TIFF"),
    "packed.tif": _saved(format="TIFF", compression="tiff_lzw"),
    "jpeg.tif": _saved(format="TIFF", compression="jpeg"),
    "deep.tif": _deep("", np.uint16, format="TIFF"),
    "float.tif": _deep("", np.float32, format="TIFF"),
    "rgb.ppm": _saved(format="PPM"),
    "rgb.ico": _saved(format="ICO"),
    "rgb.tga": _saved(format="TGA"),
    "rgb.jp2": _saved(format="JPEG2000"),
    "rgb.avif": _saved(format="AVIF"),
    "rgb.dds": _saved(format="DDS"),
  }


def _film(name: str, codec: str, pixels: str = "yuv420p", **options: str) -> bytes:
  # A file on disk: an index that is moved to the front is written by reading it again.
  with tempfile.NamedTemporaryFile() as file:
    with av.open(file.name, "w", format=name, options=options) as container:
      out = container.add_stream(codec, rate=25)
      out.width, out.height, out.pix_fmt = 32, 24, pixels
      for seed in range(8):
        container.mux(out.encode(av.VideoFrame.from_image(_picture(seed, 32, 24))))
      container.mux(out.encode(None))
    return Path(file.name).read_bytes()


def videos() -> dict[str, bytes]:
  """Returns small videos by the suffix that they have."""
  return {
    "plain.mp4": _film("mp4", "mpeg4"),
    "h264.mp4": _film("mp4", "libx264"),
    "h264_first.mp4": _film("mp4", "libx264", movflags="faststart"),
    "fragments.mp4": _film("mp4", "mpeg4", movflags="frag_keyframe+empty_moov"),
    "h264.mov": _film("mov", "libx264"),
    "mjpeg.avi": _film("avi", "mjpeg", "yuvj420p"),
    "vp8.webm": _film("webm", "libvpx"),
    "vp9.webm": _film("webm", "libvpx-vp9"),
    "h264.mkv": _film("matroska", "libx264"),
    "mpeg2.ts": _film("mpegts", "mpeg2video"),
    "flv1.flv": _film("flv", "flv"),
    "moving.gif": _moving(format="GIF"),
    FOLDER: b"",
  }


# --- Headers that lie ------------------------------------------------------------------------------------------

_SIDES = (0, 1, 3, 1000, 16_000, 65_535, 2**31 - 1, 2**32 - 1)


def png_sides(rng: np.random.Generator, content: bytes) -> bytes:
  """States other sides in a PNG's header, whose checksum is right."""
  if content[12:16] != b"IHDR":
    return content
  header = struct.pack(">II", odd.pick(rng, _SIDES), odd.pick(rng, _SIDES)) + content[24:29]
  if rng.random() < 0.3:  # depth, colour type, compression, filter, interlacing
    header = header[:8] + bytes(int(odd.pick(rng, (0, 1, 2, 3, 4, 6, 8, 16, 255))) for _ in range(5))
  return content[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + content[33:]


def jpeg_sides(rng: np.random.Generator, content: bytes) -> bytes:
  """States other sides in a JPEG's frame."""
  for marker in (b"\xff\xc0", b"\xff\xc2"):
    at = content.find(marker)
    if at > 0:
      sides = struct.pack(">HH", odd.pick(rng, _SIDES) % 65536, odd.pick(rng, _SIDES) % 65536)
      return content[: at + 5] + sides + content[at + 9 :]
  return content


def box_size(rng: np.random.Generator, content: bytes) -> bytes:
  """States another length of a box of an MP4, MOV or AVIF."""
  names = (
    b"moov",
    b"mdat",
    b"stsz",
    b"stts",
    b"stco",
    b"stsc",
    b"trak",
    b"mdhd",
    b"tkhd",
    b"ftyp",
    b"elst",
    b"ispe",
    b"iloc",
  )
  found = [at for at in map(content.find, names) if at >= 4]
  if not found:
    return content
  at = int(odd.pick(rng, found)) + int(odd.pick(rng, (-4, 4, 8, 12, 16, 20)))
  return content[:at] + struct.pack(">I", odd.pick(rng, _SIDES)) + content[at + 4 :]


BYTES: tuple[Callable[[np.random.Generator, bytes], bytes], ...] = (
  *odd.BYTES[:-1] * 2,
  odd.replace,
  png_sides,
  jpeg_sides,
  box_size,
  box_size,
)


def write(
  folder: Path, stem: str, rng: np.random.Generator, originals: dict[str, bytes]
) -> tuple[str, list[str]]:
  """Writes a damaged file, or a folder of such images for a video; returns its name, and what was done."""
  name = odd.pick(rng, originals)
  if name == FOLDER:
    stills, done = images(), []
    (folder / stem).mkdir()
    for number in range(4):
      still, done_to_it = write(folder / stem, f"frame{number}", rng, stills)
      done += [f"{still}: {' '.join(done_to_it)}"]
    return stem, done
  content, done = odd.changed(rng, originals[name], BYTES, most=2)
  suffix = Path(name if rng.random() < 0.9 else odd.pick(rng, originals)).suffix
  (folder / f"{stem}{suffix}").write_bytes(content)
  return f"{stem}{suffix}", [name, *done]
