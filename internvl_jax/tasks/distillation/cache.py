"""A teacher's log-probabilities on disk, written by hosts side by side and read by all, sample by sample.

    <folder>/key.json                    what the numbers depend on
             part-00000000-0000.npy      token_dtype [targets]: what one host has asked the teacher, from step 0 on
             part-00000000-0000.of.npy   whose targets these are, in their order
             ...
             progress.json               how far the teacher has come; gone when it is through
             samples.npy                 SAMPLE [samples of the mixture]: where each is; parts.json: the parts' names

Parts are mapped into memory; those of a bucket are copied to this machine first.
"""

import dataclasses
import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Shaped

from internvl_jax.errors import UserError
from internvl_jax.outputs import write_json
from internvl_jax.parallel import distributed
from internvl_jax.storage.paths import AnyPath, write_whole
from internvl_jax.storage.snapshots import default_cache
from internvl_jax.tasks.distillation.data import SampleTokens
from internvl_jax.tasks.precomputed import KeyedFolder

SAMPLE = np.dtype([("part", "<i4"), ("start", "<i8"), ("tokens", "<i4"), ("content", "<u4")])
"""Where a sample's targets are: part, first of its targets there, how many (-1: they are not known), and their checksum."""

_OF_PART = np.dtype([("index", "<i8"), ("tokens", "<i4"), ("content", "<u4")])

_INDEX, _PARTS, _PROGRESS = "samples.npy", "parts.json", "progress.json"


def token_dtype(top_k: int) -> np.dtype:
  """What is kept of a target: 6 K + 4 bytes.

  A log-probability in float16 is off by at most 1 / 2048 of itself, less than a model in bfloat16 is.
  """
  return np.dtype([("ids", "<i4", (top_k,)), ("logps", "<f2", (top_k,)), ("tail", "<f4")])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
  """How far the teacher has come.

  Attributes:
    steps: batches that it has been asked.
    firsts: the first step of each part.
    feeders: hosts that wrote parts.
    loader: the loader's state after those steps.
  """

  steps: int
  firsts: list[int]
  feeders: int
  loader: dict[str, Any]


