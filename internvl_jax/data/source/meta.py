"""The mixture of datasets that a meta file describes."""

import collections
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from internvl_jax.arguments import MOST_TILES
from internvl_jax.data.source import files, hf_dataset, patterns, records, streams
from internvl_jax.data.source.media import may_exist
from internvl_jax.data.where import DataError
from internvl_jax.errors import did_you_mean, redacted

_TYPES: dict[str, tuple[type, ...]] = {
  "root": (str,),
  "data_augment": (bool,),
  "repeat_time": (int, float),
  "length": (int,),
  "max_dynamic_patch": (int,),
}
# The first so many images and videos decide what a relative root is relative to. One would not do: it may be missing.
_FILES_SOUGHT = 16
_MEDIA_KEYS = ("image", "images", "video", "videos")
_LONGEST_PATH = 4096  # What is longer is a picture in base64.
# Sees each line so often in an epoch, at most: beyond it numbers of samples overflow, and nobody means it.
_MOST_REPEATS = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSpec:
  """One dataset of the mixture.

  Attributes:
    name: its key in the meta file.
    root: folder or URL that image paths start from, "" for the working directory; already looked up.
    annotation: path or URL of the annotation file, or a pattern of several; already looked up.
    key: under which the meta file names it; see `records.Kind`.
    repeat_time: below 1, the share of lines used; else how often every line is seen in an epoch.
    data_augment: re-encode tiles as JPEG at a random quality.
    max_dynamic_patch: tile limit of this dataset's images; None is the run's.
    length: number of lines that the meta file states, for information; None if it states none.
  """

  name: str
  root: str
  annotation: str
  key: str = "annotation"
  repeat_time: float = 1
  data_augment: bool = False
  max_dynamic_patch: int | None = None
  length: int | None = None

  @property
  def repeats(self) -> int:
    """How often each used line is seen in an epoch."""
    return max(1, int(self.repeat_time))

  def lines_used(self, lines: int) -> int:
    """How many of the file's lines, from the first on, are used."""
    return lines if self.repeat_time >= 1 else int(lines * self.repeat_time)


def read_meta(
  path: str | os.PathLike[str], *, cache: str | os.PathLike[str] | None = None
) -> list[DatasetSpec]:
  """Reads and checks a meta file: a JSON object with one entry for each dataset.

      {"vqa": {"root": "images/", "annotation": "vqa.jsonl", "data_augment": false, "repeat_time": 1}}

  A relative `annotation` is looked up from the working directory, then from the meta file's folder. A
  relative `root` (the empty one too) likewise, where "there" means that the dataset's first image or video exists
  under it: so a folder of data can be moved as a whole, and paths written for the reference keep working.

  The meta file, an `annotation` and a `root` may be URLs. What is relative in a remote meta file is meant from its
  folder; no image is looked for on another machine.

  `annotation` may be a pattern (`shard-{000..127}.tar`, `part-*.parquet`) or a list; `root`, which may be a zip, may be left
  out where records bring their images along.

  Args:
    path: of the meta file, or its URL.
    cache: folder of the copies of remote annotation files; None: `files.default_cache()`.

  Raises:
    DataError: the file is missing or is not JSON, or an entry is wrong.
  """
  path = os.fspath(path)
  entries = _read_object(path)
  if not entries:
    raise DataError(f"{path}: the mixture is empty: 0 datasets; add an entry")
  return specs_of(entries, path, cache=cache)


def specs_of(
  entries: Mapping[str, Any], path: str, *, cache: str | os.PathLike[str] | None = None
) -> list[DatasetSpec]:
  """Checks the entries of a meta file, or of what else has such entries.

  Args:
    entries: by the datasets' names.
    path: of the file that they are from, as errors name it; what is relative may be meant from its folder.
    cache: see `read_meta`.

  Raises:
    DataError: an entry is wrong.
  """
  return [_spec(path, name, entry, cache) for name, entry in entries.items()]


def names_streams(path: str) -> bool:
  """Whether an entry of a meta file names a stream, of which nothing is looked up.

  Raises:
    DataError: the meta file is missing or is not JSON.
  """
  entries = _read_object(path).values()
  return any(key in streams.KEYS for entry in entries if isinstance(entry, dict) for key in entry)


