"""Pieces of the over-long lines of a file under the limits of a run, kept beside the sizes.

Only lines that exceed the limits are laid out again, so that a change of data.max_seq_length does not cost a pass
over all data.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from internvl_jax.data.sample.fitting import Limits
from internvl_jax.data.source.cache import cache_errors_named, locked, whole_file
from internvl_jax.data.source.hosts import ALONE, Hosts, packed, unpacked
from internvl_jax.data.source.interface import Records
from internvl_jax.data.source.sizes import Sizes
from internvl_jax.data.source.workers import map_items
from internvl_jax.data.where import DataError, OverLengthError, UnsupervisedError

UNREADABLE, OVER_LONG, UNSUPERVISED = 0, -1, -2
"""In place of the tokens of a sample that is lost: it cannot be read, cannot be shortened, or would teach nothing."""

# Lines that a worker lays out at a time.
_GROUP = 256

PiecesOf = Callable[[Records, int], Sequence[tuple[int, int]]]
"""Tokens and tiles of the pieces of a line; raises DataError. It goes to worker processes."""


@dataclasses.dataclass(frozen=True)
class Pieces:
  """The pieces of k over-long lines.

  Attributes:
    lines: int64 [k], ascending.
    counts: int64 [k], pieces of each; 0 for a line that is lost.
    losses: int64 [k], why a line is lost (UNREADABLE, OVER_LONG or UNSUPERVISED).
    sizes: int64 [sum of counts, 2], tokens and tiles.
    errors: why a line is lost, by its index.
  """

  lines: np.ndarray
  counts: np.ndarray
  losses: np.ndarray
  sizes: np.ndarray
  errors: dict[int, str]

  def find(self, lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of these lines are over-long, bool [n], and for those (in order) their places in `lines`."""
    places = np.searchsorted(self.lines, lines)
    found = places < len(self.lines)
    found[found] = self.lines[places[found]] == lines[found]
    return found, places[found]

  def firsts(self) -> np.ndarray:
    """int64 [k], the row of `sizes` at which each line's pieces begin."""
    return np.cumsum(self.counts) - self.counts


def over_long(records: np.ndarray, limits: Limits) -> np.ndarray:
  """Computes bool [lines]: which sizes (sizes.SIZE) exceed the limits, or may: of a pair, the two together are known."""
  exceeds = records["tokens"] > limits.tokens
  if limits.row_tiles is not None:
    exceeds |= records["tiles"] > limits.row_tiles
  return exceeds


def index_pieces(
  file: Records,
  sizes: Sizes,
  limits: Limits,
  pieces_of: PiecesOf,
  *,
  workers: int,
  progress: Callable[[int], Any] = lambda lines: None,
  hosts: Hosts = ALONE,
) -> Pieces:
  """The pieces of a file's over-long lines: those that were kept for these limits, or found anew.

  Args:
    file: the annotation file.
    sizes: of all its lines.
    limits: of samples and rows.
    pieces_of: lays a line out.
    workers: processes that do so.
    progress: told how many lines are done, as they are.
    hosts: the processes that call this at the same time; each lays a part of the lines out.
  """
  lines = np.flatnonzero(over_long(sizes.records, limits))
  path = sizes.folder / f"pieces-{_key(sizes, lines, limits)}.npz"
  groups = [lines[i : i + _GROUP] for i in range(0, len(lines), _GROUP)]
  with contextlib.ExitStack() as stack:
    shares = hosts.count > 1
    if not shares:  # Nobody waits for others with a lock in hand.
      stack.enter_context(locked(sizes.folder))
    kept = _kept(path)
    if shares:
      said = set(hosts.together(f"{path.stem[-16:]} {kept is not None}".encode))
      shares = len({part.split()[0] for part in said}) == 1
      # Where one lacks them, all of them lay out.
      kept = kept if len(said) == 1 or not shares else None
    if kept is not None:
      progress(len(lines))
      return kept
    lay_out = _LayOut(file, pieces_of)
    found, lost = _laid_out(lay_out, groups, workers, progress, hosts if shares else ALONE)
    pieces = _pieces(lines, found, lost)
    # A file that could not be opened may be there the next time.
    if all(why != UNREADABLE for why, _ in lost.values()):
      _save(path, pieces)
  return pieces


