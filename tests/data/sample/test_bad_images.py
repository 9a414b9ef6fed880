"""Images as the world has them: read as Pillow and the reference read them, or named in one line and counted."""

import os
import pathlib
import warnings

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from internvl_jax.data.sample import images
from tests.support.bad_lines import (
  GOOD,
  NOTHING_LOST,
  TOKENS_PER_TILE,
  animation,
  assert_named,
  assert_read_as,
  batches_of,
  cut,
  frames,
  hard_time_limit,  # noqa: F401 - a fixture
  loading,
  loop,
  lost_by_doctor,
  noise,
  smooth,
  tiles_by_pillow,
  with_image,
  write_data,
  write_png,
  write_video,
)
from tests.support.data_toys import WHERE


def rows16(width):
  rng = np.random.default_rng(0)
  return [rng.bytes(width) for _ in range(24)]


def rotated(path):
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = 6
  smooth().save(path, exif=exif)


def transparent_palette(path):
  noise(mode="P").save(path, transparency=3)


def long_text(path):
  info = PngImagePlugin.PngInfo()
  info.add_text("history", "x" * 3_000_000, zip=True)
  noise().save(path, pnginfo=info)


READ = {
  "one_pixel.png": lambda path: noise(1, 1).save(path),
  "wide.png": lambda path: noise(20_000, 10).save(path),
  "tall.jpg": lambda path: noise(10, 20_000).save(path),
  "cmyk.jpg": lambda path: smooth().convert("CMYK").save(path),
  "progressive.jpg": lambda path: smooth().save(path, progressive=True),
  "grey16.png": lambda path: write_png(path, 40, 24, 16, 0, rows16(40 * 2)),
  "rgb16.png": lambda path: write_png(path, 40, 24, 16, 2, rows16(40 * 6)),
  "grey16.tif": lambda path: Image.fromarray(np.arange(960, dtype=np.uint16).reshape(24, 40) * 60).save(path),
  "palette.png": lambda path: noise(mode="P").save(path),
  "palette_transparent.png": transparent_palette,
  "la.png": lambda path: noise(mode="LA").save(path),
  "rgba.png": lambda path: noise(mode="RGBA").save(path),
  "one_bit.png": lambda path: noise(mode="1").save(path),
  "animated.gif": animation,
  "animated.webp": animation,
  "animated.png": animation,
  "rotated.jpg": rotated,
  "rotated.png": rotated,
  "rotated.tif": rotated,
  "long_text.png": long_text,
}


@pytest.mark.parametrize("name", READ)
def test_images_are_read_as_pillow_reads_them(tmp_path, tokenizer, name):
  path = tmp_path / name
  READ[name](path)
  expected = tiles_by_pillow(path)
  for batch in batches_of(tmp_path, tokenizer, with_image(name)):
    found = batch.tiles[0, 0]
    np.testing.assert_array_equal(found[: len(expected)], expected)
    assert not found[len(expected) :].any()
    assert (batch.image_index >= 0).sum() == len(expected) * TOKENS_PER_TILE
  # What packing plans with, the header, is what decoding gives.
  assert images.image_size(str(path), WHERE) == np.asarray(images.open_image(str(path), WHERE)).shape[1::-1]


def test_images_are_not_turned_by_their_exif(tmp_path):
  rotated(tmp_path / "a.jpg")
  image = images.open_image(str(tmp_path / "a.jpg"), WHERE)
  assert image.size == (40, 24) and image.getpixel((39, 0))[0] > 200 > 50 > image.getpixel((0, 0))[0]


def test_animations_give_their_first_frame(tmp_path):
  for suffix in ("gif", "webp", "png"):
    animation(tmp_path / f"a.{suffix}")
    found = np.asarray(images.open_image(str(tmp_path / f"a.{suffix}"), WHERE), np.int64)
    distances = [np.abs(found - np.asarray(frame, np.int64)).mean() for frame in frames()]
    assert distances[0] < 10 < 50 < min(distances[1:])


def test_large_images_are_read_in_silence_and_immense_ones_refused(tmp_path, tokenizer):
  """13,000 x 13,000 is read, where Pillow by itself warns; 100,000 x 100,000 is not even decoded."""
  path = tmp_path / "map.png"
  write_png(path, 13_000, 13_000, 1, 0, [bytes(1625)] * 13_000)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert images.image_size(str(path), WHERE) == (13_000, 13_000)
    write_png(path, 9_500, 9_500, 1, 0, [b"\xf0" + bytes(1187)] * 9_500)
    image = images.open_image(str(path), WHERE)
  assert image.size == (9_500, 9_500) and image.getpixel((3, 9_000)) == (255,) * 3
  write_png(tmp_path / "bomb.png", 100_000, 100_000, 8, 2, [bytes(10)])
  assert_named(tmp_path, tokenizer, with_image("bomb.png"), "is too large (Image size (10000000000 pixels)")


def cut_jpeg(share):
  def make(path):
    noise(200, 120).save(path)
    cut(path, share)

  return make


def unknown_pixels(path):
  noise().save(path)
  content = bytearray(path.read_bytes())
  content[80:84] = bytes(4)  # the flags of the pixel format
  path.write_bytes(content)


TRUNCATED = "image {} cannot be decoded (OSError: image file is truncated"


def video_as_image(path):
  write_video(path.with_suffix(".mp4"))
  path.with_suffix(".mp4").rename(path)


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"


PROGRAM = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"


