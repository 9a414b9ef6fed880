import json
import time

import pytest

from internvl_jax.arguments import MOST_TILES
from internvl_jax.data.sample import tiling
from tests.support.data_toys import ASSETS

GEOMETRY = json.loads((ASSETS / "geometry.json").read_text())


def test_grid_equals_the_400_recorded_decisions():
  assert len(GEOMETRY) == 400
  wrong = [row for row in GEOMETRY if tiling.grid(*row[:5]) != tuple(row[5:])]
  assert wrong == []


@pytest.mark.parametrize(
  ("size", "limits", "thumbnail", "expected"),
  [
    ((448, 448), (1, 12), True, 1),  # one tile needs no thumbnail
    ((896, 448), (1, 12), True, 3),
    ((896, 448), (1, 12), False, 2),
    ((448, 1344), (1, 12), True, 4),
    ((896, 448), (1, 1), True, 1),
  ],
)
def test_num_tiles(size, limits, thumbnail, expected):
  assert tiling.num_tiles(*size, *limits, 448, thumbnail) == expected


def test_a_square_image_takes_the_grid_that_its_pixels_fill_by_half():
  # 1x1, 2x2 and 3x3 tie for a square: each larger one wins from half of its own pixels on.
  assert tiling.grid(600, 600, 1, 12, 448) == (1, 1)
  assert tiling.grid(640, 640, 1, 12, 448) == (2, 2)
  assert tiling.grid(960, 960, 1, 12, 448) == (3, 3)


def grids_of_the_reference(fewest, most):
  """In the order of a set that is filled area by area, in time cubic in the most."""
  shapes = {
    (i, j)
    for n in range(fewest, most + 1)
    for i in range(1, n + 1)
    for j in range(1, n + 1)
    if fewest <= i * j <= most
  }
  return tuple(sorted(shapes, key=lambda shape: shape[0] * shape[1]))


def test_grids_are_those_of_the_reference_in_its_order():
  limits = [(fewest, most) for most in range(1, 25) for fewest in range(1, most + 2)]
  for fewest, most in [*limits, (1, 48), (7, 40), (12, 64), (1, 100)]:
    assert tiling._grids(fewest, most) == grids_of_the_reference(fewest, most), (fewest, most)


def test_many_tiles_take_no_time():
  start = time.process_time()
  assert tiling.grid(5000, 3000, 1, 1200, 16) == (40, 24)
  assert tiling.num_tiles(100, 100, 1, MOST_TILES, 1, False) == 64 * 64
  assert time.process_time() - start < 2


def test_no_grid_between_the_limits():
  with pytest.raises(ValueError, match="fewest, 5, exceeds the most, 4"):
    tiling.grid(100, 100, 5, 4, 448)
