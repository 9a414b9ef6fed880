"""Linear interpolation of two checkpoints of one model, parameter by parameter as they are read (WiSE-FT, arXiv:2109.01903)."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from internvl_jax.errors import UserError
from internvl_jax.hf.model import Source


@dataclasses.dataclass(frozen=True, eq=False)
class InterpolatedParameter:
  """A parameter between two of the same shape, in float32; a layer is computed when it is asked for by index.

  Attributes:
    start, end: arrays, or what is read when it is asked for.
    weight: of `end`; that of `start` is 1 - weight.
  """

  start: Any
  end: Any
  weight: float

  @property
  def shape(self) -> tuple[int, ...]:
    return self.start.shape

  def __getitem__(self, cell: tuple[int, ...]) -> np.ndarray:
    return interpolate(self.start[cell], self.end[cell], self.weight)

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    del copy
    whole = interpolate(self.start, self.end, self.weight)
    return whole if dtype is None else whole.astype(dtype)


def interpolate(start: Any, end: Any, weight: float) -> np.ndarray:
  """(1 - weight) * start + weight * end in float32: exact at 0 and 1, and where the two are equal (what was frozen)."""
  start, end = np.asarray(start, np.float32), np.asarray(end, np.float32)
  difference = end - start
  if weight > 0.5:
    difference *= weight - 1
    return np.add(end, difference, out=difference)
  difference *= weight
  return np.add(start, difference, out=difference)


def check_same_model(start: Source, end: Source) -> None:
  """Refuses checkpoints whose weights do not stand for the same thing.

  Args:
    start, end: both without adapters.

  Raises:
    UserError: their parameters have other names or shapes, or their models compute otherwise.
  """
  where = f"{start.folder} and {end.folder} cannot be interpolated"
  ours, theirs = ({path: leaf.shape for path, leaf in source.model.shapes.items()} for source in (start, end))
  differing = sorted(path for path in ours | theirs if ours.get(path) != theirs.get(path))
  if differing:
    path = differing[0]
    raise UserError(
      f"{where}: {len(differing)} parameters differ, first {path}: {ours.get(path)} there, {theirs.get(path)} here; name the "
      "checkpoint that the other one was trained from"
    )
  if found := next(_differences(start.config, end.config), None):
    raise UserError(f"{where}: their config.json have other values of {found}; correct the wrong one")


def _differences(ours: Any, theirs: Any, name: str = "") -> Iterator[str]:
  """The fields that differ between two configs, "text.rope_theta (1e4 and 1e6)"."""
  if not dataclasses.is_dataclass(ours) or type(ours) is not type(theirs):
    if ours != theirs:
      yield f"{name.removeprefix('.')} ({ours} and {theirs})"
    return
  for field in dataclasses.fields(ours):
    yield from _differences(getattr(ours, field.name), getattr(theirs, field.name), f"{name}.{field.name}")
