"""Which grid of square tiles an image is cut into: pure integers in, pure integers out."""

import functools
import itertools
from collections.abc import Iterable
from fractions import Fraction


def grid(width: int, height: int, min_tiles: int, max_tiles: int, tile_size: int) -> tuple[int, int]:
  """Finds (columns, rows) of the grid whose aspect ratio is nearest to the image's.

  On a tie the later, larger grid wins if the image has more than half of the pixels of that grid.

  Args:
    width: of the image, in pixels.
    height: of the image, in pixels.
    min_tiles: fewest tiles of a grid.
    max_tiles: most tiles of a grid, a thumbnail not counted.
    tile_size: side of a tile, in pixels.

  Raises:
    ValueError: no grid has between min_tiles and max_tiles tiles.
  """
  candidates = _grids(min_tiles, max_tiles)
  if not candidates:
    raise ValueError(f"no grid of tiles: the fewest, {min_tiles}, exceeds the most, {max_tiles}")
  best, best_distance = (1, 1), float("inf")
  for columns, rows in candidates:
    distance = abs(width / height - columns / rows)
    large_enough = 2 * width * height > tile_size * tile_size * columns * rows
    if distance < best_distance or (distance == best_distance and large_enough):
      best, best_distance = (columns, rows), distance
  return best


def num_tiles(
  width: int, height: int, min_tiles: int, max_tiles: int, tile_size: int, use_thumbnail: bool
) -> int:
  """How many tiles an image makes: its grid, and a thumbnail when the grid has more than one."""
  columns, rows = grid(width, height, min_tiles, max_tiles, tile_size)
  return columns * rows + (use_thumbnail and columns * rows > 1)


@functools.lru_cache(maxsize=64)
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
  """All grids with min_tiles <= columns * rows <= max_tiles, small ones first."""
  # A set, although a list would do: between grids of one area the reference keeps the order of its set, which
  # decides ties such as 1x2 against 2x1 for an image of 5:4 under min_tiles=2. The order in which it is filled is the
  # reference's, too: by the first area under which both sides are looked at.
  shapes: set[tuple[int, int]] = set()
  for side in range(min_tiles, max_tiles + 1):
    first = side
    if side == min_tiles:
      first = 1
    else:  # grids of two shorter sides were found before
      shapes.update((columns, side) for columns in range(1, min(side - 1, max_tiles // side) + 1))
    for columns in range(first, side + 1):
      least = -(-min_tiles // columns)
      shapes.update((columns, rows) for rows in range(least, min(side, max_tiles // columns) + 1))
  return tuple(sorted(shapes, key=lambda shape: shape[0] * shape[1]))


def contested(min_tiles: int, max_tiles: int) -> list[Fraction]:
  """The aspect ratios, width / height, of which transformers' processor may choose another grid than `grid`.

  Two grids of one area are there as near as each other, and the order in which they are looked at decides: the
  reference's is that of a set, the processor's goes by columns. There are none for min_tiles=1 (tried up to 40).
  """
  ours = _grids(min_tiles, max_tiles)
  theirs = sorted(ours, key=lambda shape: (shape[0] * shape[1], shape))
  ratios = sorted({Fraction(*shape) for shape in ours})
  return [
    (low + high) / 2
    for low, high in itertools.pairwise(ratios)
    if _winners(ours, (low, high)) != _winners(theirs, (low, high))
  ]


def _winners(shapes: Iterable[tuple[int, int]], ratios: tuple[Fraction, Fraction]) -> list[tuple[int, int]]:
  """Which of the grids of either ratio an image between them may get: the first, or the last that it fills."""
  tied = [shape for shape in shapes if Fraction(*shape) in ratios]
  last = {columns * rows: (columns, rows) for columns, rows in tied}
  return [tied[0], *last.values()]
