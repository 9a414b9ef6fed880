"""Reads a state dict of torch.save without torch and without running code of the pickle.

A `.pth` is a zip archive of one pickle and of a file for each storage. The unpickler knows the handful of names that a
plain state dict needs, and makes descriptions of them; numbers are read from the archive when a tensor is asked for.
"""

import collections
import contextlib
import dataclasses
import io
import math
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from internvl_jax.errors import UserError
from internvl_jax.hf.files import convert_command, shown_error, what_it_is

PICKLE_BYTES = 2**24
"""Longest pickle of an archive, which holds no numbers: some 200 bytes a tensor."""

_STORAGES: Mapping[str, tuple[str, type]] = {
  "DoubleStorage": ("F64", np.float64),
  "FloatStorage": ("F32", np.float32),
  "HalfStorage": ("F16", np.float16),
  "BFloat16Storage": ("BF16", ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class _Storage:
  """A run of numbers: its entry in the archive, its kind as safetensors and numpy name it, and how many there are."""

  entry: str
  kind: str
  dtype: type
  count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """A tensor of a storage; `strides` count numbers, as PyTorch's do."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  def check(self) -> None:
    """Refuses one that is not within its storage."""
    numbers = (self.offset, *self.shape, *self.strides)
    if len(self.shape) != len(self.strides) or not all(type(n) is int and n >= 0 for n in numbers):
      raise ValueError(f"a tensor of shape {self.shape} and strides {self.strides}")
    last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
    if math.prod(self.shape) and last >= self.storage.count:
      raise ValueError(f"a tensor of shape {self.shape} beyond its {self.storage.count} numbers")


class PickledTensors:
  """The tensors of a `.pth` or `.bin` file; has the methods of a safetensors handle that `weights.Checkpoint` calls."""

  def __init__(self, path: Path):
    """Reads names, shapes and types.

    Raises:
      UserError: it is no state dict of torch.save's, is damaged, or needs code to be run.
    """
    self._path = path
    if not zipfile.is_zipfile(path):
      with path.open("rb") as file:
        is_torchs = file.read(1) in (b"P", b"\x80")
      found = None if is_torchs else what_it_is(path)
      words = "not an archive of torch.save's (before PyTorch 1.6 they were none), or truncated; download it again, or "
      raise UserError(f"{path}: {found or words + convert_command([path.name])}")
    with self._explained():
      self._tensors = _read_pickle(path)

  def keys(self) -> list[str]:
    """The tensors' names."""
    return list(self._tensors)

  def get_slice(self, key: str) -> "PickledSlice":
    """A tensor, of which no number is read before it is asked for by index."""
    return PickledSlice(self, key, self._tensors[key])

  def get_tensor(self, key: str) -> np.ndarray:
    """A tensor's numbers.

    Raises:
      UserError: the archive is damaged: it holds a checksum of each storage.
    """
    found = self._tensors[key]
    with self._explained(), zipfile.ZipFile(self._path) as archive:
      storage = np.frombuffer(archive.read(found.storage.entry), found.storage.dtype)
    width = storage.itemsize
    strides = [step * width for step in found.strides]
    view = np.lib.stride_tricks.as_strided(storage[found.offset :], found.shape, strides, writeable=False)
    return np.array(view, order="C")

  @contextlib.contextmanager
  def _explained(self) -> Iterator[None]:
    """Turns what is wrong with the archive or its pickle, which may fail in any way, into a line."""
    try:
      yield
    except Exception as error:
      raise UserError(
        f"{self._path}: not a state dict of torch.save's, or damaged ({type(error).__name__}: {shown_error(error)}); "
        "download it again"
      ) from None


@dataclasses.dataclass(frozen=True)
class PickledSlice:
  """See `PickledTensors.get_slice`."""

  file: PickledTensors
  key: str
  tensor: _Tensor

  def get_shape(self) -> list[int]:
    """The tensor's shape."""
    return list(self.tensor.shape)

  def get_dtype(self) -> str:
    """Its type, as safetensors names it."""
    return self.tensor.storage.kind

  def __getitem__(self, index: Any) -> np.ndarray:
    return self.file.get_tensor(self.key)[index]


def _read_pickle(path: Path) -> dict[str, _Tensor]:
  """The tensors of an archive by name."""
  with zipfile.ZipFile(path) as archive:
    sizes = {info.filename: info for info in archive.infolist()}
    (name,) = [found for found in sizes if found.endswith("/data.pkl")]
    if sizes[name].file_size > PICKLE_BYTES:
      raise ValueError(f"its pickle has {sizes[name].file_size:,} bytes")
    order = name.replace("data.pkl", "byteorder")
    if order in sizes and archive.read(order) != b"little":
      raise ValueError("its numbers are big-endian")
    reader = _Reader(io.BytesIO(archive.read(name)), name.removesuffix("data.pkl"), sizes)
    found = reader.load()
  if not isinstance(found, dict) or not all(isinstance(value, _Tensor) for value in found.values()):
    raise ValueError("it holds other things than tensors by name")
  for tensor in found.values():
    tensor.check()
  return {str(key): tensor for key, tensor in found.items()}


class _Reader(pickle.Unpickler):
  """Unpickles descriptions of tensors, and nothing that is not on its list."""

  def __init__(self, file: io.BytesIO, root: str, sizes: Mapping[str, zipfile.ZipInfo]):
    super().__init__(file)
    self._root, self._sizes = root, sizes

  def find_class(self, module: str, name: str) -> Any:
    known = {
      ("collections", "OrderedDict"): collections.OrderedDict,
      ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
      ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    }
    if (module, name) in known:
      return known[module, name]
    if module == "torch" and name in _STORAGES:
      return name
    raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is code and is never run")

  def persistent_load(self, pid: Any) -> _Storage:
    kind, storage, key, _, count = pid
    entry = self._sizes[f"{self._root}data/{key}"]
    name, dtype = _STORAGES[storage]
    stored = entry.compress_type == zipfile.ZIP_STORED
    if kind != "storage" or not stored or entry.file_size != count * np.dtype(dtype).itemsize:
      raise ValueError(f"the storage {key} has not the {count} numbers that it should have")
    return _Storage(entry.filename, name, dtype, count)


def _rebuilt(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
  return _Tensor(storage, offset, tuple(shape), tuple(strides))