_Found = dict[int, Sequence[tuple[int, int]]]
_Lost = dict[int, tuple[int, str]]


def _laid_out(
  lay_out: "_LayOut", groups: Sequence[np.ndarray], workers: int, progress: Callable[[int], Any], hosts: Hosts
) -> tuple[_Found, _Lost]:
  """Lays groups of lines out, each by one host: the pieces of lines, and why those are lost that are."""
  found: _Found = {}
  lost: _Lost = {}

  def parts() -> Iterator[bytes]:
    for group, (laid_out, left_out) in map_items(lay_out, groups[hosts.me :: hosts.count], workers):
      found.update(laid_out)
      lost.update(left_out)
      progress(len(group))
      if hosts.count > 1:
        yield packed([[*laid_out.items()], [*left_out.items()]])

  def take(theirs: Sequence[bytes]) -> None:
    for part in theirs:
      laid_out, left_out = unpacked(part)[0]
      found.update(laid_out)
      lost.update((line, tuple(loss)) for line, loss in left_out)
      progress(len(laid_out) + len(left_out))

  hosts.rounds(parts(), take)
  return found, lost


def _pieces(lines: np.ndarray, found: _Found, lost: _Lost) -> Pieces:
  every = [size for line in lines.tolist() for size in found.get(line, ())]
  return Pieces(
    lines=lines,
    counts=np.array([len(found.get(line, ())) for line in lines.tolist()], np.int64),
    losses=np.array([lost.get(line, (UNREADABLE,))[0] for line in lines.tolist()], np.int64),
    sizes=np.array(every, np.int64).reshape(-1, 2),
    errors={line: message for line, (_, message) in lost.items()},
  )


@dataclasses.dataclass(frozen=True)
class _LayOut:
  """Finds the pieces of a group of lines, and of those that are lost the kind of loss and the reason."""

  file: Records
  pieces_of: PiecesOf

  def __call__(self, lines: np.ndarray) -> tuple[dict[int, Any], dict[int, tuple[int, str]]]:
    found, lost = {}, {}
    for line in lines.tolist():
      try:
        found[line] = self.pieces_of(self.file, line)
      except DataError as error:
        lost[line] = kind_of_loss(error), str(error)
    return found, lost


def kind_of_loss(error: DataError) -> int:
  """The kind of loss of an error: UNREADABLE, OVER_LONG or UNSUPERVISED."""
  if isinstance(error, OverLengthError):
    return OVER_LONG
  return UNSUPERVISED if isinstance(error, UnsupervisedError) else UNREADABLE


def _key(sizes: Sizes, lines: np.ndarray, limits: Limits) -> str:
  """A hash of the limits, of which lines exceed them, and of the text of the file."""
  blocks = np.load(sizes.folder / "blocks.npy")
  text = json.dumps([*limits, zlib.crc32(lines.tobytes()), zlib.crc32(blocks.tobytes())])
  return hashlib.sha256(text.encode()).hexdigest()[:16]


_ARRAYS = ("lines", "counts", "losses", "sizes")


def _save(path: pathlib.Path, pieces: Pieces) -> None:
  errors = np.frombuffer(json.dumps(pieces.errors).encode(), np.uint8)
  arrays = {name: getattr(pieces, name) for name in _ARRAYS}
  with cache_errors_named(path.parent), whole_file(path) as file:
    np.savez(file, errors=errors, **arrays)


def _kept(path: pathlib.Path) -> Pieces | None:
  """The pieces that were kept; None if they are not there, or damaged."""
  try:
    with np.load(path) as kept:
      errors = json.loads(kept["errors"].tobytes())
      arrays = {name: kept[name] for name in _ARRAYS}
      return Pieces(**arrays, errors={int(line): message for line, message in errors.items()})
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
    return None
