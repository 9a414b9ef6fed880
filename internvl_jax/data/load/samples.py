"""Where a loader's samples come from: data that are read by number, planned in advance; streams are in `streaming`."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from internvl_jax.arguments import DataTrainingArguments, LoaderConfig, TrainingArguments
from internvl_jax.data.load.fingerprint import (
  Varying,
  Watched,
  check_state,
  content_of,
  first_varying,
  mixture_fingerprint,
  shared_facts,
)
from internvl_jax.data.load.messages import other_batches
from internvl_jax.data.load.mixture import Mixture
from internvl_jax.data.load.row_count import count_rows
from internvl_jax.data.load.settings import Shards
from internvl_jax.data.load.size_counts import size_counts
from internvl_jax.data.load.task import DataTask
from internvl_jax.data.sample.pool import TilePool
from internvl_jax.data.sample.sample import Sample
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.data.schedule.balance import Balance
from internvl_jax.data.schedule.packed_steps import StepShape
from internvl_jax.data.schedule.schedule import Schedule, make_order, make_schedule
from internvl_jax.data.schedule.shapes import pack_settings
from internvl_jax.data.source.files import default_cache
from internvl_jax.data.where import DataError, Where


class Samples(Protocol):
  """Samples by their numbers, decoded: what worker threads and processes need."""

  @property
  def names(self) -> list[str]:
    """The datasets' names."""
    ...

  def max_tiles(self) -> int:
    """The most tiles that one sample may have."""
    ...

  def dataset_of(self, index: int) -> int:
    """The number of the dataset that a sample is of."""
    ...

  def where(self, index: int) -> Where:
    """The line that a sample comes from."""
    ...

  def record(self, index: int) -> tuple[Any, dict[str, Any]]:
    """The parsed line that a sample comes from, and what of it is read (`LineSchema.plain`)."""
    ...

  def decode(self, epoch: int, index: int, pool: TilePool | None = None) -> Sample:
    """A sample, decoded. Raises DataError where it cannot be made."""
    ...

  def size_of(self, indices: np.ndarray) -> np.ndarray:
    """Tokens and tiles of samples, int64 [n, 2]; see `packed_rows.SizeOf`."""
    ...

  def sizes_now(self, indices: np.ndarray) -> np.ndarray:
    """The same, of samples whose sizes are not indexed."""
    ...

  def index_of(self, index: int) -> str:
    """The folder of the index that knows a sample's size; "" where there is none."""
    ...

  def why_lost(self, index: int) -> str:
    """Why a sample whose size has no tokens is lost."""
    ...

  def dataset_lines(self) -> list[str]:
    """Lines on the datasets, for the log."""
    ...

  def close(self) -> None:
    """Closes the files."""
    ...


class Settings(NamedTuple):
  """The settings of a source of samples; see `loader.TrainLoader`."""

  data: DataTrainingArguments
  training: TrainingArguments
  loader: LoaderConfig
  tokenizer: ChatTokenizer
  tokens_per_tile: int
  shards: Shards
  task: DataTask