def _read_object(path: str) -> dict[str, Any]:
  try:
    text = files.read_bytes(path).decode("utf-8-sig")
  except OSError as error:
    raise DataError(f"{path}: the meta file cannot be read: {error}; check data.meta_path") from error
  except UnicodeDecodeError as error:
    raise DataError(f"{path}: not UTF-8: {error}; save the meta file as UTF-8") from error

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json keeps the last of two equal keys, which would lose a dataset in silence.
    entries = dict(pairs)
    if len(entries) < len(pairs):
      twice = next(key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1)
      raise DataError(f"{path}: key {twice!r} stands twice in one object; rename one of them")
    return entries

  try:
    entries = json.loads(text, object_pairs_hook=unique)
  except json.JSONDecodeError as error:
    raise DataError(f"{path}:{error.lineno}: broken JSON at column {error.colno}: {error.msg}") from error
  except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
    raise DataError(f"{path}: JSON that cannot be read: {error}; correct the meta file") from error
  if not isinstance(entries, dict):
    raise DataError(
      f'{path}: expected a JSON object {{"name": {{"root": ..., "annotation": ...}}}}, got {_json_type(entries)}'
    )
  return entries


def _spec(path: str, name: str, entry: Any, cache: str | os.PathLike[str] | None) -> DatasetSpec:
  """The checked dataset of one entry."""
  blame = f"{path}: dataset {name!r}"
  # It is written to tables, logs and JSON.
  if not name or not name.isprintable():
    raise DataError(f"{blame}: the name must be a text that can be printed; rename it")
  if not isinstance(entry, dict):
    raise DataError(f"{blame}: expected an object, got {_json_type(entry)}")
  key = _key_of(blame, entry)
  values: dict[str, Any] = {
    name: value for name, value in entry.items() if value is not None or name in ("root", key)
  }
  for setting, value in values.items():
    several = setting == key and isinstance(value, list) and value and records.is_file(key)
    for each in value if several else [value]:
      _check_value(blame, setting, each)
  annotation = _find_annotation(path, blame, values.pop(key), key)
  root = _find_root(
    path, blame, values.pop("root", ""), lambda: _first_records(annotation, key, blame, cache)
  )
  return DatasetSpec(name=redacted(name), root=root, annotation=annotation, key=key, **values)


def _key_of(blame: str, entry: dict[str, Any]) -> str:
  """Finds the key under which an entry names its records, after a look at whether all keys are known."""
  sources = records.keys()
  known = (*_TYPES, *sources)
  for key in entry:
    if key not in known:
      raise DataError(f"{blame}: unknown key {key!r}{did_you_mean(key, known)}")
  named = [key for key in sources if key in entry]
  if len(named) > 1:
    raise DataError(f"{blame}: both {named[0]!r} and {named[1]!r} name its records; keep one")
  if not named:
    raise DataError(
      f"{blame}: key {sources[0]!r} is missing; records are named by one of {', '.join(sources)}"
    )
  return named[0]


def _check_value(blame: str, key: str, value: Any) -> None:
  kinds = _TYPES.get(key, (str,))
  # bool is a subclass of int in Python, but `"repeat_time": true` is a mistake.
  if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
    expected = (
      "a number" if float in kinds else {str: "a string", bool: "true or false", int: "an integer"}[kinds[0]]
    )
    raise DataError(f"{blame}: {key!r} must be {expected}, got {json.dumps(value)[:80]}; correct it")
  # The order matters: NaN is in no range, and only what is finite is an integer.
  if key == "repeat_time" and not (0 < value <= _MOST_REPEATS and (value < 1 or value == math.floor(value))):
    raise DataError(
      f"{blame}: repeat_time must be a share between 0 and 1 or a whole number of repeats, got {_short(value)}; round it "
      f"(it may be up to {_MOST_REPEATS})"
    )
  if key == "max_dynamic_patch" and not 1 <= value <= MOST_TILES:
    bound = "1 or more" if value < 1 else f"{MOST_TILES} or less"
    raise DataError(
      f"{blame}: max_dynamic_patch must be {bound}, got {_short(value)}; the reference's runs have up to 12"
    )
  if key == "length" and value < 0:
    raise DataError(
      f"{blame}: length must be 0 or more, got {_short(value)}; give the number of lines or take it out"
    )


