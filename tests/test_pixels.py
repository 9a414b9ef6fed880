"""The numbers by which pixels are normalized, digit by digit, and what the step makes of them."""

import numpy as np
import pytest

from internvl_jax.batch import PIXEL_STATISTICS
from internvl_jax.models.internvl import normalize_tiles

# InternVL's internvl/train/constants.py.
REFERENCE = {
  "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.2757711)),
  "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def test_statistics_are_the_references():
  assert PIXEL_STATISTICS == REFERENCE


@pytest.mark.parametrize("kind", REFERENCE)
def test_normalized_pixels(kind):
  """Each channel by its own mean and deviation."""
  tiles = np.array([[0, 128, 255], [255, 0, 1]], np.uint8).reshape(1, 2, 1, 3)
  mean, std = (np.array(values, np.float64) for values in REFERENCE[kind])
  np.testing.assert_allclose(normalize_tiles(tiles, kind), (tiles / 255 - mean) / std, rtol=0, atol=1e-6)
