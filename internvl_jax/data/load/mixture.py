"""The samples of all datasets by number: how long each is, and decoded."""

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm

from internvl_jax.arguments import DataTrainingArguments
from internvl_jax.data.sample import compiled, images, video
from internvl_jax.data.sample.conversations import CONVERSATION_LINES
from internvl_jax.data.sample.fitting import Limits, Policy
from internvl_jax.data.sample.lines import LineSchema
from internvl_jax.data.sample.long_samples import Pieces, index_pieces, over_long
from internvl_jax.data.sample.pool import TilePool
from internvl_jax.data.sample.sample import Sample, SampleMaker, max_grid_tiles
from internvl_jax.data.sample.templates import Template
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.data.source import files, sizes
from internvl_jax.data.source.hosts import ALONE, Hosts
from internvl_jax.data.source.interface import Records
from internvl_jax.data.source.meta import DatasetSpec, read_meta
from internvl_jax.data.source.records import first_read, open_records
from internvl_jax.data.source.shared_sizes import index_sizes
from internvl_jax.data.source.sizes import MeasureLines
from internvl_jax.data.where import DataError, Where

# Lines of a dataset that are measured again at every start, in a tenth of a second: where a folder of images was made
# smaller, or replaced otherwise, they tell. Millions cannot be looked at each time.
_PROBES = 32

# Changes whenever the same line would get other sizes.
_MEASURE_VERSION = 3


