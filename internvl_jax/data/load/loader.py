"""The loader: order -> rows -> workers that decode them -> padded batches, with counters and exact resume."""

import contextlib
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tqdm
from absl import logging

from internvl_jax.arguments import DataTrainingArguments, LoaderConfig, TrainingArguments
from internvl_jax.data.load import batching
from internvl_jax.data.load.counters import Tally
from internvl_jax.data.load.fingerprint import (
  Varying,
  Watched,
  check_same_content,
  content_of,
  first_varying,
  mixture_fingerprint,
  shared_facts,
)
from internvl_jax.data.load.mixture import Mixture
from internvl_jax.data.load.prefetch import DecodedAhead, MicroBatchSource
from internvl_jax.data.load.settings import check_settings, longest_row, pack_settings, row_name, tile_sizes
from internvl_jax.data.load.task import CONVERSATIONS, DataTask
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.data.schedule import order as orders
from internvl_jax.data.schedule import packing
from internvl_jax.data.schedule.grouping import GroupedOrder
from internvl_jax.data.schedule.packed_rows import PlannedRows, RowStream, packable
from internvl_jax.data.source.cache import cache_errors_named, whole_file
from internvl_jax.data.source.files import default_cache
from internvl_jax.data.source.hosts import ALONE, Hosts
from internvl_jax.data.where import DataError

# Reasons looked up of samples that a step passes over.
_REASONS = 5
# Batches at the start that may have nothing to learn from, where bad samples are dropped.
_UNTAUGHT = 10
# Steps of which the samples can still be told: devices are a step or two behind.
_REMEMBERED = 8


class _Ready(NamedTuple):
  """A batch that was put together.

  Attributes:
    batch: this host's.
    tally: what will be counted once it is handed out.
    rows: its samples, of all hosts.
    before: the state of the packed rows before it.
  """

  batch: Any
  tally: Tally
  rows: list[orders.Places]
  before: dict[str, Any] | None


