"""Where records come from: the kinds of annotation files that there are.

A new kind is a file of this folder, with a class as `interface.Records` asks for, and a line in `KINDS`.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

from internvl_jax.data.source import (
  array,
  files,
  formats,
  hf_dataset,
  jsonl,
  packed,
  patterns,
  several,
  streams,
  table,
  tar,
)
from internvl_jax.data.source.interface import Records
from internvl_jax.data.source.spans import local_file
from internvl_jax.data.where import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
  """A kind of annotation file.

  Attributes:
    open: opens one: `open(path, dataset, cache=folder, root=setting, local=path)`, where errors about media name the
      setting, and `local` is a file of this machine with the content.
    first_records: yields parsed records at the beginning of a local file, without an index and without an error: by
      the media that they name it is told what a dataset's relative root is meant from.
    suffixes: ends of file names, with the dot, by which it is known.
    format: by which it is known from the first bytes of a file of any other name, see `formats.Format.kind`.
    key: under which a meta file names it. Of one key, the first kind is that of all other files.
    is_file: what the meta file names is a file or a folder; else a name that means something elsewhere.
  """

  open: Callable[..., Records]
  first_records: Callable[[str], Iterator[Any]]
  suffixes: tuple[str, ...] = ()
  format: str = ""
  key: str = "annotation"
  is_file: bool = True


def _nothing(path: str) -> Iterator[Any]:
  del path
  return iter(())


def _table(form: str, first_records: Callable[[str], Iterator[Any]] = _nothing) -> Kind:
  return Kind(open=functools.partial(table.ArrowTable, form=form), first_records=first_records, format=form)


KINDS: tuple[Kind, ...] = (
  Kind(open=jsonl.JsonlFile, first_records=jsonl.first_records),
  Kind(open=array.JsonArray, first_records=array.first_records, format="array"),
  Kind(open=tar.TarFile, first_records=tar.first_records, format="tar"),
  _table("parquet", table.parquet_first_records),
  _table("arrow"),
  _table("arrow_stream"),
  Kind(open=hf_dataset.HfDataset, first_records=_nothing, format="saved dataset"),
  Kind(open=hf_dataset.HfDataset, first_records=_nothing, key="dataset", is_file=False),
  *(
    Kind(open=streams.refused, first_records=_nothing, key=key, is_file=key == "stream")
    for key in streams.KEYS
  ),
)


# Records at the beginning of a file in which its form is looked for.
_FORM_SOUGHT = 16


def keys() -> tuple[str, ...]:
  """The keys under which an entry of a meta file may name its records."""
  return tuple(dict.fromkeys(kind.key for kind in KINDS))


def is_file(key: str) -> bool:
  """Whether what a meta file names under a key is a file, or several, or a folder."""
  return next(kind.is_file for kind in KINDS if kind.key == key)


def kind_of(path: str, key: str = "annotation", local: str | None = None) -> Kind:
  """The kind of an annotation file, by the key that names it, its suffix, and its first bytes.

  Args:
    path: as it is named.
    key: under which.
    local: a file of this machine with its content; None: only its name is looked at.
  """
  candidates = [kind for kind in KINDS if kind.key == key]
  suffix = files.suffix(path).lower()
  found = next((kind for kind in candidates if suffix in kind.suffixes), None)
  if found is None and local is not None and (name := _format_of(local)):
    found = next((kind for kind in candidates if kind.format == name), None)
  return found or candidates[0]


def _format_of(local: str) -> str:
  """The kind of a file by its first bytes, or of a folder by its files; "" where that is not known, or is jsonl."""
  if os.path.isdir(local):
    return "saved dataset" if hf_dataset.is_saved(local) else ""
  try:
    with open(local, "rb") as file:
      found = formats.recognized(file)
  except OSError:
    return ""  # Whoever reads it says so.
  return found.kind if found is not None else ""


def first_records(
  path: str, key: str = "annotation", *, cache: str | os.PathLike[str] | None = None
) -> Iterator[Any]:
  """Yields parsed records at the beginning of an annotation file, without an index; see `Kind.first_records`.

  Raises:
    OSError: a remote one cannot be copied.
    DataError: no file fits a pattern, or the cache cannot be written.
  """
  first = patterns.expand(path)[0] if is_file(key) else path
  if not is_file(key) or (key in streams.KEYS and files.is_remote(first)):
    return iter(())  # A stream is not copied.
  local = local_file(first, cache)
  name = _format_of(local)
  if name in packed.READERS:
    local = packed.unpacked(local, name, path, "", cache)
  return kind_of(path, "annotation" if key in streams.KEYS else key, local).first_records(local)


def open_records(
  path: str,
  dataset: str,
  *,
  key: str = "annotation",
  cache: str | os.PathLike[str] | None = None,
  root: str | None = None,
) -> Records:
  """Opens an annotation file, or several that a pattern names.

  Args:
    path: of the file, its URL, or a pattern; see `patterns.expand`.
    dataset: the name that errors use.
    key: under which a meta file names it.
    cache: folder of caches; None keeps nothing but copies of what is remote or packed, in `files.default_cache()`.
    root: the setting that says where its media are, where that is not the meta file.

  Raises:
    DataError: a file is missing, unreadable, of another format, or has no record.
  """
  open_one = functools.partial(_open_one, dataset=dataset, key=key, cache=cache, root=root)
  if not is_file(key) or key in streams.KEYS or not patterns.is_pattern(path):
    return open_one(path)
  found = patterns.expand(path)
  return several.SeveralFiles(path, dataset, [open_one(each) for each in found])


def _open_one(
  path: str, *, dataset: str, key: str, cache: str | os.PathLike[str] | None, root: str | None
) -> Records:
  local = path
  if is_file(key) and key not in streams.KEYS:
    try:
      local = local_file(path, cache)
    except OSError as error:
      blame = f"{path}: dataset {dataset!r}"
      raise DataError(f"{blame}: the annotation file cannot be read: {error}; restore it") from error
    name = _format_of(local)
    if name in packed.READERS:
      local = packed.unpacked(local, name, path, dataset, cache)
  return kind_of(path, key, local).open(path, dataset, cache=cache, root=root, local=local)


def first_read(file: Records) -> Iterator[Any]:
  """Yields the first records of a file that can be read, of which its form is told."""
  for index in range(min(len(file), _FORM_SOUGHT)):
    with contextlib.suppress(DataError):  # It is said when its turn comes.
      yield file.read(index)