class Dataset:
  """The samples of one dataset, by number: the lines in use, then the second, third, ... pieces of those that are split.

  Which lines are split is known once `index` was called; before it, every line is one sample.

  Attributes:
    spec: what the meta file says about it.
    file: its annotation file.
    lines: how many of the file's lines are in use.
    maker: makes its samples.
  """

  def __init__(self, spec: DatasetSpec, file: Records, maker: SampleMaker, number: int, seed: int):
    """Makes the samples of a dataset.

    Args:
      spec: what the meta file says about it.
      file: its annotation file.
      maker: makes its samples.
      number: of the dataset in the mixture.
      seed: of the frames drawn from videos.
    """
    self.spec, self.file, self.lines = spec, file, spec.lines_used(len(file))
    self.maker, self._number, self._seed = maker, number, seed
    self._sizes: sizes.Sizes | None = None
    self._pieces: Pieces | None = None
    self._more = np.zeros(
      (3, 0), np.int64
    )  # Of every further piece: its line, its number, its place in the sizes.

  @property
  def num_samples(self) -> int:
    """Samples of one pass."""
    return self.lines + self._more.shape[1]

  def locate(self, sample: int) -> tuple[int, int]:
    """Finds (index of the line, piece) of a sample."""
    if sample < self.lines:
      return sample, 0
    line, piece, _ = self._more[:, sample - self.lines].tolist()
    return line, piece

  def make(
    self, sample: int, rng: np.random.Generator | None, index: int, pool: TilePool | None = None
  ) -> Sample:
    """Makes a sample; see `SampleMaker.make`.

    Args:
      sample: its number in the dataset.
      rng: of its augmentation and frames.
      index: its number in the mixture.
      pool: what its tiles are written to.
    """
    line, piece = self.locate(sample)
    made = self.maker.make(
      self.file.read(line), self.file.where(line), rng, frames=self._frames(line), piece=piece, pool=pool
    )
    return dataclasses.replace(made, dataset=self._number, index=index)

  def index(self, cache: str | os.PathLike[str], *, workers: int, quiet: bool, hosts: Hosts = ALONE) -> None:
    """Finds out how long every sample is, as far as the cache does not know it; see `Mixture.index_sizes`."""
    with _bar(len(self.file), f"sizes of {self.spec.name}", quiet) as bar:
      self._sizes = index_sizes(
        MeasureLines(self.file, self._measure),
        self.key(),
        cache,
        hosts,
        workers=workers,
        progress=bar.update,
        # Looking at files on another machine would cost every start a request each.
        probes=0 if files.is_remote(self.spec.root) else _PROBES,
      )
    long = int(over_long(self._sizes.records, self.limits).sum())
    with _bar(long, f"long lines of {self.spec.name}", quiet or not long) as bar:
      self._pieces = index_pieces(
        self.file,
        self._sizes,
        self.limits,
        self._pieces_of,
        workers=workers,
        progress=bar.update,
        hosts=hosts,
      )
    used = self._pieces.lines < self.lines
    further = np.maximum(self._pieces.counts - 1, 0) * used
    owners = np.repeat(np.arange(len(used)), further)
    numbers = np.arange(len(owners)) - np.repeat(np.cumsum(further) - further, further) + 1
    self._more = np.stack(
      [self._pieces.lines[owners], numbers, self._pieces.firsts()[owners] + numbers]
    ).astype(np.int64)

  def size_now(self, sample: int) -> tuple[int, int]:
    """Measures tokens and tiles of a sample as if it could be of any length; (0, 0) where it cannot be read."""
    try:
      size = self._measure(self.file, self.locate(sample)[0])
    except DataError:
      return 0, 0
    return size.tokens, size.tiles

  @property
  def template(self) -> Template:
    """How its turns are written."""
    return self.maker.tokenizer.template

  @property
  def limits(self) -> Limits:
    """How long its samples may be."""
    return self.maker.limits

  @property
  def records(self) -> np.ndarray:
    """Sizes of the lines in use, as they would be without limits: sizes.SIZE [lines]."""
    assert self._sizes is not None, "index() comes first"
    return self._sizes.records[: self.lines]

  @property
  def pieces(self) -> Pieces:
    """The pieces of the file's over-long lines."""
    assert self._pieces is not None, "index() comes first"
    return self._pieces

  def sizes_of(self, samples: np.ndarray) -> np.ndarray:
    """Computes int64 [n, 2], tokens (or pieces.UNREADABLE, ...) and tiles of samples."""
    out = np.zeros((len(samples), 2), np.int64)
    first = samples < self.lines
    records = self.records[samples[first]]
    whole = np.stack([records["tokens"], records["tiles"]], axis=1).astype(np.int64)
    long, places = self.pieces.find(samples[first])
    shortened = np.stack([self.pieces.losses[places], np.zeros_like(places)], axis=1)
    kept = self.pieces.counts[places] > 0
    shortened[kept] = self.pieces.sizes[self.pieces.firsts()[places[kept]]]
    whole[long] = shortened
    out[first] = whole
    out[~first] = self.pieces.sizes[self._more[2, samples[~first] - self.lines]]
    return out

  def index_of(self, line: int) -> str:
    """The folder of the index that knows the size of a line's media; "" where the line itself states it."""
    if self._sizes is None or self.maker.states_sizes(self.file.read(line), self.file.where(line)):
      return ""
    return str(self._sizes.folder)

  def why_lost(self, sample: int) -> str:
    """Why a sample without tokens has none."""
    assert self._sizes is not None, "index() comes first"
    line, _ = self.locate(sample)
    return self._sizes.errors.get(line) or self.pieces.errors[line]

  def first_video(self) -> Where | None:
    """The first line in use that has a video; None if there is none."""
    for line in self.file.containing(b'"video'):
      if line >= self.lines:
        break
      with contextlib.suppress(DataError):  # what is wrong about a line is said when it becomes a sample
        if self.maker.has_video(self.file.read(line), self.file.where(line)):
          return self.file.where(line)
    return None

  def has_images(self) -> bool:
    """Whether a line in use has an image or a video, or looks so where sizes are not indexed: no line is parsed."""
    if self._sizes is not None:
      return bool((self.records["tiles"] > 0).any())
    return any(line < self.lines for text in (b'"image', b'"video') for line in self.file.containing(text))

  def key(self) -> dict[str, Any]:
    """All that sizes depend on beside the lines, as JSON values."""
    maker, data = self.maker, self.maker.data
    settings = ("force_image_size", "dynamic_image_size", "use_thumbnail", "min_dynamic_patch", "conv_style")
    return {
      "version": _MEASURE_VERSION,
      "tokenizer": maker.tokenizer.fingerprint(),
      "tokens_per_tile": maker.tokens_per_tile,
      "root": files.identity(self.spec.root),
      "max_dynamic_patch": max_grid_tiles(self.spec, data),
      "frames": [data.min_num_frame, data.max_num_frame, self._seed, self._number],
      **{name: getattr(data, name) for name in settings},
      **maker.lines.facts,
    }

  def form(self) -> str:
    """The kind of file that its records are in, and the form in which they are written."""
    return f"{self.file.kind}, {self.maker.lines.form_name}"

  def _frames(self, line: int) -> int:
    """How many frames a line's video gives: the same in every epoch, so that its size is known."""
    data = self.maker.data
    rng = np.random.default_rng((self._seed, self._number, line))
    return video.num_wanted(rng, data.min_num_frame, data.max_num_frame)

  def _measure(self, file: Records, line: int) -> sizes.Size:
    return self.maker.measure(file.read(line), file.where(line), self._frames(line))

  def _pieces_of(self, file: Records, line: int) -> Sequence[tuple[int, int]]:
    return self.maker.pieces(file.read(line), file.where(line), self._frames(line))


