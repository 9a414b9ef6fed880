"""The loader: plan -> workers that decode micro-batches -> padded batches, with counters and exact resume."""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from typing import Any, cast

import grain
import numpy as np
import tqdm
from absl import flags, logging

from internvl_jax.arguments import DataTrainingArguments, LoaderConfig, TrainingArguments
from internvl_jax.batch import SFTBatch
from internvl_jax.data import batching, packing
from internvl_jax.data import plan as plans
from internvl_jax.data.errors import DataError
from internvl_jax.data.files import default_cache
from internvl_jax.data.packing import PackSettings, look_ahead_of
from internvl_jax.data.rows import PlannedRows, RowStream, packable
from internvl_jax.data.sample import Mixture, Sample
from internvl_jax.data.tokenize import ChatTokenizer

COUNTERS = ("samples", "unreadable", "truncated", "fully_masked", "over_long")

# Unreadable samples named in the message that aborts a run.
_OFFENDERS_SHOWN = 5
# `max_bad_fraction` is judged against at least so many samples (or one epoch): otherwise a single bad file among
# the first hundred would always exceed 1 %.
_FEWEST_JUDGED = 1000
# Arrays below this size travel through the pipe: making a shared-memory block costs more than copying them.
_SHARED_MEMORY_MIN_BYTES = 1 << 18


@dataclasses.dataclass(frozen=True)
class MicroBatchSource:
  """Random access to the micro-batches of the stream, decoded on demand: what Grain's workers call.

  Attributes:
    mixture: decodes samples.
    plan: says which.
    rows: R, samples of a micro-batch.
    start: the micro-batch of the stream that is element 0.
    count: number of elements.
    tile_size: side of a tile in pixels.
    tokens_per_tile: image tokens of one tile.
    image_token_id: the id that stands at image tokens.
    packed: the samples of the rows of each element where rows hold several; None: one a row.
  """

  mixture: Mixture
  plan: plans.Plan | plans.ResampledPlan
  rows: int
  start: int
  count: int
  tile_size: int
  tokens_per_tile: int
  image_token_id: int
  packed: PlannedRows | None = None

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, element: int) -> batching.MicroBatch:
    return batching.pack_rows(
      [self._row(row) for row in self._planned(element)],
      tile_size=self.tile_size,
      tokens_per_tile=self.tokens_per_tile,
      image_token_id=self.image_token_id,
    )

  def _planned(self, element: int) -> list[plans.Places]:
    """Returns the samples of each row: one, or several where rows are packed."""
    if self.packed is not None:
      return self.packed[element]
    epochs, indices = self.plan.places((self.start + element) * self.rows, self.rows)
    return [plans.Places(epochs[i : i + 1], indices[i : i + 1]) for i in range(self.rows)]

  def _row(self, places: plans.Places) -> list[Sample | batching.Unreadable]:
    return [self._sample(int(e), int(i)) for e, i in zip(*places, strict=True)]

  def _sample(self, epoch: int, index: int) -> Sample | batching.Unreadable:
    # An unreadable sample travels beside the readable ones, so that the main process decides about it, and only
    # once the batch is consumed: the same moment for any number of workers.
    try:
      sample = self.mixture.decode(epoch, index)
      if self.packed is not None:
        self._check_size(sample)
      return sample
    except DataError as error:
      return batching.Unreadable(self.mixture.locate(index)[0], str(error))

  def _check_size(self, sample: Sample) -> None:
    """Refuses a sample that takes other room than was planned for it: its row might not hold it."""
    tokens, tiles = self.mixture.size_of(np.array([sample.index]))[0].tolist()
    if (tokens, tiles) != (len(sample.input_ids), len(sample.tiles)):
      raise sample.where.error(
        f"it has {len(sample.input_ids)} tokens and {len(sample.tiles)} tiles, but {tokens} and {tiles} were planned: "
        "the image's size is not what the line says, or it was replaced; correct the line's width and height"
      )


