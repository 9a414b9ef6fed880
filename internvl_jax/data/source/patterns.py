"""Names of several files at once: `shard-{000..127}.tar`, `part-*.parquet`."""

import fnmatch
import itertools
import os
import re

from internvl_jax.data.source import files
from internvl_jax.data.where import DataError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)\Z")
_MOST = 1_000_000


def is_pattern(path: str) -> bool:
  """Whether a path names several files: it has braces or an asterisk, and is no file itself."""
  return bool(_BRACES.search(path) or "*" in path) and (files.is_remote(path) or not os.path.exists(path))


def expand(path: str) -> list[str]:
  """The files that a path names: of braces all, in their order, of an asterisk those that there are, by name.

      >>> expand("a-{000..002}.{tar,gz}")
      ['a-000.tar', 'a-000.gz', 'a-001.tar', 'a-001.gz', 'a-002.tar', 'a-002.gz']

  Args:
    path: a path or URL, a pattern or not.

  Raises:
    DataError: a range is none, or no file fits.
  """
  if not is_pattern(path):
    return [path]
  found = []
  for each in _braces(path):
    found += _matching(each) if "*" in each else [each]
  if not found:
    raise DataError(f"{path}: no file fits the pattern; correct it")
  return found


def _braces(path: str) -> list[str]:
  mark = _BRACES.search(path)
  if mark is None:
    return [path]
  choices = mark[1].split(",")
  if (ends := _RANGE.match(mark[1])) is not None:
    first, last = int(ends[1]), int(ends[2])
    if not 0 <= last - first < _MOST:
      raise DataError(f"{path}: {mark[0]} is no range from a number to a larger one; correct it")
    choices = [f"{number:0{len(ends[1])}d}" for number in range(first, last + 1)]
  tails = _braces(path[mark.end() :])
  return [f"{path[: mark.start()]}{choice}{tail}" for choice, tail in itertools.product(choices, tails)]


def _matching(pattern: str) -> list[str]:
  """The files of a folder whose names fit; asterisks are in the last part of the path alone."""
  folder, name = files.parent(pattern), files.name(pattern)
  if "*" in folder:
    raise DataError(f"{pattern}: '*' may stand in a file's name, not in its folder's; name one folder")
  try:
    names = files.list_folder(folder or ".")
  except OSError as error:
    raise DataError(f"{pattern}: its folder cannot be read: {error}; correct it") from error
  chosen = sorted(files.name(path) for path in names if fnmatch.fnmatchcase(files.name(path), name))
  return [f"{folder}/{each}" if folder else each for each in chosen]