def _bar(total: int, what: str, quiet: bool) -> Any:
  return tqdm.tqdm(total=total, desc=what, unit="line", disable=quiet)


class Mixture:
  """The datasets one after another, each as often as its `repeat_time` says; samples decoded by number.

  Picklable: worker processes get a copy.

  Attributes:
    data: the settings.
    seed: of the augmentation and of the frames drawn from videos.
    lines: what kind of line they have.
    datasets: in the order of the meta file.
    sizes: int64 [datasets], samples an epoch, repeats included.
    num_samples: of an epoch.
  """

  def __init__(
    self,
    data: DataTrainingArguments,
    tokenizer: ChatTokenizer,
    *,
    tokens_per_tile: int,
    seed: int,
    policy: Policy = "truncate",
    cache: str | os.PathLike[str] | None = None,
    lines: LineSchema = CONVERSATION_LINES,
  ):
    """Reads the meta file and finds the lines of every annotation file.

    Args:
      data: the settings; `meta_path` says which data.
      tokenizer: of the conversations.
      tokens_per_tile: image tokens of one tile.
      seed: of the augmentation and of the frames drawn from videos.
      policy: what is done about over-long samples.
      cache: folder of the lines' index; None keeps none (of remote annotation files, a copy).
      lines: what kind of line the files have.

    Raises:
      DataError: the meta file, an annotation file or a setting is wrong.
    """
    if data.meta_path is None:
      raise DataError("data.meta_path is not set; give the JSON file that lists the datasets")
    images.normalization(data.normalize_type)  # an unknown name fails here, not at the first padded image
    self.data, self.lines, self.seed = data, lines, seed
    self._tokens_per_tile = tokens_per_tile
    limits = limits_of(data, policy)
    self.datasets = []
    for number, spec in enumerate(read_meta(data.meta_path, cache=cache)):
      file = open_records(spec.annotation, spec.name, key=spec.key, cache=cache)
      maker = SampleMaker(
        spec=spec,
        data=data,
        tokenizer=tokenizer,
        tokens_per_tile=tokens_per_tile,
        limits=limits,
        lines=self.lines.recognized(first_read(file)),
      )
      self.datasets.append(_checked(Dataset(spec, file, maker, number, seed), data))
    self._count()

  def _count(self) -> None:
    counts = [dataset.num_samples * dataset.spec.repeats for dataset in self.datasets]
    self.sizes = np.array(counts, np.int64)
    self._ends = np.cumsum(self.sizes)
    self.num_samples = int(self._ends[-1])

  @property
  def names(self) -> list[str]:
    """The datasets' names."""
    return [dataset.spec.name for dataset in self.datasets]

  def max_tiles(self) -> int:
    """The most tiles that one sample may have: images are never cut, so their tokens must fit a row."""
    return self.data.max_seq_length // self._tokens_per_tile

  def dataset_of(self, index: int) -> int:
    """The number of the dataset that a sample of the mixture is of."""
    return int(np.searchsorted(self._ends, index, side="right"))

  def _locate(self, index: int) -> tuple[Dataset, int]:
    """The dataset of a sample of the mixture, and its number there."""
    number = self.dataset_of(index)
    first = int(self._ends[number] - self.sizes[number])
    return self.datasets[number], (index - first) % self.datasets[number].num_samples

  def where(self, index: int) -> Where:
    """The line that a sample of the mixture comes from."""
    dataset, sample = self._locate(index)
    return dataset.file.where(dataset.locate(sample)[0])

  def record(self, index: int) -> tuple[Any, dict[str, Any]]:
    """The parsed line that a sample of the mixture comes from, and what of it is read."""
    dataset, sample = self._locate(index)
    line = dataset.locate(sample)[0]
    record, where = dataset.file.read(line), dataset.file.where(line)
    return record, dataset.maker.lines.plain(record, where)

  def decode(self, epoch: int, index: int, pool: TilePool | None = None) -> Sample:
    """A sample of the mixture. Augmentation and a video's frames depend on seed, epoch and index alone.

    Args:
      epoch: from 0.
      index: of the sample in the mixture.
      pool: what its tiles are written to; None: memory of their own.

    Raises:
      DataError: the sample cannot be made.
    """
    dataset, sample = self._locate(index)
    return dataset.make(sample, np.random.default_rng((self.seed, epoch, index)), index, pool)

  def index_sizes(
    self, cache: str | os.PathLike[str], *, workers: int, quiet: bool, hosts: Hosts = ALONE
  ) -> None:
    """Measures all samples, as far as the cache does not know their sizes; `size_of` then tells them.

    In packed rows this decides which samples are split, and so how many there are.

    Args:
      cache: folder of the index.
      workers: processes that measure.
      quiet: show no progress.
      hosts: the processes that call this at the same time; each measures a part.
    """
    for dataset in self.datasets:
      dataset.index(cache, workers=workers, quiet=quiet, hosts=hosts)
    self._count()

  def size_of(self, indices: np.ndarray) -> np.ndarray:
    """Computes int64 [n, 2], tokens (or pieces.UNREADABLE, ...) and tiles of samples of the mixture."""
    out = np.zeros((len(indices), 2), np.int64)
    numbers = np.searchsorted(self._ends, indices, side="right")
    for number in np.unique(numbers).tolist():
      chosen = numbers == number
      first = self._ends[number] - self.sizes[number]
      dataset = self.datasets[number]
      out[chosen] = dataset.sizes_of((indices[chosen] - first) % dataset.num_samples)
    return out

  def lengths_of(self, indices: np.ndarray) -> np.ndarray:
    """Computes int64 [n], tokens of samples of the mixture; 0 for those that are lost."""
    return self.size_of(indices)[:, 0].clip(0)

  def sizes_now(self, indices: np.ndarray) -> np.ndarray:
    """Measures int64 [n, 2], tokens and tiles of samples of a mixture without an index; see `Dataset.size_now`."""
    located = map(self._locate, indices.tolist())
    sizes = [dataset.size_now(sample) for dataset, sample in located]
    return np.array(sizes, np.int64).reshape(-1, 2)

  def index_of(self, index: int) -> str:
    """The folder of the index that knows how large a sample is; "" where its line states it."""
    dataset, sample = self._locate(index)
    return dataset.index_of(dataset.locate(sample)[0])

  def why_lost(self, index: int) -> str:
    """Why a sample whose size has no tokens is lost."""
    dataset, sample = self._locate(index)
    return dataset.why_lost(sample)

  def dataset_lines(self) -> list[str]:
    """One line for each dataset, and one on what decodes their images, for the log."""
    lines = []
    for dataset, size in zip(self.datasets, self.sizes, strict=True):
      spec, found = dataset.spec, len(dataset.file)
      stated = f" (the meta file says {spec.length})" if spec.length not in (None, found) else ""
      pieces = f" in {dataset.num_samples} pieces" if dataset.num_samples > dataset.lines else ""
      tiles = f"up to {max_grid_tiles(spec, self.data)} tiles" if self.data.dynamic_image_size else "1 tile"
      lines.append(
        f"{spec.name}: {size} samples an epoch ({100 * size / self.num_samples:.1f} %), {dataset.lines} of {found} "
        f"lines{stated}{pieces} x {spec.repeats}, {tiles}{', JPEG augmentation' if spec.data_augment else ''}, "
        f"root {spec.root or '.'}, {spec.annotation} ({dataset.form()})"
      )
    return lines + self.decoding_lines()

  def decoding_lines(self) -> list[str]:
    """A line on what decodes the images, if there are any."""
    return [compiled.note()] if any(dataset.has_images() for dataset in self.datasets) else []

  def close(self) -> None:
    """Closes the annotation files."""
    for dataset in self.datasets:
      dataset.file.close()


def limits_of(data: DataTrainingArguments, policy: Policy) -> Limits:
  """The limits of samples under these settings."""
  if not data.use_packed_ds:
    return Limits(data.max_seq_length, policy=policy)
  return Limits(data.max_seq_length, data.max_packed_tokens, data.num_images_expected, policy)


def _checked(dataset: Dataset, data: DataTrainingArguments) -> Dataset:
  spec = dataset.spec
  blame = f"{data.meta_path}: dataset {spec.name!r}"
  if not dataset.lines:
    raise DataError(
      f"{blame}: repeat_time={spec.repeat_time} of {len(dataset.file)} lines is 0 samples; raise it"
    )
  if data.dynamic_image_size and max_grid_tiles(spec, data) < data.min_dynamic_patch:
    raise DataError(
      f"{blame}: max_dynamic_patch={max_grid_tiles(spec, data)} is below min_dynamic_patch="
      f"{data.min_dynamic_patch}; raise one or lower the other"
    )
  return dataset
