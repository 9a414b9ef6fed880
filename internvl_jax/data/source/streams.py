"""Streams of records: read in order, once a pass, of unknown length; nothing is indexed, copied or counted.

{"pile": {"stream": "gs://bucket/pile-{0000..0999}.tar"}}
{"pile": {"dataset_stream": "my/pile:train"}}
{"pile": {"iterable": "my_module:make_records"}}
"""

import importlib
import io
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, Protocol

from internvl_jax.data.source import files, formats, hf_dataset, json_text, packed, patterns, table, tar
from internvl_jax.data.where import DataError, Where

# Looked at to tell what a file is.
_HEAD_BYTES = 1 << 16
_TABLES = ("parquet", "arrow", "arrow_stream")


class Entry(NamedTuple):
  """A record of a stream.

  Attributes:
    where: its place, for errors.
    make: parses it; raises DataError where it is broken.
  """

  where: Where
  make: Callable[[], Any]


class Stream(Protocol):
  """Records in shards, each read from its beginning.

  Attributes:
    kind: what it is called where datasets are listed.
    path: as it is named.
    dataset: the name that errors use.
    num_shards: parts that different hosts may read; it does not change.
  """

  kind: str
  path: str
  dataset: str
  num_shards: int

  def records(self, shard: int) -> Iterator[Entry]:
    """Yields the records of a shard, the same ones each time.

    Raises:
      DataError: it cannot be read, or no further.
    """
    ...


KEYS = ("stream", "dataset_stream", "iterable")
"""Keys under which a meta file names streams."""


def open_stream(key: str, path: str, dataset: str) -> Stream:
  """Opens what an entry of a meta file names.

  Args:
    key: one of `KEYS`.
    path: what it says: files, a name that `datasets` knows, or a function.
    dataset: the name that errors use.

  Raises:
    DataError: it is not there, or a package is missing.
  """
  return {"stream": FileStream, "dataset_stream": HfStream, "iterable": FunctionStream}[key](path, dataset)


class FileStream:
  """The records of files, one after the other: jsonl, tars and tables, packed or not, local or remote."""

  kind = "stream of files"

  def __init__(self, path: str, dataset: str):
    """Finds the files that a path, URL or pattern names."""
    self.path, self.dataset = path, dataset
    self._files = patterns.expand(path)
    self.num_shards = len(self._files)

  def records(self, shard: int) -> Iterator[Entry]:
    """Yields the records of a file."""
    path = self._files[shard]
    try:
      with files.open_forward(path) as file:
        yield from self._in_order(io.BufferedReader(file, 2 * _HEAD_BYTES), path)
    except (OSError, EOFError) as error:
      raise DataError(
        f"{path}: dataset {self.dataset!r}: it cannot be read (on): {error}; restore it"
      ) from error

  def _in_order(self, file: Any, path: str) -> Iterator[Entry]:
    found = formats.recognized(io.BytesIO(file.peek(_HEAD_BYTES)[:_HEAD_BYTES]))
    kind = "" if found is None else found.kind
    if kind in packed.READERS:
      # A reader of the package's own; `BufferedReader` wants one that fills its buffer.
      return self._in_order(io.BufferedReader(_Unpacked(packed.READERS[kind](file)), 2 * _HEAD_BYTES), path)
    if kind == "tar":
      entries = tar.records_in_order(file, path, self.dataset)
      return (Entry(Where(self.dataset, path, number), make) for number, (_, make) in enumerate(entries, 1))
    if kind in _TABLES:
      return self._rows(file, kind, path)
    if found is not None:
      raise DataError(f"{path}: dataset {self.dataset!r}: {found.explain(path)}")
    return self._lines(file, path)

  def _lines(self, file: BinaryIO, path: str) -> Iterator[Entry]:
    for number, line in enumerate(file, 1):
      if line.strip():
        where = Where(self.dataset, path, number)
        yield Entry(where, lambda line=line, where=where: json_text.parse(line.rstrip(b"\r\n"), where))

  def _rows(self, file: BinaryIO, kind: str, path: str) -> Iterator[Entry]:
    pyarrow = table.arrow(path, self.dataset)
    # Parquet is read from its end: a remote file has to be opened in another way, and is seekable then.
    source = file if kind == "arrow_stream" else path if not files.is_remote(path) else files.open_file(path)
    _, batches = table.open_batches(source, kind, pyarrow)
    number = 0
    for batch in batches:
      for row in batch.to_pylist():
        number += 1
        yield Entry(Where(self.dataset, path, number), lambda row=row: table.without_nulls(row))


class _Unpacked(io.RawIOBase):
  """Bytes of a decompressor, as a raw file."""

  def __init__(self, reader: Any):
    self._reader = reader

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    data = self._reader.read(len(buffer))
    buffer[: len(data)] = data
    return len(data)


class HfStream:
  """The records of a dataset that `datasets` reads as it comes, without a copy."""

  kind = "Hugging Face stream"

  def __init__(self, path: str, dataset: str):
    """Opens a name, "name@subset:split"."""
    self.path, self.dataset = path, dataset
    module = hf_dataset.library(f"{path}: dataset {dataset!r}")
    name, subset, split = hf_dataset.parse_name(path)
    try:
      found = module.load_dataset(name, subset, split=split, streaming=True)
    except Exception as error:  # its scripts, files and servers raise what they like
      raise self._error(error) from error
    self._data = hf_dataset.undecoded(found, module)
    self.num_shards = self._data.num_shards

  def records(self, shard: int) -> Iterator[Entry]:
    """Yields the records of a shard."""
    part = self._data.shard(self.num_shards, shard) if self.num_shards > 1 else self._data
    rows = iter(part)
    number = 0
    while True:
      try:
        row = next(rows, None)
      except Exception as error:
        raise self._error(error) from error
      if row is None:
        return
      number += 1
      where = Where(self.dataset, f"{self.path}[{shard}]" if self.num_shards > 1 else self.path, number)
      yield Entry(where, lambda row=row: table.without_nulls(row))

  def _error(self, error: Exception) -> DataError:
    blame = f"{self.path}: dataset {self.dataset!r}"
    return DataError(f"{blame}: datasets cannot read it: {type(error).__name__}: {error}")


class FunctionStream:
  """The records that a function of the user's own gives: "module:function", called without arguments for each pass."""

  kind = "iterable"

  def __init__(self, path: str, dataset: str):
    """Finds the function."""
    self.path, self.dataset, self.num_shards = path, dataset, 1
    module, _, name = path.partition(":")
    try:
      self._function: Callable[[], Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
      raise DataError(
        f"{path}: dataset {dataset!r}: it must be 'module:function', which Python finds: {error}; correct it"
      ) from error

  def records(self, shard: int) -> Iterator[Entry]:
    """Yields what the function gives."""
    del shard
    for number, record in enumerate(self._function(), 1):
      yield Entry(Where(self.dataset, self.path, number), lambda record=record: record)


def refused(path: str, dataset: str, **options: Any) -> Any:
  """Refuses a stream where records are wanted by their numbers.

  Raises:
    DataError: always.
  """
  del options
  raise DataError(
    f"{path}: dataset {dataset!r} is a stream, which is trained on in its order alone: it cannot be counted, looked through, "
    "held out or mixed with data read by number; name it as 'annotation' or 'dataset'"
  )
