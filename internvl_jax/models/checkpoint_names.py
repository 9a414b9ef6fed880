"""How a checkpoint's tensors and our parameters turn into each other: rows of two-way tables of names.

A row pairs one of our paths with the checkpoint's keys. `{i}` stands for the layer's index on both sides; our
stacks hold many layers in one array, and the tables speak of one. `{e}`, on the checkpoint's side alone, stands
for an expert: our array of all experts has them along its first axis. Rows that a model has no parameter for (a
bias that a variant lacks) are not used; a parameter without a row is an error.

The tables themselves: each vision tower's in its file (`models.towers`), the others in `hf.tables`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from internvl_jax.models.lora import MARK

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
  """How a checkpoint's tensors become one array of ours and back.

  Attributes:
    load: tensors, and the shape wanted -> our array.
    save: our array -> tensors.
    part: the index into the tensor that holds an index of ours, where there is one tensor and such an index;
      then only that part of it is read. None: the tensors are read whole.
    resizes: `load` takes tensors of other shapes than `save` gives.
    shapes: our shape -> the tensors' shapes, for what is only read; else `save` tells them.
  """

  load: Callable[[Sequence[np.ndarray], tuple[int, ...]], np.ndarray]
  save: Callable[[np.ndarray], Sequence[np.ndarray]]
  part: Callable[[Index], Index] | None = None
  resizes: bool = False
  shapes: Callable[[tuple[int, ...]], list[tuple[int, ...]]] | None = None


SAME = Transform(lambda x, shape: x[0], lambda x: [x], lambda index: index)
TRANSPOSE = Transform(lambda x, shape: x[0].T, lambda x: [x.T], lambda index: index[::-1])
# A convolution's [out, in, height, width] as [height, width, in, out].
CONV = Transform(lambda x, shape: x[0].transpose(2, 3, 1, 0), lambda x: [x.transpose(3, 2, 0, 1)])
CLASS_TOKEN = Transform(lambda x, shape: x[0].reshape(-1), lambda x: [x.reshape(1, 1, -1)])


def concatenated(*sizes: int) -> Transform:
  """Tensors [size, ...] one after the other, as our last axis; those of two axes are transposed."""
  borders = list(np.cumsum(sizes[:-1]))
  return Transform(
    lambda x, shape: np.concatenate([tensor.T for tensor in x], axis=-1),
    lambda x: [part.T for part in np.split(x, borders, axis=-1)],
  )


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of a table."""

  ours: str
  theirs: tuple[str, ...]
  transform: Transform = SAME


def row(ours: str, theirs: str, transform: Transform = SAME) -> Row:
  """A row with one tensor."""
  return Row(ours, (theirs,), transform)


def linear(path: str, key: str | None = None) -> list[Row]:
  """Rows of a linear map: its kernel, transposed, its bias, and what an adapter adds under PEFT's names."""
  key = key or path
  return [
    row(f"{path}.kernel", f"{key}.weight", TRANSPOSE),
    row(f"{path}.bias", f"{key}.bias"),
    row(f"{path}{MARK}a", f"{key}.lora_A.weight", TRANSPOSE),
    row(f"{path}{MARK}b", f"{key}.lora_B.weight", TRANSPOSE),
    row(f"{path}{MARK}magnitude", f"{key}.lora_magnitude_vector"),
  ]


def concatenated_linear(path: str, keys: Sequence[str], transform: Transform) -> list[Row]:
  """Rows of our one linear map that the checkpoint holds as several; adapters have no such form."""
  return [
    Row(f"{path}.kernel", tuple(f"{key}.weight" for key in keys), transform),
    Row(f"{path}.bias", tuple(f"{key}.bias" for key in keys), transform),
  ]


def norm(path: str, key: str | None = None) -> list[Row]:
  """Rows of a norm: its scale, and the bias that layer norms have."""
  key = key or path
  return [row(f"{path}.scale", f"{key}.weight"), row(f"{path}.bias", f"{key}.bias")]