class TeacherLogProbs:
  """The teacher's likeliest next tokens, in a folder that all hosts see, or in a bucket."""

  def __init__(self, kept: KeyedFolder, top_k: int, cache_dir: str | None):
    """Names the folder; nothing is read before `open`.

    Args:
      kept: the folder, and how it is called.
      top_k: K.
      cache_dir: folder of this machine where copies of a bucket's files go; None: in the user's cache folder.
    """
    self._kept, self._dtype = kept, token_dtype(top_k)
    self._copies = Path(cache_dir or default_cache()) / "teacher"
    self._index: np.ndarray | None = None
    self._names: list[str] = []
    self._parts: dict[int, np.ndarray] = {}

  @property
  def folder(self) -> AnyPath:
    """The folder."""
    return self._kept.folder

  # --- Reading ----------------------------------------------------------------------------------------------

  def __call__(self, samples: Sequence[SampleTokens]) -> Shaped[np.ndarray, " tokens"]:
    """The targets of these samples, `token_dtype` [targets of all, in order].

    Raises:
      UserError: the teacher was not asked about one, or saw other tokens of it.
    """
    return np.concatenate([np.zeros(0, self._dtype), *map(self._find, samples)])

  def _find(self, sample: SampleTokens) -> np.ndarray:
    assert self._index is not None, "open() comes first"
    place = self._index[sample.number]
    if place["tokens"] < 0:
      raise UserError(
        f"{self.folder}: the teacher knows nothing of sample {sample.number} of the mixture: it could not be read when the "
        f"teacher was asked; {self._kept.anew}"
      )
    if (place["tokens"], place["content"]) != (sample.tokens, sample.content):
      raise UserError(
        f"{self.folder}: sample {sample.number} of the mixture had {place['tokens']} supervised tokens when the teacher was "
        f"asked and has {sample.tokens} others now: its image was replaced since; {self._kept.anew}"
      )
    if not sample.tokens:
      return np.zeros(0, self._dtype)
    return self._part(int(place["part"]))[place["start"] : place["start"] + sample.tokens]

  def _part(self, number: int) -> np.ndarray:
    if number not in self._parts:
      self._parts[number] = self._load(self._names[number], self._dtype)
    return self._parts[number]

  def _load(self, name: str, dtype: np.dtype) -> np.ndarray:
    """An array of the folder, mapped into memory.

    Raises:
      UserError: it is not there, damaged, or of another kind.
    """
    path = self.folder / name
    try:
      found = np.load(self._local(path), mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
      raise UserError(f"{path}: damaged or missing ({error}); {self._kept.anew}") from None
    if found.dtype != dtype or found.ndim != 1:
      raise UserError(f"{path}: has other numbers than these; {self._kept.anew}")
    return found

  def _local(self, path: AnyPath) -> Path:
    """The file on this machine."""
    if isinstance(path, Path):
      return path
    # What lies under one name in a bucket may be written anew: its store knows that.
    known = f"{path} {path.stat().checksum}"
    copy = self._copies / f"{hashlib.sha256(known.encode()).hexdigest()[:24]}.npy"
    if not copy.exists():
      copy.parent.mkdir(parents=True, exist_ok=True)
      write_whole(copy, path.read_bytes())
    return copy

  def is_complete(self, key: dict[str, Any]) -> bool:
    """Whether all is there that the teacher was to be asked; a call that all processes make.

    Raises:
      UserError: what is there, whole or not, is of another teacher, other data or other settings.
    """
    if not self._kept.has():
      return False
    self._kept.check_seen()
    self._kept.check(key)
    return self._kept.has(_PARTS)

  def open(self, samples: int) -> None:
    """Opens what is complete.

    Raises:
      UserError: it is damaged, or this host does not see it.
    """
    self._kept.check_seen(_PARTS)
    path = self.folder / _PARTS
    try:
      self._names = list(json.loads(path.read_text(encoding="utf-8"))["parts"])
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(f"{path}: damaged ({error}); {self._kept.anew}") from None
    self._index = self._load(_INDEX, SAMPLE)
    if len(self._index) != samples:
      raise UserError(
        f"{self.folder / _INDEX}: has {len(self._index)} samples, expected {samples}; {self._kept.anew}"
      )
    known = self._index["tokens"] >= 0
    logging.info(
      "The teacher's log-probabilities of %d tokens in %d samples: those in %s",
      *(int(self._index["tokens"][known].sum()), int(known.sum()), self.folder),
    )

  # --- Writing ----------------------------------------------------------------------------------------------

  def begin(self, key: dict[str, Any]) -> None:
    """Begins anew: parts that are there are deleted; for the first process."""
    self.folder.mkdir(parents=True, exist_ok=True)
    for path in self.folder.glob("part-*.npy"):
      path.unlink()
    (self.folder / _PROGRESS).unlink(missing_ok=True)
    self._kept.write_key(key)

  def progress(self) -> Progress | None:
    """How far the teacher has come, as the first process knows it; a call that all processes make."""
    path, text = self.folder / _PROGRESS, b""
    if distributed.is_first() and path.exists():
      text = path.read_bytes()
    text = distributed.all_gather_bytes(text)[0]
    try:
      return Progress(**json.loads(text)) if text else None
    except (ValueError, TypeError) as error:
      raise UserError(f"{path}: damaged ({error}); {self._kept.anew}") from None

  def save_progress(self, progress: Progress) -> None:
    """Writes how far it has come; for the first process, when all have written their parts."""
    write_json(self.folder / _PROGRESS, dataclasses.asdict(progress))

  def write(
    self,
    first: int,
    feeder: int,
    samples: Sequence[SampleTokens],
    tokens: Sequence[Shaped[np.ndarray, " _"]],
  ) -> int:
    """Writes a part: what a host has asked the teacher since step `first`; returns its bytes.

    Raises:
      UserError: it does not fit on the disk.
    """
    name = _part_name(first, feeder)
    of_samples = np.array([tuple(sample) for sample in samples], _OF_PART)
    values = np.concatenate([np.zeros(0, self._dtype), *tokens])
    assert len(values) == of_samples["tokens"].sum()
    self._save(f"{name}.of.npy", of_samples)
    self._save(f"{name}.npy", values)
    return values.nbytes

  def _save(self, name: str, array: np.ndarray) -> None:
    np.save(content := io.BytesIO(), array)
    try:
      write_whole(self.folder / name, content.getvalue())
    except OSError as error:
      raise UserError(
        f"{self.folder / name}: cannot be written ({error}); make room, or name another folder ({self._kept.setting})"
      ) from None

  def check_room(self, written: int, left: float) -> None:
    """Says how much is still to be written, once some is; for the first process.

    Args:
      written: bytes so far, of all hosts.
      left: what is still to come relative to it.

    Raises:
      UserError: the disk has no room for it.
    """
    more = written * left
    logging.info("The teacher's log-probabilities take about %.2f GiB in all", (written + more) / 2**30)
    if isinstance(self.folder, Path) and more > (free := shutil.disk_usage(self.folder).free):
      raise UserError(
        f"{self.folder}: {more / 2**30:.1f} GiB of the teacher's log-probabilities are still to come, and {free / 2**30:.1f} "
        f"GiB are free; name another folder ({self._kept.setting}), or lower distillation.top_k"
      )

  def finish(self, progress: Progress, samples: int) -> None:
    """Makes the index of all parts; for the first process, when all have written theirs."""
    names = [_part_name(first, feeder) for first in progress.firsts for feeder in range(progress.feeders)]
    index = np.zeros(samples, SAMPLE)
    index["tokens"] = -1
    for number, name in enumerate(names):
      found = self._load(f"{name}.of.npy", _OF_PART)
      ends = found["tokens"].cumsum(dtype=np.int64)
      entry = np.zeros(len(found), SAMPLE)
      entry["part"], entry["start"] = number, ends - found["tokens"]
      entry["tokens"], entry["content"] = found["tokens"], found["content"]
      index[found["index"]] = entry
    self._save(_INDEX, index)
    write_json(self.folder / _PARTS, {"parts": [f"{name}.npy" for name in names]})
    (self.folder / _PROGRESS).unlink(missing_ok=True)


def _part_name(first: int, feeder: int) -> str:
  return f"part-{first:08d}-{feeder:04d}"
