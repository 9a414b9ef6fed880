"""Tables of Arrow as records: a row is a record, any of them read by its number.

Parquet packs rows by thousands, and reading one unpacks them all. So a Parquet file is written once, into the cache, as Arrow's
own file format in small parts, of which one is read for a record. What `datasets` has saved is in that form already.
"""

import hashlib
import os
import pathlib
import re
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging

from internvl_jax.data.source import files
from internvl_jax.data.source.cache import cache_errors_named, locked, whole_file
from internvl_jax.data.source.spans import local_file
from internvl_jax.data.where import DataError, Where
from internvl_jax.errors import redacted

# Rows of a table that are looked at or digested at a time.
_ROWS = 256
# Bytes of a part of the cached table, where a row has no more: what is read for one record.
_PART_BYTES = 1 << 18
_SEARCHED = 64
_PARQUET_BUFFER = 1 << 20


def arrow(path: str, dataset: str) -> Any:
  """The module pyarrow, with its parts for Parquet and files.

  Raises:
    DataError: it is not installed.
  """
  try:
    import pyarrow.ipc
    import pyarrow.parquet
  except ImportError:
    raise DataError(
      f"{path}: dataset {dataset!r}: it is a table, which needs pyarrow: pip install 'internvl_jax[parquet]'"
    ) from None
  return pyarrow


class TableRecords:
  """The rows of a table: the base of its kinds, see `Records`.

  A kind sets `path`, `dataset`, `state`, and overrides `__len__`, `rows` and `files`.

  Attributes:
    kind: what such a table is called where datasets are listed.
    path: as it was named; errors blame it.
    dataset: the name that errors use.
    state: sizes and dates of its files, as they were when it was opened.
  """

  kind = "table"
  path: str
  dataset: str
  state: tuple[int, int]
  _root: dict[str, str]

  def __len__(self) -> int:
    raise NotImplementedError

  def rows(self, start: int, stop: int) -> Any:
    """The rows from `start` to before `stop`: a pyarrow.Table."""
    raise NotImplementedError

  def files(self) -> list[str]:
    """Paths of what it is read from."""
    raise NotImplementedError

  def read(self, index: int) -> Any:
    """Reads a row: a dict without the columns that are null.

    Raises:
      DataError: it cannot be read.
    """
    try:
      (row,) = self.rows(index, index + 1).to_pylist()
    except Exception as error:  # pyarrow has no list of what damaged files raise
      raise self.where(index).error(f"the row cannot be read: {error}; restore the file") from error
    return without_nulls(row)

  def where(self, index: int) -> Where:
    """The place of a row, counted from 1."""
    return Where(self.dataset, self.path, index + 1, **self._root)

  def containing(self, text: bytes) -> Iterator[int]:
    """Yields all rows, if a column's name begins with a text; none else."""
    wanted = text.decode().strip('"')
    names = _names(self.rows(0, 1).schema) if len(self) else ()
    return iter(range(len(self) if any(name.startswith(wanted) for name in names) else 0))

  def checksum(self, start: int, stop: int) -> int:
    """A number, never 0, that differs when the rows from `start` to before `stop` do."""
    total = 0
    for part in self._bytes_of(start, stop):
      total = zlib.crc32(part, total)
    return max(1, total)

  def digest_records(self, start: int, stop: int) -> str:
    """16 hexadecimal digits that tell the rows from `start` to before `stop` from any others."""
    return self._sha256(start, stop)[:16]

  def digest(self) -> str:
    """The SHA-256, in hex, of all rows."""
    return self._sha256(0, len(self))

  def stamp(self) -> tuple[str, int, int, int, int]:
    """A stamp of its files, which changes whenever one is written to, put back or replaced."""
    try:
      found = [os.stat(path) for path in self.files()]
    except OSError as error:
      raise self._error(f"its files cannot be read: {error}; restore them") from error
    inodes = zlib.crc32(repr([stat.st_ino for stat in found]).encode())
    dates = (max(stat.st_mtime_ns for stat in found), max(stat.st_ctime_ns for stat in found))
    return os.path.abspath(self.path), inodes, sum(stat.st_size for stat in found), *dates

  def check_unchanged(self) -> None:
    """Raises DataError where a file of it is not what it was when it was opened."""
    if self.find_state() != self.state:
      raise self._error("its files were changed after it was opened; start the run again")

  def find_state(self) -> tuple[int, int]:
    """The size of its files, and when the last of them was written to."""
    _, _, size, changed, _ = self.stamp()
    return size, changed

  def close(self) -> None:
    """Closes what is open; the next read opens it again."""

  def release(self) -> None:
    """As `close`."""
    self.close()

  def _sha256(self, start: int, stop: int) -> str:
    digest = hashlib.sha256()
    for part in self._bytes_of(start, stop):
      digest.update(part)
    return digest.hexdigest()

  def _bytes_of(self, start: int, stop: int) -> Iterator[Any]:
    """Yields bytes that say what rows hold, however they are cut in the file."""
    for first in range(start, stop, _ROWS):
      rows = self.rows(first, min(first + _ROWS, stop)).combine_chunks()
      for batch in rows.to_batches():
        yield batch.serialize()

  def _error(self, what: str) -> DataError:
    return DataError(f"{self.path}: dataset {self.dataset!r}: {what}")