class TrainLoader:
  """Iterates over the optimizer steps of a run as `SFTBatch`es of numpy arrays.

  A = `gradient_accumulation_steps` micro-batches of R = `per_device_train_batch_size` * data_shards rows each.
  Batches depend on data, seed and settings, not on workers or prefetch. The state says how many batches were
  handed out; a loader made with it goes on with the next one, bit for bit, without reading what came before.

  Attributes:
    num_samples: samples of an epoch.
    global_batch: A * R samples of an optimizer step.
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
    state: dict[str, Any] | None = None,
  ):
    """Reads the meta file and finds all lines; workers start with the first batch.

    Args:
      data: which data, and how a sample becomes tokens and tiles.
      training: batch size, accumulation, epochs or steps, seeds, workers.
      loader: shuffling, bad samples, buckets, prefetch.
      tokenizer: of the conversations.
      tokens_per_tile: P, image tokens of one tile.
      data_shards: D, data-parallel devices.
      state: of an earlier loader, to go on from; None: from the start.

    Raises:
      DataError: a setting is wrong or not supported yet, or the data do not fit it or the state.
    """
    _refuse_unsupported(data, training)
    _check_settings(training, loader, tokens_per_tile, data_shards)
    self._loader, self._training = loader, training
    self._cache = loader.cache_dir or (default_cache() if data.use_packed_ds else None)
    self._mixture = Mixture(
      data, tokenizer, tokens_per_tile=tokens_per_tile, seed=training.seed, cache=self._cache
    )
    self._rows = training.per_device_train_batch_size * data_shards
    self._accumulation = training.gradient_accumulation_steps
    self._data_shards = data_shards
    self._tile_size, self._tokens_per_tile = data.force_image_size, tokens_per_tile
    self._image_token_id = tokenizer.image_token_id
    order_seed = training.seed if training.data_seed is None else training.data_seed
    self.num_samples = self._mixture.num_samples
    self._plan: plans.Plan | plans.ResampledPlan = plans.Plan(self.num_samples, order_seed, loader.shuffle)
    if data.use_data_resampling:
      self._plan = plans.ResampledPlan(tuple(self._mixture.sizes.tolist()), order_seed, loader.shuffle)
    self.global_batch = self._rows * self._accumulation
    self._packing, self._stream = None, None
    self.rows_per_epoch, longest = self.num_samples, data.max_seq_length
    if data.use_packed_ds:
      self._packing, longest = pack_settings(data), _longest_row(data)
      self._index_sizes()
      self._stream = RowStream(self._plan, self._mixture.size_of, self._packing)
      self.rows_per_epoch = self._count_rows()
    self.steps_per_epoch = plans.total_steps(self.rows_per_epoch, 1, self.global_batch)
    self.total_steps = (
      training.max_steps
      if training.max_steps > 0
      else plans.total_steps(self.rows_per_epoch, training.num_train_epochs, self.global_batch)
    )
    self.sequence_sizes = batching.sequence_buckets(longest, loader.sequence_buckets)
    self._loss_reduction, self._log_freq = data.loss_reduction, data.log_freq
    self._tile_sizes = _tile_sizes(data, loader, self._rows // data_shards)
    self.next_step = 0
    self._counts = np.zeros((len(self._mixture.specs), len(COUNTERS)), np.int64)
    self._offenders: list[str] = []
    self._iterator: grain.DatasetIterator | None = None
    self._closed = False
    if state is not None:
      self._restore(state)

  def __iter__(self) -> Iterator[SFTBatch]:
    return self

  def __next__(self) -> SFTBatch:
    """Returns the next step's batch: tokens [A, R, S], tiles [A, D, T, H, W, 3].

    Raises:
      StopIteration: after `total_steps`.
      DataError: a sample is bad under on_bad_sample="error", too many are under "drop", or the first batch has
        nothing to learn from.
    """
    if self._closed:
      raise RuntimeError("the loader is closed")
    if self.next_step >= self.total_steps:
      raise StopIteration
    if self._iterator is None:
      self._iterator = self._start()
    before = self._stream.get_state() if self._stream else None
    try:
      micro_batches = [next(self._iterator) for _ in range(self._accumulation)]
      counts, offenders = self._judge(micro_batches)
    except Exception:
      # Whoever goes on after the error must meet it again, not the batch after it.
      self._stop()
      if self._packing is not None:
        self._stream = RowStream(self._plan, self._mixture.size_of, self._packing, before)
      raise
    self._counts, self._offenders = counts, offenders
    self.next_step += 1
    return batching.assemble(
      micro_batches,
      data_shards=self._data_shards,
      image_token_id=self._image_token_id,
      sequence_sizes=self.sequence_sizes,
      tile_sizes=self._tile_sizes,
      loss_reduction=self._loss_reduction,
    )

  def get_state(self) -> dict[str, Any]:
    """Returns what a later loader needs to go on after the last batch handed out; JSON-able.

    {"next_step": 7, "counters": {"vqa": {"samples": 448, "unreadable": 0, ...}}, "plan": {...}}
    """
    state = {"next_step": self.next_step, "counters": self.counters(), "plan": self._fingerprint()}
    return state if self._stream is None else {**state, "rows": self._stream.get_state()}

  def counters(self) -> dict[str, dict[str, int]]:
    """Returns for each dataset what became of its samples in the batches handed out so far."""
    names = (spec.name for spec in self._mixture.specs)
    return {
      name: dict(zip(COUNTERS, counts, strict=True))
      for name, counts in zip(names, self._counts.tolist(), strict=True)
    }

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

  def _start(self) -> grain.DatasetIterator:
    """Starts decoding at the next step."""
    start = self.next_step * self._accumulation
    source = MicroBatchSource(
      mixture=self._mixture,
      plan=self._plan,
      rows=self._rows,
      start=start,
      count=self.total_steps * self._accumulation - start,
      tile_size=self._tile_size,
      tokens_per_tile=self._tokens_per_tile,
      image_token_id=self._image_token_id,
      packed=self._planned_rows(),
    )
    return iter(
      _prefetched(source, self._training.dataloader_num_workers, self._loader.prefetch, self._micro_bytes())
    )

  def _planned_rows(self) -> PlannedRows | None:
    """Returns the packed rows from the next step on, for the workers; None where rows are not packed."""
    if self._stream is None or self._packing is None:
      return None
    state = self._stream.get_state()
    return PlannedRows(self._plan, self._mixture.size_of, self._packing, state, self._rows)

  def _micro_bytes(self) -> int:
    """Returns the most bytes that the tiles of a micro-batch may take."""
    tiles = self._mixture.max_tiles() if self._packing is None else self._packing.max_tiles
    return self._rows * tiles * 3 * self._tile_size**2

  def _index_sizes(self) -> None:
    """Finds out how long every sample is; a bar shows how far that is."""
    with tqdm.tqdm(
      total=sum(len(file) for file in self._mixture.files),
      desc="sizes",
      unit="line",
      disable=self._training.disable_tqdm,
    ) as bar:
      self._mixture.index_sizes(
        self._cache or default_cache(),
        workers=os.cpu_count() or 1,
        progress=bar.update,
      )

  def _count_rows(self) -> int:
    """Returns how many rows the first epoch's samples make."""
    assert self._packing is not None
    order = self._plan.places(0, self.num_samples).indices
    sizes = packable(self._mixture.size_of(order), self._packing)
    rows = packing.count_rows(sizes, self._packing)
    if not rows:
      raise DataError(
        f"no sample fits a row of data.max_packed_tokens={self._packing.max_tokens} tokens and "
        f"data.num_images_expected={self._packing.max_tiles} tiles; raise them. The first: "
        f"{self._why_left_out(int(order[0]))}"
      )
    return rows

  def _why_left_out(self, index: int) -> str:
    """Returns why a sample is in no row."""
    tokens, tiles = self._mixture.size_of(np.array([index]))[0].tolist()
    if not tokens:
      return self._mixture.why_unreadable(index)
    assert self._packing is not None
    dataset, line = self._mixture.locate(index)
    where = self._mixture.files[dataset].where(line)
    return str(
      where.error(
        f"{tokens} tokens and {tiles} tiles exceed data.max_packed_tokens={self._packing.max_tokens} or "
        f"data.num_images_expected={self._packing.max_tiles}; raise it, or lower max_dynamic_patch or max_seq_length"
      )
    )

  def _judge(self, micro_batches: list[batching.MicroBatch]) -> tuple[np.ndarray, list[str]]:
    """Returns the counters and the first offenders with these micro-batches counted in.

    Raises:
      DataError: a sample was lost, or too many were, or the first batch supervises nothing.
    """
    counts = self._counts.copy()
    offenders = list(self._offenders)
    if self._stream is not None:
      offenders += self._pass_rows(self._stream, counts)
    for micro in micro_batches:
      events = (np.ones_like(micro.truncated), micro.lengths == 0, micro.truncated, micro.fully_masked)
      for column, happened in enumerate(events):
        counts[:, column] += np.bincount(micro.datasets[happened], minlength=len(counts))
      offenders += micro.errors
    if len(offenders) > len(self._offenders) and self._loader.on_bad_sample == "error":
      raise DataError(offenders[len(self._offenders)])
    lost, read = int(counts[:, [1, 4]].sum()), int(counts[:, 0].sum())
    judged = max(read, min(self.num_samples, _FEWEST_JUDGED))
    if lost > self._loader.max_bad_fraction * judged and len(offenders) > len(self._offenders):
      raise DataError(
        f"{lost} of {read} samples could not be read, more than loader.max_bad_fraction="
        f"{self._loader.max_bad_fraction} of {judged}; the first: {' | '.join(offenders[:_OFFENDERS_SHOWN])}"
      )
    if self.next_step == 0 and all(micro.fully_masked[micro.lengths > 0].all() for micro in micro_batches):
      longest = max(int(micro.lengths.max()) for micro in micro_batches)
      raise DataError(
        f"no token is supervised in the first batch: {self.global_batch} samples of up to {longest} tokens; check "
        "that the conversations have 'gpt' turns and that data.max_seq_length reaches them"
      )
    return counts, offenders[:_OFFENDERS_SHOWN]

  def _pass_rows(self, stream: RowStream, counts: np.ndarray) -> list[str]:
    """Goes past the rows of a step, counts what they left out, and returns why, for the first of these."""
    start = stream.decided
    for _ in range(self.global_batch):
      next(stream)
      if stream.stats.rows % self._log_freq == 0:
        _log_fill(stream.stats)
    skipped = stream.skipped(start, stream.decided)
    for column, indices in ((1, skipped.unreadable), (4, skipped.over_long)):
      datasets = [self._mixture.locate(int(index))[0] for index in indices]
      lost = np.bincount(np.array(datasets, np.int64), minlength=len(counts))
      counts[:, 0] += lost
      counts[:, column] += lost
    left_out = np.concatenate(skipped)[:_OFFENDERS_SHOWN]
    return [self._why_left_out(int(index)) for index in left_out]

  def _fingerprint(self) -> dict[str, int]:
    """Returns what must be equal for a step number to mean the same samples."""
    return {
      "num_samples": self.num_samples,
      "global_batch": self.global_batch,
      "order_seed": self._plan.seed,
      "shuffle": int(self._plan.shuffle),
      "order_checksum": self._plan.checksum(),
    }

  def _restore(self, state: dict[str, Any]) -> None:
    missing = {"next_step", "counters", "plan"} - state.keys()
    if missing:
      raise DataError(
        f"the loader's state lacks {', '.join(sorted(missing))}; it has {', '.join(sorted(state))}"
      )
    for key, now in self._fingerprint().items():
      then = state["plan"][key]
      if then != now:
        raise DataError(
          f"the run cannot go on with the same batches: {key} was {then} when its state was saved and is {now} now; "
          "restore the data and settings of then, or start anew with training.overwrite_output_dir=True"
        )
    for spec, counts in zip(self._mixture.specs, self._counts, strict=True):
      # A dataset may have been renamed: the samples are the same, and its counters start anew.
      counts[:] = [state["counters"].get(spec.name, {}).get(name, 0) for name in COUNTERS]
    self.next_step = int(state["next_step"])
    if self._packing is not None:
      try:
        self._stream = RowStream(self._plan, self._mixture.size_of, self._packing, state["rows"])
      except ValueError as error:
        raise DataError(
          f"the run cannot go on with the same batches: {error}; restore the settings of then, or start anew with "
          "training.overwrite_output_dir=True"
        ) from None


