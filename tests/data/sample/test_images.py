import io

import numpy as np
import pytest
import skimage.data
from PIL import Image

from internvl_jax.data.sample import images
from internvl_jax.data.where import DataError
from tests.support.data_toys import WHERE

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


def settings(**changes):
  default = {"tile_size": 112, "min_tiles": 1, "max_tiles": 6, "use_thumbnail": True, "dynamic": True}
  return images.Cutting(**default | changes)


def photograph(name):
  return Image.fromarray(getattr(skimage.data, name)())


def to_tensor_and_normalize(parts, size, normalize_type):
  """What torchvision's Resize, ToTensor and Normalize compute, in float64, channels first."""
  mean, std = images.PIXEL_STATISTICS[normalize_type]
  out = []
  for part in parts:
    pixels = (
      np.asarray(part.resize((size, size), Image.Resampling.BICUBIC), np.float64).transpose(2, 0, 1) / 255
    )
    out.append((pixels - np.array(mean)[:, None, None]) / np.array(std)[:, None, None])
  return np.stack(out)


def on_device(tiles, normalize_type):
  """What the step does with the tiles, in float32."""
  mean, std = images.normalization(normalize_type)
  return ((tiles.astype(np.float32) / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("normalize_type", ["imagenet", "clip", "siglip"])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_pixels_of_tiles_and_thumbnail(name, normalize_type):
  image = photograph(name)
  columns, rows = {"astronaut": (2, 2), "chelsea": (3, 2), "coffee": (3, 2), "rocket": (3, 2)}[name]
  whole = image.resize((columns * 112, rows * 112), Image.Resampling.BICUBIC)
  parts = [
    whole.crop((c * 112, r * 112, (c + 1) * 112, (r + 1) * 112)) for r in range(rows) for c in range(columns)
  ]
  parts.append(image.resize((112, 112), Image.Resampling.BICUBIC))
  tiles = images.image_tiles(image, settings())
  assert tiles.dtype == np.uint8 and tiles.shape == (columns * rows + 1, 112, 112, 3)
  expected = to_tensor_and_normalize(parts, 112, normalize_type)
  np.testing.assert_allclose(on_device(tiles, normalize_type), expected, rtol=0, atol=1e-6)


def test_without_thumbnail_and_without_a_grid():
  image = photograph("chelsea")
  with_thumbnail = images.image_tiles(image, settings())
  np.testing.assert_array_equal(images.image_tiles(image, settings(use_thumbnail=False)), with_thumbnail[:-1])
  one = images.image_tiles(image, settings(dynamic=False))
  np.testing.assert_array_equal(one, with_thumbnail[-1:])
  np.testing.assert_array_equal(images.image_tiles(image, settings(max_tiles=1)), one)


def test_padding_to_a_square():
  image = photograph("chelsea")  # 451 x 300
  color = images.mean_color("imagenet")
  assert color == (123, 116, 103)
  padded = images.pad_to_square(image, color)
  assert padded.size == (451, 451)
  pixels = np.asarray(padded)
  assert (pixels[:75] == color).all() and (pixels[375:] == color).all()
  np.testing.assert_array_equal(pixels[75:375], np.asarray(image))
  tile = images.image_tiles(image, settings(dynamic=False), pad_color=color)
  np.testing.assert_array_equal(tile[0], np.asarray(padded.resize((112, 112), Image.Resampling.BICUBIC)))
  # Tiles of a grid are square already.
  np.testing.assert_array_equal(
    images.image_tiles(image, settings(), pad_color=color), images.image_tiles(image, settings())
  )


def test_jpeg_augmentation_encodes_each_tile_at_its_own_quality():
  image = photograph("astronaut")
  plain = images.image_tiles(image, settings())
  tiles = images.image_tiles(image, settings(), rng=np.random.default_rng((1, 2, 3)))
  rng = np.random.default_rng((1, 2, 3))
  qualities = [int(rng.integers(75, 101)) for _ in plain]
  assert len(set(qualities)) > 1
  for tile, before, quality in zip(tiles, plain, qualities, strict=True):
    buffer = io.BytesIO()
    Image.fromarray(before).save(buffer, "JPEG", quality=quality)
    np.testing.assert_array_equal(tile, np.asarray(Image.open(buffer)))
  assert (tiles != plain).any()


def test_grey_and_transparent_images_become_rgb(tmp_path):
  pixels = np.full((8, 8), 90, np.uint8)
  Image.fromarray(pixels).save(tmp_path / "grey.png")
  assert np.asarray(images.open_image(str(tmp_path / "grey.png"), WHERE)).tolist()[0][0] == [90, 90, 90]
  Image.fromarray(pixels).convert("RGBA").save(tmp_path / "rgba.png")
  assert images.open_image(str(tmp_path / "rgba.png"), WHERE).mode == "RGB"


def test_damaged_files_are_named(tmp_path):
  good = tmp_path / "good.png"
  photograph("chelsea").save(good)
  content = good.read_bytes()
  (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
  (tmp_path / "empty.png").write_bytes(b"")
  (tmp_path / "text.png").write_text("not an image")
  flipped = bytearray(content)
  flipped[60:70] = b"0123456789"
  (tmp_path / "flipped.png").write_bytes(flipped)
  causes = {
    "cut.png": "cannot be decoded",
    "empty.png": "is empty (0 bytes)",
    "text.png": "cannot be decoded",
    "flipped.png": "cannot be decoded",
    "gone.png": "image not found",
  }
  for name, cause in causes.items():
    with pytest.raises(DataError) as caught:
      images.open_image(str(tmp_path / name), WHERE)
    message = str(caught.value)
    assert message.startswith("toy.jsonl:3 (dataset 'toy'): ") and name in message and cause in message
    assert "\n" not in message


def test_unknown_normalisation():
  with pytest.raises(DataError, match="unknown normalization 'imagnet'; did you mean 'imagenet'"):
    images.normalization("imagnet")
