"""The compiled ways give Pillow's pixels, to the bit, or leave the image to Pillow."""

import io
import sys
import threading

import numpy as np
import pytest
import simplejpeg
import skimage.data
from PIL import Image

from internvl_jax.data.sample import compiled, images, notes, resizing
from tests.support.data_toys import WHERE

BICUBIC = Image.Resampling.BICUBIC
PHOTOGRAPH = Image.fromarray(skimage.data.chelsea())


@pytest.fixture
def by_pillow(monkeypatch):
  """A function of no arguments after which Pillow does all."""
  return lambda: monkeypatch.setattr(compiled, "load", compiled.Compiled)


def noise(width, height, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


# --- Resizing -----------------------------------------------------------------------------------------------


def grid_by_pillow(pixels, columns, rows, side):
  whole = Image.fromarray(pixels).resize((columns * side, rows * side), BICUBIC)
  boxes = [(x * side, y * side, (x + 1) * side, (y + 1) * side) for y in range(rows) for x in range(columns)]
  return np.stack([np.asarray(whole.crop(box)) for box in boxes])


# Larger, smaller, and one of each; sides of a pixel; sides that stay; a height that shrinks by twice what the width does,
# a pixel less and a pixel more, where Pillow 13 changes the order of its passes.
SIZES = [
  *((200, 150), (640, 480), (97, 500), (500, 97), (130, 90), (90, 130)),
  *((1, 1), (1, 300), (300, 1), (2, 3), (3, 2), (5, 700)),
  *((96, 64), (96, 200), (200, 64), (64, 96), (32, 32)),
  *((106, 83), (106, 84), (106, 85), (97, 65), (95, 65), (95, 63)),
]


@pytest.mark.parametrize("grid", [(3, 2), (1, 1), (2, 5)])
def test_grids_are_pillows_to_the_bit(grid):
  resize = compiled.load().resize
  columns, rows = grid
  for width, height in SIZES:
    for pixels in (noise(width, height), noise(width, height) // 128 * 255):
      found = np.full((rows * columns, 32, 32, 3), 7, np.uint8)
      resize(pixels, columns, found)
      np.testing.assert_array_equal(found, grid_by_pillow(pixels, columns, rows, 32), f"{width} x {height}")


def test_photographs_are_cut_as_without(by_pillow):
  cutting = images.Cutting(tile_size=224, max_tiles=12, use_thumbnail=True, dynamic=True)
  whole = images.Cutting(tile_size=336)
  found = [images.image_tiles(PHOTOGRAPH, cutting), images.image_tiles(np.array(PHOTOGRAPH), whole)]
  padded = images.image_tiles(np.array(PHOTOGRAPH), whole, pad_color=(9, 8, 7))
  augmented = images.image_tiles(np.array(PHOTOGRAPH), cutting, rng=np.random.default_rng(0))
  by_pillow()
  np.testing.assert_array_equal(found[0], images.image_tiles(PHOTOGRAPH, cutting))
  np.testing.assert_array_equal(found[1], images.image_tiles(PHOTOGRAPH, whole))
  np.testing.assert_array_equal(padded, images.image_tiles(PHOTOGRAPH, whole, pad_color=(9, 8, 7)))
  expected = images.image_tiles(PHOTOGRAPH, cutting, rng=np.random.default_rng(0))
  np.testing.assert_array_equal(augmented, expected)


def test_weights_are_whole_and_ascend():
  for size, new_size in ((100, 448), (448, 448), (1000, 448), (1, 448), (4000, 448), (449, 448)):
    first, weights = resizing.weights(size, new_size)
    assert (np.diff(first) >= 0).all() and weights.shape[1] % 4 == 0
    # Each rounded to an integer, they add up to one but for a few units.
    assert np.abs(weights.sum(1, dtype=np.int64) - (1 << 22)).max() <= weights.shape[1] // 2


def test_an_image_of_many_times_a_tile_is_pillows():
  resize = compiled.load().resize
  assert resize.suits((32 * 448, 10), 448) and not resize.suits((10, 32 * 448 + 1), 448)
  strip = noise(70_000, 3)
  tiles = images.image_tiles(strip, images.Cutting(tile_size=32))
  np.testing.assert_array_equal(tiles, grid_by_pillow(strip, 1, 1, 32))


def test_threads_do_not_share_scratch():
  resize = compiled.load().resize
  pictures = [noise(300 + 7 * i, 200, i) for i in range(4)]
  found = np.zeros((4, 20, 4, 96, 96, 3), np.uint8)

  def work(i):
    for tiles in found[i]:
      resize(pictures[i], 2, tiles)

  threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for made, picture in zip(found, pictures, strict=True):
    np.testing.assert_array_equal(made, np.broadcast_to(grid_by_pillow(picture, 2, 2, 96), made.shape))


# --- JPEGs --------------------------------------------------------------------------------------------------


def jpeg(image=PHOTOGRAPH, **options):
  file = io.BytesIO()
  image.save(file, "JPEG", **options)
  return file.getvalue()


def pillows(file):
  with Image.open(io.BytesIO(file)) as image:
    return np.asarray(image.convert("RGB"))


KINDS = {
  "4:4:4": {"subsampling": "4:4:4"},
  "4:2:2": {"subsampling": "4:2:2"},
  "4:2:0": {"subsampling": "4:2:0", "quality": 95},
  "4:1:1": {"subsampling": "4:1:1", "quality": 30},
  "progressive": {"progressive": True},
  "restarts": {"restart_marker_blocks": 3},
  "progressive with restarts": {"progressive": True, "restart_marker_rows": 1, "subsampling": "4:2:2"},
  "RGB": {"keep_rgb": True, "subsampling": "4:4:4"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_jpegs_are_pillows_to_the_bit(kind):
  decode = compiled.load().decode_jpeg
  for size in ((451, 300), (33, 17), (16, 16), (8, 1), (1, 9), (1, 1)):
    file = jpeg(PHOTOGRAPH.resize(size), **KINDS[kind])
    np.testing.assert_array_equal(decode(file), pillows(file), str(size))
  file = jpeg(PHOTOGRAPH.convert("L"))
  np.testing.assert_array_equal(decode(file), pillows(file))
  tall = simplejpeg.encode_jpeg(np.array(PHOTOGRAPH), 85, "RGB", "440")
  np.testing.assert_array_equal(decode(tall), pillows(tall))


def opened(tmp_path, file, noted=None):
  path = tmp_path / "a.jpg"
  path.write_bytes(file)
  return images.open_image(str(path), WHERE, noted)


def test_an_opened_jpeg_is_an_array_of_pillows_pixels(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6
  file, noted = jpeg(exif=exif), []
  found = opened(tmp_path, file, noted)
  assert isinstance(found, np.ndarray) and [note.kind for note in noted] == [notes.STORED]
  np.testing.assert_array_equal(found, pillows(file))
  pair = io.BytesIO()
  PHOTOGRAPH.save(pair, "MPO", save_all=True, append_images=[PHOTOGRAPH.rotate(180)])
  found = opened(tmp_path, pair.getvalue())
  assert isinstance(found, np.ndarray)
  np.testing.assert_array_equal(found, pillows(pair.getvalue()))


def test_four_channels_are_pillows(tmp_path):
  file = jpeg(PHOTOGRAPH.convert("CMYK"))
  found = opened(tmp_path, file)
  assert isinstance(found, Image.Image)
  np.testing.assert_array_equal(np.asarray(found), pillows(file))


def damaged(rng, file):
  """A file cut, changed, shortened or lengthened somewhere, or cut and ended."""
  place, kind = int(rng.integers(2, len(file))), rng.integers(5)
  if kind == 0:
    return file[:place]
  if kind == 1:
    return file[:place] + rng.bytes(1) + file[place + 1 :]
  if kind == 2:
    return file[:place] + file[place + int(rng.integers(1, 20)) :]
  if kind == 3:
    return file[:place] + rng.bytes(int(rng.integers(1, 20))) + file[place:]
  return file[:place] + b"\xff\xd9"


def test_damaged_jpegs_are_pillows():
  """Those that decode all the same have Pillow's pixels; Pillow decides about the others."""
  decode, rng = compiled.load().decode_jpeg, np.random.default_rng(0)
  small = PHOTOGRAPH.resize((61, 47))
  files = [jpeg(small, **options) for options in KINDS.values()]
  decoded = 0
  for i in range(400):
    file = damaged(rng, files[i % len(files)])
    try:
      image = Image.open(io.BytesIO(file))
    except OSError:
      continue  # Pillow refuses it before anything is decoded.
    if image.mode == "RGB" and (found := decode(file)) is not None:
      decoded += 1
      np.testing.assert_array_equal(found, pillows(file))
  assert decoded > 40
  assert decode(files[0][: len(files[0]) // 2]) is None


# --- Where they are not used --------------------------------------------------------------------------------


def test_small_images_do_not_load_them(monkeypatch):
  monkeypatch.setattr(compiled, "load", lambda: pytest.fail("loaded"))
  assert compiled.found(compiled.WORTH - 1) == compiled.Compiled()
  assert images.image_tiles(noise(200, 200), images.Cutting(tile_size=56)).shape == (1, 56, 56, 3)


def test_without_the_packages_pillow_does_all(monkeypatch, caplog, tmp_path):
  monkeypatch.setitem(sys.modules, "numba", None)
  monkeypatch.delitem(sys.modules, "internvl_jax.data.sample.resize_loops", raising=False)
  # As if nothing had been loaded, also as an attribute of its package.
  monkeypatch.delattr("internvl_jax.data.sample.resize_loops", raising=False)
  without = compiled.load.__wrapped__()
  assert without == compiled.Compiled() and not caplog.records
  monkeypatch.setattr(compiled, "load", lambda: without)
  assert isinstance(opened(tmp_path, jpeg()), Image.Image)


def test_what_gives_other_bits_is_not_used(monkeypatch, caplog):
  monkeypatch.setattr(resizing, "ORDERS", resizing.ORDERS[:0])
  monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda file, *args, **options: pillows(file) ^ 1)
  with pytest.raises(ValueError, match="gives other bits"):
    resizing.find()
  with pytest.raises(ValueError, match="other pixels than Pillow"):
    compiled._jpeg_decoder()
  assert compiled.load.__wrapped__() == compiled.Compiled()
  assert "Pillow resizes, since Numba cannot be used here" in caplog.text


def test_a_line_says_what_decodes(monkeypatch):
  assert "resizes; the pixels are Pillow's" in compiled.note()
  monkeypatch.setattr(compiled, "_PACKAGES", ("simplejpeg", "not-there"))
  assert "not-there would make the same pixels faster: pip install 'internvl_jax[decode]'" in compiled.note()
