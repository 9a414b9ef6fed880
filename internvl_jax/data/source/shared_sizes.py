"""Sizes measured once for all hosts of a run: each measures its part of what is missing, and the parts are exchanged.

Each host keeps an index of its own (see `sizes`), with the same bytes as if it were alone, unless hosts have one cache
folder: then the first of them writes, and the others read what it has written. Nobody holds the lock of an index while it
waits for other hosts, since that one may wait for another run, which waits for this one.

    look        each opens what it has, and says a digest of it; where all have all of it, that is all
    plan        each says which blocks it has; a block that one has is sent, one that nobody has is measured
    rounds      each measures for some seconds and sends what it has, until nobody has anything left
    unreadable  lines that could not be read are tried again, each by one host, and sent likewise
"""

import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from internvl_jax.data.source import sizes
from internvl_jax.data.source.cache import cache_errors_named, locked
from internvl_jax.data.source.hosts import Hosts, Sign, packed, unpacked
from internvl_jax.data.source.interface import Records
from internvl_jax.data.source.sizes import SIZE, Index, Measure, MeasureLines, Sizes
from internvl_jax.data.source.workers import map_items
from internvl_jax.storage.machine import machine

ROUND_SECONDS = 10.0
"""How long each host measures until it sends: what is lost where a host ends, and how often the others wait for it."""

ROUND_BLOCKS = 512
"""Blocks of a part, at most: 6 MB before they are compressed."""

_ERROR_CHARACTERS = 500


def index_sizes(
  lines: MeasureLines,
  key: Mapping[str, Any],
  cache: str | os.PathLike[str],
  hosts: Hosts,
  *,
  workers: int,
  progress: Callable[[int], Any] = lambda lines: None,
  probes: int = 0,
) -> Sizes:
  """`sizes.index_sizes` of all hosts of a run, which call this at the same time.

  Raises:
    SharedDataError: what befell one of them.
  """
  options: dict[str, Any] = {"workers": workers, "progress": progress, "probes": probes}
  file, measure = lines.file, lines.measure
  if hosts.count == 1:
    return sizes.index_sizes(file, measure, key, cache, **options)
  shared = _Shared(file, measure, key, cache, hosts)
  if not shared.probe(probes):
    # The comparison that follows the opening of the data names what differs.
    logging.info("%s: not the same on all hosts, so each measures all of it", file.path)
    shared.close()
    return sizes.index_sizes(file, measure, key, cache, **options)
  return shared.complete(workers, progress)


