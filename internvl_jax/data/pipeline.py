"""The loader: plan -> workers that decode micro-batches -> padded batches, with counters and exact resume."""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from typing import Any, cast

import grain
import numpy as np
from absl import flags

from internvl_jax.arguments import DataTrainingArguments, LoaderConfig, TrainingArguments
from internvl_jax.batch import SFTBatch
from internvl_jax.data import batching
from internvl_jax.data import plan as plans
from internvl_jax.data.errors import DataError
from internvl_jax.data.sample import Mixture, Sample
from internvl_jax.data.tokenize import ChatTokenizer

COUNTERS = ("samples", "unreadable", "truncated", "fully_masked")

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
  """

  mixture: Mixture
  plan: plans.Plan
  rows: int
  start: int
  count: int
  tile_size: int
  tokens_per_tile: int
  image_token_id: int

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, element: int) -> batching.MicroBatch:
    places = self.plan.places((self.start + element) * self.rows, self.rows)
    rows = [self._row(int(e), int(i)) for e, i in zip(*places, strict=True)]
    return batching.pack_rows(
      rows,
      tile_size=self.tile_size,
      tokens_per_tile=self.tokens_per_tile,
      image_token_id=self.image_token_id,
    )

  def _row(self, epoch: int, index: int) -> Sample | batching.Unreadable:
    # An unreadable sample travels beside the readable ones, so that the main process decides about it, and only
    # once the batch is consumed: the same moment for any number of workers.
    try:
      return self.mixture.decode(epoch, index)
    except DataError as error:
      return batching.Unreadable(self.mixture.locate(index)[0], str(error))


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
    self._mixture = Mixture(data, tokenizer, tokens_per_tile=tokens_per_tile, seed=training.seed)
    self._rows = training.per_device_train_batch_size * data_shards
    self._accumulation = training.gradient_accumulation_steps
    self._data_shards = data_shards
    self._tile_size, self._tokens_per_tile = data.force_image_size, tokens_per_tile
    self._image_token_id = tokenizer.image_token_id
    order_seed = training.seed if training.data_seed is None else training.data_seed
    self.num_samples = self._mixture.num_samples
    self._plan = plans.Plan(self.num_samples, order_seed, loader.shuffle)
    self.global_batch = self._rows * self._accumulation
    self.steps_per_epoch = plans.total_steps(self.num_samples, 1, self.global_batch)
    self.total_steps = (
      training.max_steps
      if training.max_steps > 0
      else plans.total_steps(self.num_samples, training.num_train_epochs, self.global_batch)
    )
    self.sequence_sizes = batching.sequence_buckets(data.max_seq_length, loader.sequence_buckets)
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
    try:
      micro_batches = [next(self._iterator) for _ in range(self._accumulation)]
      counts, offenders = self._judge(micro_batches)
    except Exception:
      # Whoever goes on after the error must meet it again, not the batch after it.
      self._stop()
      raise
    self._counts, self._offenders = counts, offenders
    self.next_step += 1
    return batching.assemble(
      micro_batches,
      data_shards=self._data_shards,
      image_token_id=self._image_token_id,
      sequence_sizes=self.sequence_sizes,
      tile_sizes=self._loader.tile_buckets,
    )

  def get_state(self) -> dict[str, Any]:
    """Returns what a later loader needs to go on after the last batch handed out; JSON-able.

    {"next_step": 7, "counters": {"vqa": {"samples": 448, "unreadable": 0, ...}}, "plan": {...}}
    """
    return {"next_step": self.next_step, "counters": self.counters(), "plan": self._fingerprint()}

  def counters(self) -> dict[str, dict[str, int]]:
    """Returns for each dataset what became of its samples in the batches handed out so far."""
    names = (spec.name for spec in self._mixture.specs)
    return {
      name: dict(zip(COUNTERS, counts, strict=True))
      for name, counts in zip(names, self._counts.tolist(), strict=True)
    }

  def epoch_of(self, step: int) -> float:
    """Returns how many times the data have been seen after `step` optimizer steps."""
    return step * self.global_batch / self.num_samples

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
    )
    return iter(
      _prefetched(source, self._training.dataloader_num_workers, self._loader.prefetch, self._micro_bytes())
    )

  def _micro_bytes(self) -> int:
    """Returns the most bytes that the tiles of a micro-batch may take."""
    return self._rows * self._mixture.max_tiles() * 3 * self._tile_size**2

  def _judge(self, micro_batches: list[batching.MicroBatch]) -> tuple[np.ndarray, list[str]]:
    """Returns the counters and the first offenders with these micro-batches counted in.

    Raises:
      DataError: a sample was lost, or too many were, or the first batch supervises nothing.
    """
    counts = self._counts.copy()
    offenders = list(self._offenders)
    for micro in micro_batches:
      events = (np.ones_like(micro.truncated), micro.lengths == 0, micro.truncated, micro.fully_masked)
      for column, happened in enumerate(events):
        counts[:, column] += np.bincount(micro.datasets[happened], minlength=len(counts))
      offenders += micro.errors
    if len(offenders) > len(self._offenders) and self._loader.on_bad_sample == "error":
      raise DataError(offenders[len(self._offenders)])
    lost, read = int(counts[:, 1].sum()), int(counts[:, 0].sum())
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
    ("data.use_packed_ds", data.use_packed_ds),
    ("data.use_data_resampling", data.use_data_resampling),
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