def _log_fill(stats: packing.PackStats) -> None:
  logging.info(
    "%d packed rows: %.1f %% of their tokens and %.1f %% of their tiles are filled, %.1f samples a row",
    *(stats.rows, 100 * stats.token_fill, 100 * stats.tile_fill, stats.samples_per_row),
  )


def pack_settings(data: DataTrainingArguments) -> PackSettings:
  """Returns the budgets of packed rows."""
  return PackSettings(
    max_tokens=data.max_packed_tokens,
    max_tiles=data.num_images_expected,
    look_ahead=look_ahead_of(data.max_buffer_size),
    allow_overflow=data.allow_overflow,
    over_long="drop",
  )


def _longest_row(data: DataTrainingArguments) -> int:
  """Returns the most tokens of a packed row: with `allow_overflow` its last sample may lie across the border."""
  return data.max_packed_tokens + (data.max_seq_length if data.allow_overflow else 0)


def _tile_sizes(data: DataTrainingArguments, loader: LoaderConfig, rows: int) -> tuple[int, ...]:
  """Returns the sizes of a shard's pool of tiles: the full budget of its rows alone in strict mode."""
  if data.use_packed_ds and data.strict_mode:
    return (data.num_images_expected * rows,)
  return loader.tile_buckets


def _prefetched(source: MicroBatchSource, workers: int, prefetch: int, micro_bytes: int) -> grain.IterDataset:
  """Returns the source's elements in order, decoded ahead by worker processes or by threads of this one."""
  dataset = grain.MapDataset.source(cast(Any, source))  # grain names the index differently
  if not workers:
    threads = min(prefetch, os.cpu_count() or 1)
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))
  if not flags.FLAGS.is_parsed():
    # Grain's process prefetch reads absl flags of its own, which only `app.run` parses; in a test, a notebook or
    # another program their defaults are right.
    flags.FLAGS.mark_as_parsed()
  # A worker decodes one micro-batch at a time: threads within it would only contend for the interpreter lock.
  iterable = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  in_flight = workers * (prefetch + 2) * micro_bytes
  options = grain.experimental.DatasetOptions(min_shm_size=_shared_memory_threshold(in_flight))
  iterable = grain.experimental.WithOptionsIterDataset(iterable, options)
  return iterable.mp_prefetch(
    grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
  )


