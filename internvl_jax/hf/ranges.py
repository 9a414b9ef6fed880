"""Reading safetensors in a bucket by byte ranges: the header first, then tensors, or rows of them, as they are needed.

    bytes 0-8        length of the header, little-endian
    header           JSON: by tensor its dtype, shape and data_offsets
    numbers          row by row, tensor after tensor

What is asked for is one run of bytes where it is a tensor or rows of it; of a part of every row the run holds the
rest of the rows, too. Long runs are read in parts, several at a time: one connection is slower than a machine's link.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import ml_dtypes
import numpy as np

from internvl_jax.errors import UserError
from internvl_jax.hf import files
from internvl_jax.storage.paths import BucketPath
from internvl_jax.storage.snapshots import Pointer, explained

T = TypeVar("T")
U = TypeVar("U")

FIRST_BYTES = 2**18
"""Read at once of a file's beginning: the header of a shard, mostly, which is then one request."""

PART_BYTES = 2**23
"""Of a long run, read by one request."""

PARTS = 16
"""Requests for numbers under way at the same time."""

AHEAD_BYTES = 2**27
"""Of tensors that are read ahead of those that are put into place."""

_DTYPES: Mapping[str, Any] = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U64": np.uint64,
  "U32": np.uint32,
  "U16": np.uint16,
  "U8": np.uint8,
  "BOOL": np.bool_,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
}


_OTHER_DTYPES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64")
"""Of safetensors, too, but of nothing that is read."""


class _Tensor(NamedTuple):
  """A header's entry; `start` and `end` count bytes of the file."""

  dtype: str
  shape: tuple[int, ...]
  start: int
  end: int


class RangedTensors:
  """The tensors of a file in a bucket; has the methods of a safetensors handle that `weights.Checkpoint` calls."""

  def __init__(self, pointer: Pointer):
    """Reads the header, or takes it from an earlier one of the same object.

    Raises:
      UserError: the file is none of safetensors, is damaged or truncated, or cannot be read.
    """
    self.pointer = pointer
    self._tensors = _header(pointer)

  def keys(self) -> list[str]:
    """The tensors' names."""
    return list(self._tensors)

  def get_slice(self, key: str) -> "RangedSlice":
    """A tensor, of which no number is read before it is asked for by index."""
    return RangedSlice(self.pointer, self._tensors[key])

  def get_tensor(self, key: str) -> np.ndarray:
    """A tensor's numbers."""
    return self.get_slice(key)[()]


@dataclasses.dataclass(frozen=True)
class RangedSlice:
  """See `RangedTensors.get_slice`."""

  pointer: Pointer
  tensor: _Tensor

  def get_shape(self) -> list[int]:
    """The tensor's shape."""
    return list(self.tensor.shape)

  def get_dtype(self) -> str:
    """Its type, as safetensors names it."""
    return self.tensor.dtype

  def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
    """The part of the tensor at `index`, a slice of step 1 an axis; axes that it does not name are taken whole."""
    dtype, shape = np.dtype(_DTYPES[self.tensor.dtype]), self.tensor.shape
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=False)]
    bounds += [(0, size) for size in shape[len(bounds) :]]
    wanted = tuple(max(0, stop - start) for start, stop in bounds)
    if not math.prod(wanted):
      return np.empty(wanted, dtype)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    first = sum(start * stride for (start, _), stride in zip(bounds, strides, strict=True))
    last = sum((stop - 1) * stride for (_, stop), stride in zip(bounds, strides, strict=True))
    start = self.tensor.start + first * dtype.itemsize
    run = _read(self.pointer, start, start + (last + 1 - first) * dtype.itemsize).view(dtype)
    steps = [stride * dtype.itemsize for stride in strides]
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(run, wanted, steps, writeable=False))


# --- Requests -----------------------------------------------------------------------------------------------


@functools.cache
def _requests() -> concurrent.futures.ThreadPoolExecutor:
  return concurrent.futures.ThreadPoolExecutor(PARTS, "bucket")


@functools.cache
def _readers() -> concurrent.futures.ThreadPoolExecutor:
  """Those who wait for requests: threads of their own, or all would wait."""
  return concurrent.futures.ThreadPoolExecutor(PARTS, "reader")


def _read(pointer: Pointer, start: int, end: int) -> np.ndarray:
  """Bytes uint8 [end - start] of a file."""
  if end - start <= PART_BYTES:
    return np.frombuffer(_request(pointer, start, end), np.uint8)
  out = np.empty(end - start, np.uint8)

  def fill(at: int) -> None:
    stop = min(at + PART_BYTES, end)
    out[at - start : stop - start] = np.frombuffer(_request(pointer, at, stop), np.uint8)

  for _ in ahead(fill, range(start, end, PART_BYTES), PARTS, _requests()):
    pass
  return out