NAMED = {
  "cut10.jpg": (cut_jpeg(0.1), TRUNCATED),
  "cut50.jpg": (cut_jpeg(0.5), TRUNCATED),
  "cut99.jpg": (cut_jpeg(0.99), TRUNCATED),
  "header.jpg": (cut_jpeg(0.001), "image {} cannot be decoded ("),
  # Pillow raises an error for it that is neither of the system nor of a value.
  "flags.dds": (unknown_pixels, "image {} cannot be decoded (NotImplementedError"),
  "empty.jpg": (lambda path: path.write_bytes(b""), "image {} is empty (0 bytes); restore it or delete"),
  "text.jpg": (
    lambda path: path.write_text("<html>not found</html>"),
    "image {} cannot be decoded: it is an HTML page",
  ),
  "photo.jpg": (
    lambda path: path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(99)),
    "decoded: it is HEIC; convert it",
  ),
  "pointer.png": (lambda path: path.write_text(POINTER), "it is a pointer of Git LFS, not the file"),
  "program.jpg": (lambda path: path.write_text(PROGRAM), "decoded: it is PostScript; convert it"),
  "clip.jpg": (
    video_as_image,
    "it is a video (MP4 or MOV); put it under 'video'",
  ),
  "folder.jpg": (pathlib.Path.mkdir, "image {} is not a file; correct its path or delete the line"),
  "pipe.jpg": (os.mkfifo, "image {} is not a file; correct its path or delete the line"),
  "loop.jpg": (loop, "image {} cannot be opened (Too many levels of symbolic links); correct its path"),
  "gone.jpg": (lambda path: None, "image not found: {}; check the dataset's root"),
  "gone.jpg/a.jpg": (lambda path: path.parent.touch(), "image not found: {}; check the dataset's root"),
}


@pytest.mark.parametrize("name", NAMED)
def test_images_that_cannot_be_read_are_named(tmp_path, tokenizer, name):
  make, cause = NAMED[name]
  path = tmp_path / name
  make(path)
  try:
    assert_named(tmp_path, tokenizer, with_image(name), cause.format(path))
  finally:
    if path.is_fifo():  # threads that wait for it after all would keep the process from ending
      os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))


@pytest.mark.parametrize(
  ("path", "cause"),
  [
    (7, "'image' must be a path or a list of paths, got '7'"),
    (0, "'image' must be a path or a list of paths, got '0'"),
    (False, "'image' must be a path or a list of paths, got 'False'"),
    ({}, "'image' must be a path or a list of paths, got '{}'"),
    ({"name": "a.png"}, "'image' must be a path or a list of paths, got"),
    ([["a.png"]], "'image' must be a path or a list of paths, got"),
    ([None], "'image' must be a path or a list of paths, got '[None]'"),
    ([""], "'image' must be a path or a list of paths, got"),
    ("a\0.png", r"a\x00.png cannot be opened (embedded null byte); correct its path"),
    ("a\udcff\ud800.png", r"a\udcff\ud800.png cannot be opened ('utf-8' codec can't encode"),
    ("a" * 5000 + ".png", "aaa.png cannot be opened (File name too long); correct its path"),
    ("a/" * 2500 + ".png", "a/.png cannot be opened (File name too long); correct its path"),
    (["a.png", "gone.png"], "1 <image> in the human turns but 2 images; make the numbers equal"),
    ("", "1 <image> in the human turns but 0 images; make the numbers equal"),
    (None, "1 <image> in the human turns but 0 images; make the numbers equal"),
    ([], "1 <image> in the human turns but 0 images; make the numbers equal"),
  ],
)
def test_paths_that_are_none(tmp_path, tokenizer, path, cause):
  for name in ("a.png", "gone.png"):
    noise().save(tmp_path / name)
  assert_named(tmp_path, tokenizer, with_image(path), cause)


@pytest.mark.parametrize("image", ["", None, []])
def test_no_path_is_text_only(tmp_path, tokenizer, image):
  assert_read_as(tmp_path, tokenizer, GOOD | {"image": image, "video": image}, GOOD)


@pytest.mark.parametrize(
  ("stated", "right"),
  [
    ({"width": 64, "height": 16}, False),
    ({"width": 1 << 31, "height": 1}, False),
    ({"width_list": [64], "height_list": [16]}, False),
    ({"width": 40, "height": 24}, True),
    ({"width": 0, "height": 24}, True),
    ({"width": -40, "height": 24}, True),
    ({"width": "24", "height": "40"}, True),
    ({"width": 24.0, "height": 40.0}, True),
    ({"width": True, "height": True}, True),
    ({"width": float("nan"), "height": 40}, True),
    ({"width": 10**400, "height": 1}, True),
    ({"width": 24}, True),
    ({"width_list": [24, 24], "height_list": [40]}, True),
    ({"width_list": ["x"], "height_list": [None]}, True),
  ],
)
def test_sizes_that_lines_state(tmp_path, tokenizer, stated, right):
  """What is no size is not believed; what is a wrong one is harmless, unless rows are planned by it."""
  noise(40, 24).save(tmp_path / "a.png")
  line = with_image("a.png", **stated)
  if right:
    assert_read_as(tmp_path, tokenizer, line, with_image("a.png"))
    return
  assert_named(tmp_path, tokenizer, line, "were planned: the image's size is not what the line says", [True])
  with loading(write_data(tmp_path, GOOD, line, GOOD), tokenizer) as loader:
    (batch,) = loader
    expected = tiles_by_pillow(tmp_path / "a.png")
    np.testing.assert_array_equal(batch.tiles[0, 0, : len(expected)], expected)
    assert loader.counters()["toy"] == NOTHING_LOST
  assert not lost_by_doctor(tmp_path / "meta.json", tokenizer, packed=False)