class ArrowTable(TableRecords):
  """The rows of a Parquet or Arrow file, read from the cache; a file that has not changed is opened at once."""

  kind = "parquet"

  def __init__(
    self,
    path: str | os.PathLike[str],
    dataset: str,
    *,
    cache: str | os.PathLike[str] | None = None,
    root: str | None = None,
    local: str | None = None,
    form: str = "parquet",
  ):
    """Opens a file; see `spans.RecordFile`.

    Args:
      path: of the file, or its URL.
      dataset: the name that errors use.
      cache: folder of caches; None: `files.default_cache()`.
      root: the setting that says where its media are, where that is not the meta file.
      local: path of a local file with its content; None: the file, or a remote one's copy.
      form: "parquet", "arrow" or "arrow_stream".

    Raises:
      DataError: pyarrow is missing, the file is damaged, or it has no row.
    """
    self.path, self.dataset = str(path), dataset
    self._root = {} if root is None else {"root": root}
    self.kind = "parquet" if form == "parquet" else "Arrow table"
    arrow(self.path, dataset)
    try:
      self._source = local or local_file(self.path, cache)
      self.state = self.find_state()
    except OSError as error:
      raise self._error(f"the annotation file cannot be read: {error}; restore it") from error
    self._copy = self._converted(form, pathlib.Path(cache or files.default_cache()))
    self._open()
    if not len(self):
      raise self._error("is empty: 0 samples; add rows, or do not name it")

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def files(self) -> list[str]:
    """The file; of a remote one, its copy."""
    return [self._source]

  def rows(self, start: int, stop: int) -> Any:
    """The rows from `start` to before `stop`: a pyarrow.Table."""
    pyarrow = arrow(self.path, self.dataset)
    first, last = np.searchsorted(self._ends, [start, stop - 1], side="right").tolist()
    with self._lock:
      if self._reader is None:
        self._reader = pyarrow.ipc.open_file(pyarrow.OSFile(self._copy, "rb"))
      parts = [self._reader.get_batch(part) for part in range(first, last + 1)]
    before = int(self._ends[first - 1]) if first else 0
    return pyarrow.Table.from_batches(parts).slice(start - before, stop - start)

  def close(self) -> None:
    """Closes the cached table; the next read opens it again."""
    self._reader = None

  def _open(self) -> None:
    self._reader: Any = None
    self._lock = threading.Lock()
    with cache_errors_named(os.path.dirname(self._copy)):
      self._ends = np.load(f"{self._copy}.npy", mmap_mode="r")

  def _converted(self, form: str, cache: pathlib.Path) -> str:
    """The path of the table in the cache, made if it is not there."""
    text = f"{os.path.abspath(self._source)} {self.state}"
    stem = re.sub(r"\W+", "_", pathlib.Path(files.name(self.path)).stem)[:40]
    folder = cache / "copies"
    copy = folder / f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.arrow"
    with cache_errors_named(cache):
      folder.mkdir(parents=True, exist_ok=True)
      with locked(folder):
        if not copy.exists():
          logging.info(
            "Writing %s (%.1f MB) as an Arrow file to %s", redacted(self.path), self.state[0] / 1e6, folder
          )
          self._convert(form, copy)
    return str(copy)

  def _convert(self, form: str, copy: pathlib.Path) -> None:
    pyarrow, lengths = arrow(self.path, self.dataset), []
    with whole_file(copy) as out:
      schema, batches = self._batches(form)
      with pyarrow.ipc.new_file(out, schema) as writer:
        for batch in batches:
          each = max(1, _PART_BYTES * batch.num_rows // max(batch.nbytes, 1))
          for start in range(0, batch.num_rows, each):
            part = batch.slice(start, each)
            writer.write_batch(part)
            lengths.append(part.num_rows)
      # Before the table takes its place: who finds it finds both.
      with whole_file(copy.with_name(f"{copy.name}.npy")) as ends:
        np.save(ends, np.cumsum(lengths, dtype=np.int64))

  def _batches(self, form: str) -> tuple[Any, Iterator[Any]]:
    """The schema of the file, without dictionaries, and its rows, some at a time."""
    pyarrow = arrow(self.path, self.dataset)
    try:
      schema, found = open_batches(self._source, form, pyarrow)
    except Exception as error:  # pyarrow has no list of what damaged files raise
      raise self._error(f"it cannot be read as {self.kind}: {error}; restore it") from error
    return schema, self._named(found)

  def _named(self, batches: Iterator[Any]) -> Iterator[Any]:
    try:
      yield from batches
    except OSError:
      raise
    except Exception as error:
      raise self._error(f"it cannot be read as {self.kind}: {error}; restore it") from error

  def __getstate__(self) -> dict[str, Any]:
    return {key: value for key, value in self.__dict__.items() if key not in ("_reader", "_lock", "_ends")}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._open()


def open_batches(source: Any, form: str, pyarrow: Any) -> tuple[Any, Iterator[Any]]:
  """The schema of a file, without dictionaries, and its rows in order, some at a time.

  Args:
    source: its path, or an open file.
    form: "parquet", "arrow" or "arrow_stream".
    pyarrow: the module.
  """
  if form == "parquet":
    # With its pages read as they are needed: a group of rows may be the whole file.
    file = pyarrow.parquet.ParquetFile(source, buffer_size=_PARQUET_BUFFER, pre_buffer=False)
    schema, batches = file.schema_arrow, file.iter_batches(batch_size=_ROWS)
  elif form == "arrow":
    file = pyarrow.ipc.open_file(source)
    schema, batches = file.schema, (file.get_batch(part) for part in range(file.num_record_batches))
  else:
    file = pyarrow.ipc.open_stream(source)
    schema, batches = file.schema, iter(file)
  types = [field.type for field in schema]
  plain = [each.value_type if pyarrow.types.is_dictionary(each) else each for each in types]
  target = pyarrow.schema(
    [field.with_type(each) for field, each in zip(schema, plain, strict=True)], schema.metadata
  )
  if types == plain:
    return schema, iter(batches)
  return target, (batch.cast(target) for batch in batches)


def parquet_first_records(path: str) -> Iterator[Any]:
  """The first rows of a local Parquet file, without a cache; what is wrong about it is said when it is opened."""
  try:
    pyarrow = arrow(path, "")
    _, batches = open_batches(path, "parquet", pyarrow)
    rows = next(batches).slice(0, _SEARCHED).to_pylist()
  except Exception:  # it is said then
    return iter(())
  return iter([without_nulls(row) for row in rows])


def without_nulls(value: Any) -> Any:
  """A row without what is null: a table has every column in every row, and every field in every struct."""
  if isinstance(value, dict):
    return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
  return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _names(schema: Any) -> Iterator[str]:
  """Yields the names of all columns, and of the fields within them."""
  for field in schema:
    yield field.name
    yield from _inner_names(field.type)


def _inner_names(kind: Any) -> Iterator[str]:
  for number in range(kind.num_fields):
    yield kind.field(number).name
    yield from _inner_names(kind.field(number).type)