class TrainLoader:
  """Iterates over the optimizer steps of a run as batches of numpy arrays, of the kind that its task makes.

  A = `gradient_accumulation_steps` micro-batches of R = `per_device_train_batch_size` * data_shards rows each.
  Batches depend on data, seed and settings, not on workers, prefetch or hosts. The state says how many batches were
  handed out; a loader made with it goes on with the next one, bit for bit, without reading what came before.

  Each host decodes the rows of its own shards, and its batches hold these alone: side by side, those of all hosts are
  the batches of one. (But for padding, where an image that could be measured cannot be decoded: one host alone, that
  neither packs nor groups, never measured it.)

  Attributes:
    num_samples: samples of an epoch.
    global_batch: A * R rows of an optimizer step, of all hosts.
    total_steps: optimizer steps of the run.
    steps_per_epoch: optimizer steps that see all samples once, rounded up.
    sequence_sizes: row lengths S that batches may have.
    next_step: optimizer steps handed out so far.
  """

  def __init__(
    self,
    data: DataTrainingArguments,
    training: TrainingArguments,
    loader: LoaderConfig,
    tokenizer: ChatTokenizer,
    *,
    tokens_per_tile: int,
    data_shards: int = 1,
    my_shards: range | None = None,
    hosts: Hosts = ALONE,
    all_sum: Callable[[np.ndarray], np.ndarray] = lambda counts: counts,
    state: dict[str, Any] | None = None,
    task: DataTask = CONVERSATIONS,
  ):
    """Reads the meta file and finds all lines; workers start with the first batch.

    Args:
      data: which data, and how a sample becomes tokens and tiles.
      training: batch size, accumulation, epochs or steps, seeds, workers.
      loader: shuffling, bad samples, buckets, prefetch.
      tokenizer: of the conversations.
      tokens_per_tile: P, image tokens of one tile.
      data_shards: D, data-parallel devices of all hosts.
      my_shards: those whose rows this host feeds; None: all.
      hosts: the processes that make such a loader at the same time; each measures a part of the data for all.
      all_sum: adds an array over the hosts, each shard counted once. All hosts call it at the same time: in the
        first step, and in `counters` and `get_state`.
      state: of an earlier loader, to go on from; None: from the start.
      task: what kind of line the data have, and how batches are made.

    Raises:
      DataError: a setting is wrong, or the data do not fit it or the state.
    """
    my_shards = range(data_shards) if my_shards is None else my_shards
    check_settings(training, loader, tokens_per_tile, data_shards, my_shards)
    self._data, self._loader, self._training = data, loader, training
    self._task = task
    self._data_shards, self._my_shards, self._all_sum = data_shards, my_shards, all_sum
    self._accumulation = training.gradient_accumulation_steps
    self._rows = training.per_device_train_batch_size * data_shards
    self.global_batch = self._rows * self._accumulation
    self._tile_size, self._tokens_per_tile = data.force_image_size, tokens_per_tile
    self._image_token_id = tokenizer.image_token_id
    # Shapes are the same on all hosts only if they are known before anything is decoded.
    self._measured = (
      data.use_packed_ds or training.group_by_length or len(my_shards) < data_shards or hosts.count > 1
    )
    cache = loader.cache_dir or (default_cache() if self._measured else None)
    self._mixture = Mixture(
      data,
      tokenizer,
      tokens_per_tile=tokens_per_tile,
      seed=training.seed,
      policy=loader.on_over_length,
      cache=cache,
      lines=self._task.lines,
    )
    if self._measured:
      assert cache is not None
      self._mixture.index_sizes(cache, workers=os.cpu_count() or 1, quiet=training.disable_tqdm, hosts=hosts)
    self._content, self._watched = content_of(self._mixture, cache), Watched(self._mixture)
    if state is not None:
      self._check_content(state)
    self.num_samples = self._mixture.num_samples
    self._order = self._make_order()
    self._packing, self._stream = None, None
    # A sample's conversations stand in one row, each behind the prompt, which need not be one that they can share.
    longest_sample = data.max_seq_length * self._task.conversations
    self.rows_per_epoch = self.num_samples
    if data.use_packed_ds:
      self._packing = pack_settings(data)
      assert cache is not None
      self._stream = RowStream(self._order, self._mixture.size_of, self._packing)
      self.rows_per_epoch = self._count_rows(pathlib.Path(cache))
    self.steps_per_epoch = orders.total_steps(self.rows_per_epoch, 1, self.global_batch)
    self.total_steps = (
      training.max_steps
      if training.max_steps > 0
      else orders.total_steps(self.rows_per_epoch, training.num_train_epochs, self.global_batch)
    )
    self.sequence_sizes = batching.sequence_buckets(
      longest_row(data, longest_sample),
      loader.sequence_buckets,
      row_name(data, self._task.lines.longest_name),
    )
    self._tile_sizes = tile_sizes(data, loader, training.per_device_train_batch_size)
    self.next_step = 0
    self._tally = Tally(
      self._mixture.names, loader, hosts=data_shards // len(my_shards), epoch=self.num_samples
    )
    self._handed: dict[int, list[orders.Places]] = {}
    self._iterator: DecodedAhead | None = None
    self._ready: _Ready | None = None
    self._closed, self._taught = False, False
    if state is not None:
      self._restore(state)

  def __iter__(self) -> Iterator[Any]:
    return self

  def __next__(self) -> Any:
    """Returns the next step's batch: tokens [A, R, S], tiles [A, D, T, H, W, 3], of this host's rows and shards.

    Raises:
      StopIteration: after `total_steps`.
      DataError: a sample is lost that may not be, too many are, or the first batches have nothing to learn from.
    """
    if self._closed:
      raise RuntimeError("the loader is closed")
    if self.next_step >= self.total_steps:
      raise StopIteration
    ready, self._ready = self._ready or self._make_ready(), None
    self._tally = ready.tally
    self._handed = {**self._handed, self.next_step: ready.rows}
    self._handed.pop(self.next_step - _REMEMBERED, None)
    self.next_step += 1
    return ready.batch

  def prefetch(self) -> None:
    """Puts the next batch together, for `__next__` to hand out; state and counters stay those before it.

    It asks nothing of other hosts: a batch that needs them is left to `__next__`, and so is what goes wrong.
    """
    if self._ready is not None or not self._taught or self._closed or self.next_step >= self.total_steps:
      return
    try:
      self._ready = self._make_ready()
    except Exception as error:
      logging.debug("The next batch cannot be put together: %s", error)

  def _make_ready(self) -> _Ready:
    """Decodes and assembles the next batch; after an error everything is as before."""
    if self._iterator is None:
      self._iterator = self._start()
    before = self._stream.get_state() if self._stream else None
    try:
      micro_batches = [next(self._iterator) for _ in range(self._accumulation)]
      tally = self._tally.copy()
      rows = self._take_rows(tally)
      self._count(micro_batches, tally)
      return _Ready(self._assemble(micro_batches, self._room(rows)), tally, rows, before)
    except Exception:
      # Whoever goes on after the error must meet it again, not the batch after it.
      self._stop()
      if self._packing is not None:
        self._stream = RowStream(self._order, self._mixture.size_of, self._packing, before)
      raise

  def _assemble(self, micro_batches: list[batching.MicroBatch], at_least: tuple[int, int]) -> Any:
    padding = batching.Padding(
      data_shards=len(self._my_shards),
      image_token_id=self._image_token_id,
      sequence_sizes=self.sequence_sizes,
      tile_sizes=self._tile_sizes,
      # As in the reference, tokens of rows that hold one sample weigh the same.
      loss_reduction=self._data.loss_reduction if self._data.use_packed_ds else "token",
      at_least=at_least,
    )
    return self._task.assemble(micro_batches, padding)

  def get_state(self) -> dict[str, Any]:
    """Returns what a later loader needs to go on after the last batch handed out; JSON-able. See `all_sum`.

    {"next_step": 7, "counters": {"vqa": {"samples": 448, "unreadable": 0, ...}}, "plan": {...}, "content": {...}}

    Tells of annotation files that were touched since the last time.
    """
    self._watched.tell()
    state = {"next_step": self.next_step, "counters": self.counters(), "plan": self._plan_fingerprint()}
    state["content"] = self._content
    if self._stream is None:
      return state
    return {**state, "rows": self._ready.before if self._ready else self._stream.get_state()}

  def counters(self) -> dict[str, dict[str, int]]:
    """Returns for each dataset what became of its samples in the batches handed out so far. See `all_sum`."""
    return self._tally.named(self._all_sum(self._tally.read))

  def describe_batch(self, step: int) -> str:
    """Returns the samples, of all hosts, of the batch that took the run from `step` to the next: datasets and lines.

    Raises:
      KeyError: that was too long ago.
    """
    named: dict[str, list[int]] = {}
    for row in self._handed[step]:
      for index in row.indices.tolist():
        where = self._mixture.where(index)
        named.setdefault(where.file, []).append(where.line)
    return "; ".join(f"{file}:{','.join(map(str, lines))}" for file, lines in named.items())

  def fingerprint(self) -> str:
    """Returns a hash of the data and of all that makes samples of them; see `mixture_fingerprint`."""
    return mixture_fingerprint(self._mixture)

  def shared_facts(self) -> dict[str, Any]:
    """Returns what the loaders of all hosts must have alike, as JSON values by their names in messages."""
    plan = {f"{name} of the plan": value for name, value in self._plan_fingerprint().items()}
    return {**shared_facts(self._content, self._mixture), **plan, "steps of the run": self.total_steps}

  def first_varying(self) -> Varying | None:
    """Returns the first dataset of which a sample may differ between epochs; None if none does."""
    return first_varying(self._mixture)

  def has_images(self) -> bool:
    """Returns whether any sample has an image or a video, as far as that can be told before it is read."""
    return any(dataset.has_images() for dataset in self._mixture.datasets)

  def epoch_of(self, step: int) -> float:
    """Returns how many times the data have been seen after `step` optimizer steps."""
    return step * self.global_batch / self.rows_per_epoch

  def describe(self) -> list[str]:
    """Returns one line for each dataset, for the log."""
    return self._mixture.describe()

  def close(self) -> None:
    """Ends the workers and closes the files. The state can still be read."""
    self._closed = True
    self._stop()
    self._mixture.close()

  def _stop(self) -> None:
    if self._iterator is not None:
      self._iterator.close()
      self._iterator = None

  def _make_order(self) -> orders.Order:
    """Returns the order of the samples that the settings ask for."""
    training, data = self._training, self._data
    seed = training.seed if training.data_seed is None else training.data_seed
    sizes = tuple(self._mixture.sizes.tolist())
    order: orders.Order = orders.EpochOrder(self.num_samples, seed, self._loader.shuffle)
    if data.replacement and data.use_packed_ds:  # As in the reference, of packed rows alone.
      order = orders.DrawnOrder(sizes, seed, data.use_data_resampling, self._loader.shuffle)
    elif data.use_data_resampling:
      order = orders.ResampledOrder(sizes, seed, self._loader.shuffle)
    if not training.group_by_length or data.use_packed_ds:  # packed rows are of one length already
      return order
    length_of = functools.partial(_lengths, self._mixture)
    return GroupedOrder(
      order, length_of, self._accumulation, self._data_shards, training.per_device_train_batch_size
    )

  def _start(self) -> DecodedAhead:
    """Starts decoding at the next step."""
    start = self.next_step * self._accumulation
    by_shard = self._training.per_device_train_batch_size
    mine = range(self._my_shards.start * by_shard, self._my_shards.stop * by_shard)
    most = self._mixture.max_tiles() if self._packing is None else self._packing.max_tiles
    room = batching.tile_bucket(len(mine) * most, self._tile_sizes)
    source = MicroBatchSource(
      mixture=self._mixture,
      order=self._order,
      rows=self._rows,
      mine=mine,
      start=start,
      count=self.total_steps * self._accumulation - start,
      tile_size=self._tile_size,
      tokens_per_tile=self._tokens_per_tile,
      image_token_id=self._image_token_id,
      max_tiles=room,
      packed=self._planned_rows(),
      measured=self._measured,
    )
    return DecodedAhead(source, self._training.dataloader_num_workers, self._loader.prefetch)

  def _planned_rows(self) -> PlannedRows | None:
    """Returns the packed rows from the next step on, for the workers; None where rows are not packed."""
    if self._stream is None or self._packing is None:
      return None
    state = self._stream.get_state()
    return PlannedRows(self._order, self._mixture.size_of, self._packing, state, self._rows)

  def _count_rows(self, cache: pathlib.Path) -> int:
    """Returns how many rows the first epoch's samples make, which the cache remembers: millions take minutes."""
    assert self._packing is not None
    order = self._order.places(0, self.num_samples).indices
    sizes = packable(self._mixture.size_of(order), self._packing)
    key = hashlib.sha256(repr((packing.ALGORITHM, self._packing)).encode() + sizes.tobytes()).hexdigest()[:16]
    path = cache / f"rows-{key}.txt"
    with contextlib.suppress(FileNotFoundError, ValueError):  # Not there, or damaged.
      return int(path.read_text(encoding="ascii"))
    with tqdm.tqdm(total=len(sizes), desc="rows", unit="sample", disable=self._training.disable_tqdm) as bar:
      rows = packing.count_rows(sizes, self._packing, progress=bar.update)
    if not rows:
      raise DataError(
        f"no sample fits a row of data.max_packed_tokens={self._packing.max_tokens} tokens and "
        f"data.num_images_expected={self._packing.max_tiles} tiles; raise them. The first: "
        f"{self._mixture.why_lost(int(order[0]))}"
      )
    with cache_errors_named(cache), whole_file(path) as file:
      file.write(str(rows).encode())
    return rows

  def _take_rows(self, tally: Tally) -> list[orders.Places]:
    """Returns the samples of each row of a step, of all hosts, and counts what packing passed over."""
    if self._stream is None:
      epochs, indices = self._order.places(self.next_step * self.global_batch, self.global_batch)
      return [orders.Places(epochs[i : i + 1], indices[i : i + 1]) for i in range(self.global_batch)]
    start, rows = self._stream.decided, []
    for _ in range(self.global_batch):
      rows.append(next(self._stream))
      if self._stream.stats.rows % self._data.log_freq == 0:
        _log_fill(self._stream.stats)
    skipped = self._stream.skipped(start, self._stream.decided)
    for event, indices in skipped._asdict().items():
      datasets = np.array([self._mixture.dataset_of(index) for index in indices.tolist()], np.int64)
      tally.add_skipped(event, datasets, map(self._mixture.why_lost, indices[:_REASONS].tolist()))
    return rows

  def _room(self, rows: list[orders.Places]) -> tuple[int, int]:
    """Returns the tokens of the longest row and the tiles of the fullest shard, of all hosts; 0 if not known."""
    if not self._measured:
      return 0, 0
    sizes = self._mixture.size_of(np.concatenate([row.indices for row in rows])).clip(0)
    owners = np.repeat(np.arange(len(rows)), [len(row.indices) for row in rows])
    tokens, tiles = (np.bincount(owners, column, len(rows)) for column in sizes.T)
    shards = tiles.reshape(self._accumulation * self._data_shards, -1).sum(-1)
    return int(tokens.max()), int(shards.max())

  def _count(self, micro_batches: list[batching.MicroBatch], tally: Tally) -> None:
    """Counts what became of the micro-batches' samples.

    Raises:
      DataError: a sample was lost that may not be, too many were, or the first batches supervise nothing.
    """
    for micro in micro_batches:
      tally.add(micro)
    if tally.lost > self._tally.lost:
      tally.judge()
      tally.tell_losses(self._tally)
    if tally.untaught.bit_length() > self._tally.untaught.bit_length():
      logging.warning("Samples without a supervised token on this host: %s", tally.describe())
    if not self._taught:
      self._check_taught(micro_batches, tally)
    elif tally.untaught > self._tally.untaught:
      tally.judge_untaught()

  def _check_taught(self, micro_batches: list[batching.MicroBatch], tally: Tally) -> None:
    """Ends a run whose first batches supervise nothing; under on_bad_sample="drop" the first one may be bad by chance."""
    taught = sum((~micro.happened("fully_masked") & (micro.lengths > 0)).sum() for micro in micro_batches)
    self._taught = bool(self._all_sum(np.array([taught], np.int64))[0])
    seen, patience = self.next_step + 1, 1 if self._loader.on_bad_sample == "error" else _UNTAUGHT
    if not self._taught and seen >= min(patience, self.total_steps):
      hint = self._task.lines.taught_hint
      raise tally.nothing_taught(micro_batches, seen, self.global_batch, taught_hint=hint)

  def _plan_fingerprint(self) -> dict[str, int]:
    """Returns what must be equal for a step number to mean the same samples."""
    return {
      **{name: int(value) for name, value in self._task.lines.facts.items()},
      "num_samples": self.num_samples,
      "global_batch": self.global_batch,
      "order_seed": self._order.seed,
      "shuffle": int(self._order.shuffle),
      "order_checksum": self._order.checksum(),
    }

  def _check_content(self, state: dict[str, Any]) -> None:
    """Refuses the state of a run that began with other data; a state of earlier versions does not tell."""
    if missing := {"next_step", "counters", "plan"} - state.keys():
      raise DataError(
        f"the loader's state lacks {', '.join(sorted(missing))}; it has {', '.join(sorted(state))}"
      )
    if "content" in state:
      check_same_content(state["content"], self._content, self._mixture)
    else:
      logging.warning(
        "The checkpoint was made by an earlier version, which did not keep what its annotation files held: whether they "
        "were changed since cannot be told"
      )

  def _restore(self, state: dict[str, Any]) -> None:
    then_of, now_of = state["plan"], self._plan_fingerprint()
    # A fact of its kind of line that a state does not have was not so.
    for key in now_of | then_of:
      if (then := then_of.get(key, 0)) != (now := now_of.get(key, 0)):
        raise DataError(
          f"the run cannot go on with the same batches: {key} was {then} when its state was saved and is {now} now; "
          "restore the data and settings of then, or start anew with training.overwrite_output_dir=True"
        )
    self._tally.restore(state["counters"])
    self.next_step = int(state["next_step"])
    self._taught = self.next_step >= _UNTAUGHT
    if self._packing is not None:
      try:
        self._stream = RowStream(self._order, self._mixture.size_of, self._packing, state["rows"])
      except ValueError as error:
        raise DataError(
          f"the run cannot go on with the same batches: {error}; restore the settings of then, or start anew with "
          "training.overwrite_output_dir=True"
        ) from None


def _lengths(mixture: Mixture, indices: np.ndarray) -> np.ndarray:
  """Returns int64 [n]: tokens of samples, 0 for those that are lost."""
  return mixture.size_of(indices)[:, 0].clip(0)


def _log_fill(stats: packing.PackStats) -> None:
  logging.info(
    "%d packed rows: %.1f %% of their tokens and %.1f %% of their tiles are filled, %.1f samples a row",
    *(stats.rows, 100 * stats.token_fill, 100 * stats.tile_fill, stats.samples_per_row),
  )