def _request(pointer: Pointer, start: int, end: int) -> bytes:
  """Bytes of a file by one request.

  Raises:
    UserError: they cannot be had.
  """
  url = BucketPath(pointer.url)
  with explained(url):
    found = url.read_range(start, end)
  if len(found) != end - start:
    raise UserError(_changed(pointer))
  return found


def _changed(pointer: Pointer) -> str:
  return f"{pointer.url}: was overwritten while it was read; start again once it is complete"


def ahead(
  function: Callable[[T], U],
  items: Iterable[T],
  most: int,
  pool: concurrent.futures.Executor | None = None,
) -> Iterator[U]:
  """What a function gives of each item, in order, of up to `most` items at a time."""
  pending: collections.deque[concurrent.futures.Future[U]] = collections.deque()
  items = iter(items)
  try:
    while True:
      for item in itertools.islice(items, most - len(pending)):
        pending.append((pool or _readers()).submit(function, item))
      if not pending:
        return
      yield pending.popleft().result()
  finally:
    for future in pending:
      future.cancel()


def check_unchanged(pointers: Iterable[Pointer]) -> None:
  """Looks whether files are still those whose headers were read.

  Raises:
    UserError: one was overwritten.
  """

  def check(pointer: Pointer) -> None:
    url = BucketPath(pointer.url)
    with explained(url):
      stat = url.stat()
    if (stat.st_size, stat.checksum) != (pointer.size, pointer.checksum):
      raise UserError(_changed(pointer))

  for _ in ahead(check, sorted(set(pointers)), PARTS):
    pass


# --- Headers ------------------------------------------------------------------------------------------------


def read_headers(pointers: Sequence[Pointer]) -> None:
  """Reads the headers of files, several at a time, for the `RangedTensors` to come."""
  for _ in ahead(_header, pointers, PARTS):
    pass


@functools.lru_cache(maxsize=1024)
def _header(pointer: Pointer) -> dict[str, _Tensor]:
  """The tensors that a file holds by name."""
  start = _request(pointer, 0, min(FIRST_BYTES, pointer.size)) if pointer.size else b""
  if found := files.what_begins(start[:64]):
    raise UserError(f"{pointer.url}: {found}")
  length = int.from_bytes(start[:8], "little")
  if files.HEADER_BYTES < length < pointer.size:
    raise UserError(
      f"{pointer.url}: has a header of {length:,} bytes, more than any InternVL needs; take another file"
    )
  end = 8 + length
  try:
    if not 8 <= end <= pointer.size:
      raise ValueError(f"a header of {length:,} bytes in a file of {pointer.size:,}")
    if end > len(start):
      start += _request(pointer, len(start), end)
    return _parse(start[8:end], end, pointer.size)
  except (ValueError, TypeError, KeyError, RecursionError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(
      f"{pointer.url}: damaged or truncated safetensors file ({files.shown_error(error)}); download it again"
    ) from None


def _parse(header: bytes, begin: int, size: int) -> dict[str, _Tensor]:
  """A header's entries, which cover the file's bytes from `begin` to `size` without gap."""
  found = json.loads(header)
  if not isinstance(found, dict):
    raise ValueError(f"its header is a {type(found).__name__}")
  found.pop("__metadata__", None)
  tensors = {}
  for name, entry in found.items():
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
      raise ValueError(f"the shape or the place of {files.shown(name)} is none")
    dtype = entry["dtype"]
    if dtype not in _DTYPES and dtype not in _OTHER_DTYPES:
      raise ValueError(f"the type {files.shown(dtype)} of {files.shown(name)} is none")
    tensors[name] = _Tensor(dtype, shape, begin + start, begin + end)
  at = begin
  for name, tensor in sorted(tensors.items(), key=lambda item: item[1][2:]):
    width = np.dtype(_DTYPES[tensor.dtype]).itemsize if tensor.dtype in _DTYPES else None
    if tensor.start != at or (width is not None and tensor.end - at != width * math.prod(tensor.shape)):
      raise ValueError(
        f"{files.shown(name)} does not follow what is before it, or is not as long as its shape"
      )
    at = tensor.end
  if at != size:
    raise ValueError(f"its tensors end at byte {at:,}, and the file at {size:,}")
  return tensors
