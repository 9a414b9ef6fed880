"""Compiled loops that resize RGB images, in the integers that Pillow computes with.

Pillow's bicubic resize is two passes, one along rows and one along columns. Each replaces pixels by weighted sums of their
neighbors: integers in units of 2^-22, added up in 32 bits, rounded, and clipped to 8 bits between the passes, too. Sums of
integers are exact in any order, so these loops give the same bits; what they gain is that a compiler can make vectors
of them. Along a column that is plain: whole rows are added. Along a row, a strip of rows is transposed first, so that
the same loop serves.

Importing this module compiles, for seconds, unless Numba's cache on disk has it.
"""

from typing import Any

import numba
import numpy as np

BITS = 22
"""Fraction bits of a weight: a sum of weights of 2^22 keeps brightness."""

# Rows transposed at a time: 96 values in a vector loop, and a strip that stays in a core's cache.
_STRIP = 32
_HALF = np.int32(1 << BITS - 1)

_compiled: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
_bytes, _lists = numba.types.uint8[:, ::1], (numba.types.int64[::1], numba.types.int32[:, ::1])


@numba.njit(**_compiled)
def _add_rows(rows, first, weights, sums, out):
  """Computes out[j] = sum of weights[t] * rows[first + t, j], rounded and clipped.

  Args:
    rows: uint8 [r, >= n], used as a ring: after the last row comes the first.
    first: number of the first row.
    weights: int32 [t], a multiple of 4; those of rows that are not meant are 0.
    sums: int32 [>= n], scratch.
    out: uint8 [n].
  """
  count, width, last = len(rows), len(out), len(weights) - 4
  row = first % count
  # Four rows at a time, since what it costs to fetch and store the sums is as much as a multiplication. Each sum is made
  # an int32 at once: in Numba a sum of int32 is an int64, which halves the vectors.
  for t in range(0, last, 4):
    a, row = rows[row], row + 1 if row + 1 < count else 0
    b, row = rows[row], row + 1 if row + 1 < count else 0
    c, row = rows[row], row + 1 if row + 1 < count else 0
    d, row = rows[row], row + 1 if row + 1 < count else 0
    w, x, y, z = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
    if t == 0:
      for j in range(width):
        sums[j] = np.int32(w * a[j] + x * b[j] + y * c[j] + z * d[j])
    else:
      for j in range(width):
        sums[j] = np.int32(sums[j] + w * a[j] + x * b[j] + y * c[j] + z * d[j])
  a, row = rows[row], row + 1 if row + 1 < count else 0
  b, row = rows[row], row + 1 if row + 1 < count else 0
  c, row = rows[row], row + 1 if row + 1 < count else 0
  d = rows[row]
  w, x, y, z = weights[last], weights[last + 1], weights[last + 2], weights[last + 3]
  if last == 0:
    for j in range(width):
      total = np.int32(_HALF + w * a[j] + x * b[j] + y * c[j] + z * d[j])
      out[j] = min(max(total >> np.int32(BITS), 0), 255)
  else:
    for j in range(width):
      total = np.int32(_HALF + sums[j] + w * a[j] + x * b[j] + y * c[j] + z * d[j])
      out[j] = min(max(total >> np.int32(BITS), 0), 255)


@numba.njit(**_compiled)
def _add_columns(rows, first, weights, sums, turned, made, out):
  """Resizes a strip of at most 32 rows along them.

  Args:
    rows: uint8 [r, 3 * width].
    first: int64 [w], the first pixel of each weighted sum.
    weights: int32 [w, t].
    sums: int32 [>= 96], scratch.
    turned: uint8 [width, 96], scratch.
    made: uint8 [w, 96], scratch.
    out: uint8 [>= r, 3 * w].
  """
  count = len(rows)
  for x in range(len(turned)):
    column = turned[x]
    for y in range(count):
      for channel in range(3):
        column[3 * y + channel] = rows[y, 3 * x + channel]
  for x in range(len(made)):
    column = made[x]
    _add_rows(turned, first[x], weights[x], sums, column)
    for y in range(count):
      for channel in range(3):
        out[y, 3 * x + channel] = column[3 * y + channel]


@numba.njit(numba.void(_bytes, *_lists, *_lists, numba.boolean, numba.types.uint8[:, :, ::1]), **_compiled)
def resize(pixels, first_x, weights_x, first_y, weights_y, columns_first, tiles):
  """Resizes an image to a grid of tiles, written one by one.

  Args:
    pixels: uint8 [height, 3 * width].
    first_x: int64 [w], the first pixel of each weighted sum along a row.
    weights_x: int32 [w, t], a multiple of 4 each.
    first_y: int64 [h], ascending, as above along a column.
    weights_y: int32 [h, u].
    columns_first: resize along columns before rows.
    tiles: uint8 [tiles, side, 3 * side], the grid's first row first; w and h are multiples of the side.
  """
  height, width, side = pixels.shape[0], pixels.shape[1], tiles.shape[1]
  rows, columns, reach = len(first_y), len(first_x) // side, weights_y.shape[1]
  sums = np.empty(max(width, 3 * len(first_x), 3 * _STRIP), np.int32)
  turned, made = np.empty((width // 3, 3 * _STRIP), np.uint8), np.empty((len(first_x), 3 * _STRIP), np.uint8)
  # Rows of the first pass that the second still needs: in strips, so that each has its place without a seam.
  slots = (reach + 2 * _STRIP - 1) // _STRIP * _STRIP
  ring = np.empty((slots, 3 * len(first_x)), np.uint8)
  strip, line = np.empty((_STRIP, width), np.uint8), np.empty(3 * len(first_x), np.uint8)
  done = 0
  for y in range(rows):
    if columns_first:
      if y == done:
        done = min(y + _STRIP, rows)
        for i in range(y, done):
          _add_rows(pixels, first_y[i], weights_y[i], sums, strip[i - y])
        _add_columns(strip[: done - y], first_x, weights_x, sums, turned, made, ring)
      line = ring[y % _STRIP]
    else:
      while done < min(first_y[y] + reach, height):
        stop = min(done + _STRIP, height)
        _add_columns(pixels[done:stop], first_x, weights_x, sums, turned, made, ring[done % slots :])
        done = stop
      _add_rows(ring, first_y[y], weights_y[y], sums, line)
    for column in range(columns):
      tile, part = tiles[y // side * columns + column, y % side], line[3 * side * column :]
      for j in range(3 * side):
        tile[j] = part[j]