class SampleSource(Protocol):
  """The data of a run: samples, and the schedule of the steps that see them."""

  @property
  def samples(self) -> Samples:
    """The samples by their numbers."""
    ...

  @property
  def schedule(self) -> Schedule:
    """Which samples each step sees, of all hosts, or of this one where it has samples of its own."""
    ...

  @property
  def measured(self) -> bool:
    """Whether sizes are known before samples are decoded."""
    ...

  @property
  def num_samples(self) -> int:
    """Samples of an epoch, as a run reports it."""
    ...

  @property
  def lanes(self) -> int:
    """Among how many hosts samples are dealt that others do not see."""
    ...

  @property
  def workers(self) -> int:
    """Processes that decode."""
    ...

  def mine(self) -> range:
    """The rows of a micro-batch of the schedule that this host decodes."""
    ...

  def advance(self, state: dict[str, Any] | None, step: int) -> None:
    """Lets go what a schedule needs no more that goes on from this state, before this step."""
    ...

  def pack_state(self, rows: dict[str, Any] | None, step: int) -> dict[str, Any]:
    """The state for a checkpoint: the place in the data, beside the number of the step."""
    ...

  def unpack_state(self, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Goes to where `pack_state` was called; returns the state of the schedule.

    Raises:
      DataError: the state is of other data or settings.
    """
    ...

  @property
  def content(self) -> dict[str, Any]:
    """A description of the data, as JSON values: a checkpoint holds it."""
    ...

  def tell_changes(self) -> None:
    """Logs which files were touched since the last time."""
    ...

  def fingerprint(self) -> str:
    """A hash of the data and of all that makes samples of them."""
    ...

  def shared_facts(self) -> dict[str, Any]:
    """Facts that must be equal on all hosts, as JSON values by their names in messages."""
    ...

  def first_varying(self) -> Varying | None:
    """The first dataset of which a sample may differ between epochs; None if none does."""
    ...

  def has_images(self) -> bool:
    """Whether any sample has an image or a video, as far as that can be told before it is read."""
    ...

  def size_counts(self) -> list[dict[str, Any]]:
    """How many lines have how many tokens and tiles, by dataset; empty where sizes are not known."""
    ...


class IndexedSamples:
  """Data that are read by number, see `SampleSource`: every step is planned for all hosts alike."""

  lanes = 1

  def __init__(self, settings: Settings):
    """Finds all samples, and measures them where that is wanted."""
    self._settings = settings
    data, training, shards = settings.data, settings.training, settings.shards
    # Shapes are the same on all hosts only if they are known before anything is decoded.
    self.measured = data.use_packed_ds or training.group_by_length or shards.are_split
    self.workers = training.dataloader_num_workers
    self._cache = settings.loader.cache_dir or (default_cache() if self.measured else None)
    self.samples = self._open()
    self.content, self._watched = content_of(self.samples, self._cache), Watched(self.samples)
    self.schedule = self._make_schedule()

  @property
  def num_samples(self) -> int:
    """Samples of an epoch."""
    return self.schedule.num_samples

  def _open(self) -> Mixture:
    settings = self._settings
    mixture = Mixture(
      settings.data,
      settings.tokenizer,
      tokens_per_tile=settings.tokens_per_tile,
      seed=settings.training.seed,
      policy=settings.loader.on_over_length,
      cache=self._cache,
      lines=settings.task.lines,
    )
    if self.measured:
      assert self._cache is not None
      quiet, hosts = settings.training.disable_tqdm, settings.shards.hosts
      mixture.index_sizes(self._cache, workers=os.cpu_count() or 1, quiet=quiet, hosts=hosts)
    return mixture

  def _make_schedule(self) -> Schedule:
    data, training, loader, *_, shards, _ = self._settings
    shape = StepShape.of(training, shards.count)
    order = make_order(
      data,
      training,
      shuffle=loader.shuffle,
      samples=tuple(self.samples.sizes.tolist()),
      shape=shape,
      length_of=self.samples.lengths_of,
    )
    packed = pack_settings(data) if data.use_packed_ds else None
    size_of, steps, cost = self.samples.size_of, loader.balance_steps, shards.row_cost
    balance = Balance(steps=steps, cost=cost) if steps and cost is not None else None
    return make_schedule(order, shape, training, size_of, packed, self._count_rows, balance)

  def _count_rows(self, indices: np.ndarray) -> int:
    """Counts the packed rows that samples make.

    Raises:
      DataError: no sample fits a row.
    """
    packed = pack_settings(self._settings.data)
    assert self._cache is not None
    quiet = self._settings.training.disable_tqdm
    # Of millions of samples, no name here keeps what is counted from going.
    rows = count_rows(self.samples.size_of(indices), packed, self._cache, quiet=quiet)
    if not rows:
      raise DataError(
        f"no sample fits a row of data.max_packed_tokens={packed.max_tokens} tokens and "
        f"data.num_images_expected={packed.max_tiles} tiles; raise them. The first: "
        f"{self.samples.why_lost(int(indices[0]))}"
      )
    return rows

  def mine(self) -> range:
    """The rows of a micro-batch that this host decodes."""
    fed, each = self._settings.shards.fed, self.schedule.shape.rows_per_shard
    return range(fed.start * each, fed.stop * each)

  def advance(self, state: dict[str, Any] | None, step: int) -> None:
    """Does nothing: samples are read when they are decoded."""

  def pack_state(self, rows: dict[str, Any] | None, step: int) -> dict[str, Any]:
    """The state of packed rows."""
    del step
    return {} if rows is None else {"rows": rows}

  def unpack_state(self, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state of packed rows."""
    check_state(state, self.content, self.samples)
    if self.schedule.packing is not None and "rows" not in state:
      raise other_batches("its rows were not packed when its state was saved", "settings")
    return state.get("rows")

  def tell_changes(self) -> None:
    """Logs which annotation files were touched since the last time."""
    self._watched.tell()

  def fingerprint(self) -> str:
    """A hash of the data; see `mixture_fingerprint`."""
    return mixture_fingerprint(self.samples)

  def shared_facts(self) -> dict[str, Any]:
    """Facts that must be equal on all hosts, as JSON values by their names in messages."""
    return shared_facts(self.content, self.samples)

  def first_varying(self) -> Varying | None:
    """The first dataset of which a sample may differ between epochs."""
    return first_varying(self.samples)

  def has_images(self) -> bool:
    """Whether any sample has an image or a video, as far as that can be told before it is read."""
    return any(dataset.has_images() for dataset in self.samples.datasets)

  def size_counts(self) -> list[dict[str, Any]]:
    """How many lines have how many tokens and tiles, by dataset; empty where sizes are not measured."""
    return size_counts(self.samples) if self.measured else []