def givers(marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Which host measures, or sends, which block.

  Args:
    marks: uint32 [hosts, blocks], checksums of what hosts know; 0 where one does not know a block.

  Returns:
    int64 [blocks], the host, or -1 where all know the same; bool [blocks], whether it is to be measured: where none knows
    it, or not all know the same.
  """
  known = marks > 0
  first = known.argmax(axis=0)
  reference = marks[first, np.arange(marks.shape[1])]
  fresh = ((marks != reference) & known).any(axis=0) | ~known.any(axis=0)
  giver = np.where(known.all(axis=0) & ~fresh, -1, first)
  giver[fresh] = np.arange(fresh.sum()) % len(marks)
  return giver, fresh


class _Shared:
  """The index of a file, as one of several hosts builds it."""

  def __init__(
    self,
    file: Records,
    measure: Measure,
    key: Mapping[str, Any],
    cache: str | os.PathLike[str],
    hosts: Hosts,
  ):
    self._file, self._key, self._cache, self._hosts = file, key, cache, hosts
    self._folder = sizes.index_folder(file, key, pathlib.Path(cache))
    self._lines = MeasureLines(file, measure)
    self._sign: Sign | None = None

  def probe(self, probes: int) -> bool:
    """Opens what there is; returns whether all hosts have the same lines to measure.

    After it are known what is missing here, whether all hosts know the same, who writes here, and how many are on this
    machine.
    """
    said = [json.loads(part) for part in self._hosts.together(lambda: self._say(probes))]
    assert self._sign is not None
    with cache_errors_named(self._cache):
      self._writes = self._sign.first_of([one["sign"] for one in said]) == self._hosts.me
      self._here = sum(one["machine"] == machine() for one in said)
    self._known = len({one["known"] for one in said}) == 1 and not any(one["missing"] for one in said)
    if any(one["replaced"] for one in said):
      self._known, self._missing = False, self._index.all_blocks()
    return len({one["lines"] for one in said}) == 1

  def _say(self, probes: int) -> bytes:
    with cache_errors_named(self._cache):
      self._folder.mkdir(parents=True, exist_ok=True)
      with locked(self._folder):
        self._sign = Sign(self._folder)
        self._index = Index(self._folder, self._file, self._key, writes=False)
        self._missing = self._index.missing()
    if (line := sizes.first_other(self._lines, self._index, self._missing, probes)) is not None:
      logging.info(
        "%s: files were replaced since they were measured; all are measured again", self._file.where(line)
      )
    lines, records = self._index.marks(self._missing)
    # Where the media are may have another name on each host.
    key = {name: value for name, value in self._key.items() if name != "root"}
    about = json.dumps([key, len(self._file), sizes.BLOCK], sort_keys=True).encode()
    said = {
      "lines": hashlib.sha256(about + lines.tobytes()).hexdigest(),
      "known": hashlib.sha256(records.tobytes()).hexdigest(),
      "missing": bool(self._missing),
      "replaced": line is not None,
      "sign": self._sign.name,
      "machine": machine(),
    }
    return json.dumps(said).encode()

  def complete(self, workers: int, progress: Callable[[int], Any]) -> Sizes:
    """Measures and exchanges what is missing on any host; returns all sizes."""
    giver = fresh = np.zeros(-(-len(self._file) // sizes.BLOCK), np.int64)
    if self._known:
      giver, fresh = giver - 1, fresh > 0
    else:
      said = self._hosts.together(lambda: packed(None, self._index.marks(self._missing)[1]))
      giver, fresh = givers(np.stack([np.frombuffer(unpacked(part)[1], np.uint32) for part in said]))
    unreadable = self._known and self._index.unreadable([])
    progress(len(self._file) - self._index.count_lines(np.flatnonzero(giver >= 0).tolist()))
    if unreadable or not self._known:
      self._hosts.together(self._reopen)
      self._measure(giver, fresh, max(1, workers // self._here), progress)
      self._retry(np.flatnonzero(fresh).tolist())
      self._hosts.together(self._finish)
    else:
      self._finish()
    self.close()
    if not self._index.is_written():
      raise self._index.written_by_others()
    return self._index.sizes()

  def close(self) -> None:
    """Takes the sign down."""
    if self._sign is not None:
      self._sign.take_down()

  def _reopen(self) -> bytes:
    """Opens the index to write to it, where that is for this process to do."""
    if self._writes:
      with cache_errors_named(self._cache), locked(self._folder):
        self._index = self._index.for_writing()
    return b""

  def _finish(self) -> bytes:
    if self._writes:
      with cache_errors_named(self._cache):
        self._index.finish()
    return b""

  def _measure(
    self, giver: np.ndarray, fresh: np.ndarray, workers: int, progress: Callable[[int], Any]
  ) -> None:
    """Measures and sends this host's blocks, and takes in those of the others."""
    mine = giver == self._hosts.me
    logging.info(
      "%s: of %d blocks of %d lines, %d are measured by %d processes (%d by this one), and %d sent by those that know them",
      *(self._file.path, len(giver), sizes.BLOCK, fresh.sum(), self._hosts.count, (mine & fresh).sum()),
      ((giver >= 0) & ~fresh).sum(),
    )
    sent, measured = np.flatnonzero(mine & ~fresh).tolist(), np.flatnonzero(mine & fresh).tolist()
    self._hosts.rounds(
      self._parts(sent, measured, workers, progress), lambda parts: self._take(parts, progress)
    )

  def _parts(
    self, sent: list[int], measured: list[int], workers: int, progress: Callable[[int], Any]
  ) -> Iterator[bytes]:
    for i in range(0, len(sent), ROUND_BLOCKS):
      blocks = sent[i : i + ROUND_BLOCKS]
      progress(self._index.count_lines(blocks))
      yield self._part(blocks, {})
    done, texts, start = [], {}, time.monotonic()
    ranges = [
      range(block * sizes.BLOCK, block * sizes.BLOCK + self._index.length(block)) for block in measured
    ]
    for lines, (records, errors) in map_items(self._lines, ranges, workers):
      block = lines.start // sizes.BLOCK
      with cache_errors_named(self._cache):
        self._index.store(block, records, errors)
      progress(len(records))
      done.append(block)
      texts |= errors
      if len(done) == ROUND_BLOCKS or time.monotonic() - start > ROUND_SECONDS:
        yield self._part(done, texts)
        done, texts, start = [], {}, time.monotonic()
    if done:
      yield self._part(done, texts)

  def _part(self, blocks: Sequence[int], errors: Mapping[int, str]) -> bytes:
    return packed([list(blocks), _cut(errors)], *map(self._index.records_of, blocks))

  def _take(self, parts: Iterable[bytes], progress: Callable[[int], Any]) -> None:
    """Stores what others have sent."""
    for part in parts:
      (blocks, errors), content = unpacked(part)
      records = np.split(np.frombuffer(content, SIZE), np.cumsum([*map(self._index.length, blocks)])[:-1])
      with cache_errors_named(self._cache):
        self._index.store_all(zip(blocks, records, strict=True), dict(errors))
      progress(self._index.count_lines(blocks))

  def _retry(self, fresh: list[int]) -> None:
    """Tries lines again that could not be read: the same on all hosts by now, so each tries some for all."""
    lines = self._index.unreadable(fresh)
    if lines:
      self._hosts.rounds(self._retries(lines[self._hosts.me :: self._hosts.count]), self._mend)

  def _retries(self, lines: Sequence[int]) -> Iterator[bytes]:
    done, start = [], time.monotonic()
    for i, line in enumerate(lines):
      records, errors = self._lines(range(line, line + 1))
      done.append([line, records[0].tolist(), errors.get(line, "")[:_ERROR_CHARACTERS]])
      if i == len(lines) - 1 or time.monotonic() - start > ROUND_SECONDS:
        part = packed(done)
        self._mend([part])
        yield part
        done, start = [], time.monotonic()

  def _mend(self, parts: Iterable[bytes]) -> None:
    for part in parts:
      for line, record, error in unpacked(part)[0]:
        with cache_errors_named(self._cache):
          self._index.mend(line, np.array([tuple(record)], SIZE)[0], error or None)


def _cut(errors: Mapping[int, str]) -> list[tuple[int, str]]:
  """Errors as they travel: there may be millions of them."""
  return [(line, text[:_ERROR_CHARACTERS]) for line, text in errors.items()]
