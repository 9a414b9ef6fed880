"""Digests of an annotation file's lines, kept beside its index, so that a changed line is noticed and found.

A file is digested whole when it is new or was touched, and not again: its size, its dates and its inode tell. (Of the
dates, that of the last change of the inode cannot be set back, as the other one is by `cp -p`, rsync and tar.)
"""

import hashlib
import json
import os
import pathlib
import zlib
from typing import NamedTuple

from internvl_jax.data.source.cache import cache_errors_named, whole_file
from internvl_jax.data.source.interface import Records

MOST_BLOCKS = 1024
"""Digests of a file, at most: 16 kB in every checkpoint. Up to so many lines, each has its own."""

_HEX = 16


class Digests(NamedTuple):
  """Digests of the first lines of a file.

  Attributes:
    lines: how many.
    block: lines of a digest; the last one may have fewer.
    text: the digests one after another, 16 hexadecimal digits each.
  """

  lines: int
  block: int
  text: str

  @property
  def summary(self) -> str:
    """One digest of all."""
    return hashlib.blake2b(self.text.encode(), digest_size=_HEX // 2).hexdigest()


def digests_of(file: Records, lines: int, cache: str | os.PathLike[str] | None) -> Digests:
  """The digests of a file's first lines: from the cache, or of the file as it is.

  Args:
    file: the annotation file.
    lines: how many of its lines are in use.
    cache: folder of caches; None reads the file.

  Raises:
    DataError: the file cannot be read, or was changed since its lines were found.
  """
  block = 1
  while block * MOST_BLOCKS < lines:
    block *= 2
  if cache is None:
    return _read(file, lines, block)
  stamp = file.stamp()
  key = hashlib.sha256(f"{stamp} {lines} {block}".encode()).hexdigest()[:16]
  path = pathlib.Path(cache) / f"digests-{key}.json"
  if (text := _known(path)) is not None:
    return Digests(lines, block, text)
  found = _read(file, lines, block)
  if file.stamp() == stamp:  # Else what was read is of no certain time.
    with cache_errors_named(cache):
      path.parent.mkdir(parents=True, exist_ok=True)
      with whole_file(path) as out:
        out.write(json.dumps({"digests": found.text, "checksum": zlib.crc32(found.text.encode())}).encode())
  return found


def first_difference(file: Records, then: Digests, now: Digests) -> range | None:
  """The lines, from 0, among which the first is that is not as it was; None if none is.

  Lines that only one of the two has are none of them, as long as those before are the same.

  Args:
    file: the annotation file as it is now.
    then: what it was.
    now: what it is.
  """
  shared = min(then.lines, now.lines)
  if then == now:
    return None
  # Whole blocks of then, of which all lines are there.
  lines = shared if then.lines == shared else shared // then.block * then.block
  found = now if (now.lines, now.block) == (lines, then.block) else _read(file, lines, then.block)
  for block in range(len(found.text) // _HEX):
    place = slice(block * _HEX, (block + 1) * _HEX)
    if then.text[place] != found.text[place]:
      return range(block * then.block, min((block + 1) * then.block, lines))
  return None


def _read(file: Records, lines: int, block: int) -> Digests:
  file.check_unchanged()
  digests = [file.digest_records(start, min(start + block, lines)) for start in range(0, lines, block)]
  file.check_unchanged()
  file.close()  # A mixture may be of hundreds, and most of their lines are read by workers.
  return Digests(lines, block, "".join(digests))


def _known(path: pathlib.Path) -> str | None:
  """The cached digests; None if there are none, or they are not as they were written."""
  try:
    content = json.loads(path.read_text(encoding="ascii"))
    text = content["digests"]
    return text if zlib.crc32(text.encode()) == content["checksum"] else None
  except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
    return None