def _shared_memory_threshold(in_flight: int) -> int:
  """Returns from which size in bytes on arrays travel through shared memory."""
  # A full /dev/shm (64 MB by default in Docker) kills the worker with a bus error; pipes are slower but safe.
  try:
    free = shutil.disk_usage("/dev/shm").free
  except OSError:  # a system without it
    free = 0
  return _SHARED_MEMORY_MIN_BYTES if in_flight < free else 1 << 62


def _refuse_unsupported(data: DataTrainingArguments, training: TrainingArguments) -> None:
  for name, value in (
    ("data.replacement", data.replacement),
    ("training.group_by_length", training.group_by_length),
  ):
    if value:
      raise DataError(f"{name}={value} is not supported yet; set it to False")


def _check_settings(
  training: TrainingArguments, loader: LoaderConfig, tokens_per_tile: int, data_shards: int
) -> None:
  fewest = (
    ("training.per_device_train_batch_size", training.per_device_train_batch_size, 1),
    ("training.gradient_accumulation_steps", training.gradient_accumulation_steps, 1),
    ("training.dataloader_num_workers", training.dataloader_num_workers, 0),
    ("loader.prefetch", loader.prefetch, 1),
    ("training.seed", training.seed, 0),
    ("training.data_seed", training.data_seed or 0, 0),
    ("tokens_per_tile", tokens_per_tile, 1),
    ("data_shards", data_shards, 1),
  )
  for name, value, least in fewest:
    if value < least:
      raise DataError(f"{name} must be {least} or more, got {value}")
  if training.max_steps <= 0 and training.num_train_epochs <= 0:
    raise DataError(
      f"nothing to train on: training.max_steps={training.max_steps} and "
      f"training.num_train_epochs={training.num_train_epochs}; set one of them above 0"
    )
  if loader.on_bad_sample not in ("error", "drop"):
    raise DataError(f"loader.on_bad_sample must be 'error' or 'drop', got {loader.on_bad_sample!r}")