def _find_annotation(meta: str, blame: str, annotation: str | list[str], key: str) -> str:
  """The path, URL or pattern of what an entry names its records by; of a list, a pattern of its files."""
  if not records.is_file(key):
    return str(annotation)
  if isinstance(annotation, str):
    return _find_file(meta, blame, annotation)
  found = [file for each in annotation for file in patterns.expand(_find_file(meta, blame, each))]
  if odd := next((file for file in found if set(file) & set("{},")), None):
    raise DataError(f"{blame}: {odd!r} has a comma or a brace, which a list of files may not; rename it")
  return found[0] if len(found) == 1 else f"{{{','.join(found)}}}"


def _find_file(meta: str, blame: str, annotation: str) -> str:
  if files.is_remote(annotation):
    return annotation  # Whoever reads it says if it is not there.
  folder = files.parent(meta)
  if files.is_remote(meta):
    return files.resolve_path(folder, annotation)
  tried = list(dict.fromkeys((pathlib.Path(annotation), pathlib.Path(folder, annotation))))
  for candidate in tried:
    if _is_there(str(candidate)):
      return str(candidate)
  raise DataError(f"{blame}: annotation file not found; tried {' and '.join(str(t) for t in tried)}")


def _is_there(path: str) -> bool:
  """Whether a path is a file, a saved dataset, or a pattern of which the first file is there."""
  if patterns.is_pattern(path):
    try:
      return os.path.isfile(patterns.expand(path)[0])
    except DataError:
      return False
  return os.path.isfile(path) or hf_dataset.is_saved(path)


def _find_root(meta: str, blame: str, root: str, first_records: Callable[[], Iterable[Any]]) -> str:
  """The root under which most of the first files are found, else the one nearest to that."""
  folder = files.parent(meta)
  whole = files.resolve_path(folder, root)
  if files.is_remote(whole):
    try:
      files.check(whole)
    except OSError as error:
      raise DataError(f"{blame}: nothing can be read from root {whole!r}: {error}") from error
    return whole
  if os.path.isabs(root):
    return str(pathlib.Path(root))
  candidates = [pathlib.Path(root), pathlib.Path(folder, root)]
  if first := _first_files(first_records()):

    def found(folder: pathlib.Path) -> int:
      return sum(may_exist(str(folder / file)) for file in first)

    # Stable: the first of equals. What is missing will be named when it is read; a folder that exists makes the
    # better message.
    candidates.sort(key=lambda folder: (-found(folder), not may_exist(f"{folder}/")))
  return "" if candidates[0] == pathlib.Path() else str(candidates[0])


def _first_records(
  annotation: str, key: str, blame: str, cache: str | os.PathLike[str] | None
) -> Iterable[Any]:
  try:
    return records.first_records(annotation, key, cache=cache)
  except OSError as error:
    raise DataError(f"{blame}: the annotation file {annotation} cannot be read: {error}") from error


def _first_files(first_records: Iterable[Any]) -> list[str]:
  """Collects the first paths of images and videos that are meant from the root."""
  found: list[str] = []
  for record in first_records:
    record = record if isinstance(record, dict) else {}
    for paths in map(_paths, _media_values(record)):
      found += [path for path in paths if not files.is_remote(path) and not os.path.isabs(path)]
    if len(found) >= _FILES_SOUGHT:
      break
  return found[:_FILES_SOUGHT]


def _media_values(record: dict[str, Any]) -> Iterator[Any]:
  """Yields what a record says of its images and videos: beside its texts, or in the parts of a message's content."""
  yield from (record.get(key) for key in _MEDIA_KEYS)
  messages = record.get("messages")
  for message in messages if isinstance(messages, list) else ():
    content = message.get("content") if isinstance(message, dict) else None
    for part in content if isinstance(content, list) else ():
      if isinstance(part, dict):
        yield from (part.get(key) for key in (*_MEDIA_KEYS, "path"))


def _paths(value: Any) -> Iterator[str]:
  for path in value if isinstance(value, list) else [value]:
    path = path.get("path") if isinstance(path, dict) and "bytes" not in path else path
    if isinstance(path, str) and path and len(path) < _LONGEST_PATH:
      yield path


def _short(value: float) -> str:
  text = str(value)
  return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} digits)"


def _json_type(value: Any) -> str:
  names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
  return names.get(type(value), "a number")
