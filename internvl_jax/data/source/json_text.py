"""JSON of a record: parsed strictly, with one line for what is wrong about it."""

import json
from typing import Any

from internvl_jax.data.where import Where


class _SaidTwiceError(Exception):
  """A name is twice in an object; json would keep the last value and lose the first in silence."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  entries = dict(pairs)
  if len(entries) < len(pairs):
    found: dict[str, Any] = {}
    for key, value in pairs:
      if found.setdefault(key, value) != value:
        raise _SaidTwiceError(key)
  return entries


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def parse(text: bytes, where: Where, *, record: str = "line") -> Any:
  """Parses the JSON of a record.

  Args:
    text: in UTF-8, with or without a byte order mark.
    where: the record, for errors.
    record: what a record is called there.

  Raises:
    DataError: it is not JSON, or says two things under one name.
  """
  try:
    return _DECODER.decode(text.decode("utf-8-sig"))
  except UnicodeDecodeError as error:
    raise where.error(f"not UTF-8: {error}; save the file as UTF-8") from error
  except json.JSONDecodeError as error:
    raise where.error(
      f"broken JSON at column {error.colno}: {error.msg}; correct the {record} or delete it"
    ) from error
  except _SaidTwiceError as error:
    raise where.error(
      f"key {error.args[0]!r} stands twice in one object, with different values; keep one"
    ) from error
  except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
    raise where.error(f"JSON that cannot be read: {error}; delete the {record}") from error
