"""The loader: an iterator over the schedule of a run, with workers that decode it, counters and exact resume."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from internvl_jax.arguments import DataTrainingArguments, LoaderConfig, TrainingArguments
from internvl_jax.data.load import batching
from internvl_jax.data.load.counters import Tally
from internvl_jax.data.load.fingerprint import Varying
from internvl_jax.data.load.messages import goes_on_as_it_began, log_evenness, log_fill, other_batches
from internvl_jax.data.load.prefetch import DecodedAhead, MicroBatchSource
from internvl_jax.data.load.samples import Settings
from internvl_jax.data.load.settings import Shards, check_settings
from internvl_jax.data.load.streaming import open_samples
from internvl_jax.data.load.task import CONVERSATIONS, DataTask
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.data.schedule import packing
from internvl_jax.data.schedule.order import Places
from internvl_jax.data.schedule.schedule import Schedule
from internvl_jax.data.schedule.shapes import BatchShapes, tile_bucket
from internvl_jax.data.where import Where

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
    before: the state of the schedule before it.
  """

  batch: Any
  tally: Tally
  rows: list[Places]
  before: dict[str, Any] | None


class TrainLoader:
  """Iterates over the optimizer steps of a run as batches of numpy arrays, of the kind that its task makes.

  A = `gradient_accumulation_steps` micro-batches of R = `per_device_train_batch_size` * shards rows each.
  Batches depend on data, seed and settings, not on workers, prefetch or hosts. The state says how many batches were
  handed out; a loader that is given it goes on with the next one, bit for bit, without reading what came before.

  Each host decodes the rows of its own shards, and its batches hold these alone: side by side, those of all hosts are
  the batches of one. (But for padding, where an image that could be measured cannot be decoded: one host alone, that
  neither packs nor groups, never measured it.)

  Attributes:
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
    shards: Shards = Shards(),  # noqa: B008 - it is frozen
    task: DataTask = CONVERSATIONS,
  ):
    """Reads the meta file and finds all lines; workers start with the first batch.

    Args:
      data: which data, and how a sample becomes tokens and tiles.
      training: batch size, accumulation, epochs or steps, seeds, workers.
      loader: shuffling, bad samples, buckets, prefetch.
      tokenizer: of the conversations.
      tokens_per_tile: P, image tokens of one tile.
      shards: the data-parallel devices of the run, and this host's.
      task: what kind of line the data have, and how batches are made.

    Raises:
      DataError: a setting is wrong, or the data do not fit it.
    """
    check_settings(training, loader, tokens_per_tile, shards)
    self._data, self._training, self._loader = data, training, loader
    self._task, self._shards = task, shards
    self._tokens_per_tile, self._image_token_id = tokens_per_tile, tokenizer.image_token_id
    # What `MicroBatchSource` and the messages ask by numbers, and what the run does with it.
    self._source = open_samples(Settings(data, training, loader, tokenizer, tokens_per_tile, shards, task))
    self._samples = self._source.samples
    self._shapes = self._make_shapes()
    self._begin()

  @property
  def schedule(self) -> Schedule:
    """Which samples each step sees."""
    return self._source.schedule

  def _make_shapes(self) -> BatchShapes:
    # A sample's conversations share one row, each behind the prompt, which need not be one that they can share.
    longest = self._data.max_seq_length * self._task.conversations
    rows = self._training.per_device_train_batch_size
    return BatchShapes.of(self._data, self._loader, rows, longest, self._task.lines.longest_name)

  def _begin(self) -> None:
    """Goes to the first step."""
    self.next_step = 0
    self._cursor = self.schedule.cursor()
    self._tally = Tally(self._samples.names, self._loader, hosts=self._shards.feeders, epoch=self.num_samples)
    self._handed: dict[int, list[Places]] = {}
    self._iterator: DecodedAhead | None = None
    self._ready: _Ready | None = None
    self._closed, self._taught = False, False

  @property
  def num_samples(self) -> int:
    """Samples of an epoch."""
    return self._source.num_samples

  @property
  def global_batch(self) -> int:
    """A * R rows of an optimizer step, of all hosts."""
    return self.schedule.shape.rows * self._source.lanes

  @property
  def total_steps(self) -> int:
    """Optimizer steps of the run."""
    return self.schedule.total_steps

  @property
  def steps_per_epoch(self) -> int:
    """Optimizer steps that see all samples once, rounded up."""
    return self.schedule.steps_per_epoch

  @property
  def sequence_sizes(self) -> tuple[int, ...]:
    """Row lengths S that batches may have."""
    return self._shapes.sequence_sizes

  @property
  def _most_tiles(self) -> int:
    """The most tiles of a row."""
    packed = self.schedule.packing
    return self._samples.max_tiles() if packed is None else packed.max_tiles

  def next_sizes(self) -> dict[str, int]:
    """Sizes of the next batch's axes on this host, by their letters, as far as they can be told before it is decoded."""
    shape, fed, side = self.schedule.shape, len(self._shards.fed), self._data.force_image_size
    rows = self.schedule.cursor(self.next_step, self._cursor.get_state()).next_rows().rows
    length, pool = self._shapes.fitting(*self._room(rows, measure=True))
    sizes = {"A": shape.accumulation, "R": fed * shape.rows_per_shard, "S": length}
    return {**sizes, "D": fed, "T": pool, "H": side, "W": side}

  def _room(self, rows: list[Places], *, measure: bool = False) -> tuple[int, int]:
    """Tokens and tiles that all hosts' batches of these rows have room for; (0, 0) where that is not known.

    Args:
      rows: of a step.
      measure: sizes that are not indexed are found out.
    """
    if self._source.lanes > 1:  # Other hosts have rows that are not seen here.
      return self._shapes.sequence_sizes[-1], self._most_tiles * self.schedule.shape.rows_per_shard
    if self._source.measured:
      return self.schedule.room(rows)
    return self.schedule.room(rows, self._samples.sizes_now) if measure else (0, 0)

  def epoch_of(self, step: int) -> float:
    """How many times the data have been seen after `step` optimizer steps."""
    return self.schedule.epoch_of(step)

  # --- Batches ----------------------------------------------------------------------------------------------

  def __iter__(self) -> Iterator[Any]:
    return self

  def next(self, params: Any) -> Any:
    """Returns what `__next__` does: what data hold does not depend on parameters."""
    return next(self)

  def __next__(self) -> Any:
    """The next step's batch: tokens [A, R, S], tiles [A, D, T, H, W, 3], of this host's rows and shards.

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

  def metrics(self) -> dict[str, float]:
    """Nothing: what there is to tell of data is in the counters."""
    return {}

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
    before = self._cursor.get_state()
    try:
      micro_batches = [next(self._iterator) for _ in range(self.schedule.shape.accumulation)]
      tally = self._tally.copy()
      rows = self._take_rows(tally)
      self._count(micro_batches, tally)
      ready = _Ready(self._assemble(micro_batches, rows), tally, rows, before)
      self._source.advance(before, self._cursor.step - 1)
      return ready
    except Exception:
      # Whoever goes on after the error must meet it again, not the batch after it.
      self._stop()
      self._cursor = self.schedule.cursor(self.next_step, before)
      raise

  def _start(self) -> DecodedAhead:
    """Starts decoding at the next step."""
    shape, mine = self.schedule.shape, self._source.mine()
    source = MicroBatchSource(
      samples=self._samples,
      rows=self._cursor.micro_batches(),
      mine=mine,
      count=(self.total_steps - self.next_step) * shape.accumulation,
      tile_size=self._data.force_image_size,
      tokens_per_tile=self._tokens_per_tile,
      image_token_id=self._image_token_id,
      max_tiles=tile_bucket(len(mine) * self._most_tiles, self._shapes.tile_sizes),
      measured=self._source.measured,
    )
    return DecodedAhead(source, self._source.workers, self._loader.prefetch)

  def _stop(self) -> None:
    if self._iterator is not None:
      self._iterator.close()
      self._iterator = None

  def _take_rows(self, tally: Tally) -> list[Places]:
    """The samples of each row of a step, of all hosts; counts what packing passed over."""
    rows, skipped, evenness = self._cursor.next_rows(self._report_fill)
    if evenness is not None:
      log_evenness(self._cursor.step, evenness)
    for event, indices in skipped._asdict().items():
      datasets = np.array([self._samples.dataset_of(index) for index in indices.tolist()], np.int64)
      reasons = map(self._samples.why_lost, indices[:_REASONS].tolist())
      tally.add_skipped(event, datasets, reasons, by_all=self._source.lanes == 1)
    return rows

  def _report_fill(self, stats: packing.PackStats) -> None:
    if stats.rows % self._data.log_freq == 0:
      log_fill(stats)

  def _assemble(self, micro_batches: list[batching.MicroBatch], rows: list[Places]) -> Any:
    padding = batching.Padding(
      data_shards=len(self._shards.fed),
      image_token_id=self._image_token_id,
      sequence_sizes=self._shapes.sequence_sizes,
      tile_sizes=self._shapes.tile_sizes,
      # As in the reference, tokens of rows that hold one sample weigh the same.
      loss_reduction=self._data.loss_reduction if self._data.use_packed_ds else "token",
      at_least=self._room(rows),
    )
    return self._task.assemble(micro_batches, padding)

  def _count(self, micro_batches: list[batching.MicroBatch], tally: Tally) -> None:
    """Counts what became of the micro-batches' samples.

    Raises:
      DataError: a sample was lost that may not be, too many were, or the first batches supervise nothing.
    """
    tally.add_batch(micro_batches, self._tally)
    if not self._taught:
      self._check_taught(micro_batches, tally)
    elif tally.untaught > self._tally.untaught:
      tally.judge_untaught()

  def _check_taught(self, micro_batches: list[batching.MicroBatch], tally: Tally) -> None:
    """Ends a run whose first batches supervise nothing; under on_bad_sample="drop" the first one may be bad by chance."""
    taught = sum((~micro.happened("fully_masked") & (micro.lengths > 0)).sum() for micro in micro_batches)
    self._taught = bool(self._shards.all_sum(np.array([taught], np.int64))[0])
    seen, patience = self.next_step + 1, 1 if self._loader.on_bad_sample == "error" else _UNTAUGHT
    if not self._taught and seen >= min(patience, self.total_steps):
      raise tally.nothing_taught(micro_batches, seen, self.global_batch, self._task.lines.taught_hint)

  def counters(self) -> dict[str, dict[str, int]]:
    """For each dataset, what became of its samples in the batches handed out so far. See `Shards.all_sum`."""
    return self._tally.named(self._shards.all_sum(self._tally.read))

  # --- State ------------------------------------------------------------------------------------------------

  def get_state(self) -> dict[str, Any]:
    """The state by which a later loader goes on after the last batch handed out; JSON-able. See `Shards.all_sum`.

    {"next_step": 7, "counters": {"vqa": {"samples": 448, "unreadable": 0, ...}}, "plan": {...}, "content": {...}}

    Tells of annotation files that were touched since the last time.
    """
    self._source.tell_changes()
    state = {"next_step": self.next_step, "counters": self.counters(), "plan": self._plan_fingerprint()}
    state["content"] = self._source.content
    rows = self._ready.before if self._ready else self._cursor.get_state()
    return {**state, **self._source.pack_state(rows, self.next_step)}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to where an earlier loader said `get_state`; before the first batch.

    Raises:
      DataError: the state is of other data or settings.
    """
    assert self._iterator is None, "batches were handed out"
    rows = self._source.unpack_state(state)
    then_of, now_of = state["plan"], self._plan_fingerprint()
    # A fact of its kind of line that a state does not have was not so.
    for key in now_of | then_of:
      if (then := then_of.get(key, 0)) != (now := now_of.get(key, 0)):
        was = f"{key} was {then} when its state was saved and is {now} now"
        raise other_batches(was, "data and settings")
    self._tally.restore(state["counters"])
    self.next_step = int(state["next_step"])
    self._taught = self.next_step >= _UNTAUGHT
    try:
      self._cursor = self.schedule.cursor(self.next_step, rows)
    except ValueError as error:
      raise other_batches(str(error), "settings") from None
    if self._cursor.balance != self.schedule.balance:
      logging.info("%s", goes_on_as_it_began(self._cursor.balance))

  def _plan_fingerprint(self) -> dict[str, int]:
    """Facts that must be equal for a step number to mean the same samples."""
    facts = {name: int(value) for name, value in self._task.lines.facts.items()}
    return {**facts, **self.schedule.fingerprint()}

  def batch_samples(self, step: int) -> str:
    """The samples, of all hosts, of the batch that took the run from `step` to the next: datasets and lines.

    Raises:
      KeyError: that was too long ago.
    """
    named: dict[str, list[int]] = {}
    for row in self._handed[step]:
      for index in row.indices.tolist():
        where = self._samples.where(index)
        named.setdefault(where.file, []).append(where.line)
    return "; ".join(f"{file}:{','.join(map(str, lines))}" for file, lines in named.items())

  def record(self, index: int) -> tuple[Any, dict[str, Any]]:
    """The parsed line that a sample of the last batches comes from, and what of it is read."""
    return self._samples.record(index)

  def where(self, index: int) -> Where:
    """The line that a sample comes from."""
    return self._samples.where(index)

  def size_counts(self) -> list[dict[str, Any]]:
    """How many lines have how many tokens and tiles, by dataset; empty where sizes are not measured."""
    return self._source.size_counts()

  def dataset_lines(self) -> list[str]:
    """Lines on the datasets and their images, and one for the programs that their batches may need, for the log."""
    most = self._most_tiles * self.schedule.shape.rows_per_shard
    return [*self._samples.dataset_lines(), f"Batches: {self._shapes.programs_line(most)}"]

  def fingerprint(self) -> str:
    """A hash of the data and of all that makes samples of them; see `samples.SampleSource`."""
    return self._source.fingerprint()

  def shared_facts(self) -> dict[str, Any]:
    """Facts that must be equal on all hosts, as JSON values by their names in messages."""
    plan = {f"{name} of the plan": value for name, value in self._plan_fingerprint().items()}
    return {**self._source.shared_facts(), **plan, "steps of the run": self.total_steps}

  def first_varying(self) -> Varying | None:
    """The first dataset of which a sample may differ between epochs; None if none does."""
    return self._source.first_varying()

  def has_images(self) -> bool:
    """Whether any sample has an image or a video, as far as that can be told before it is read."""
    return self._source.has_images()

  def close(self) -> None:
    """Ends the workers and closes the files. The state can still be read."""
    self._closed = True
    self._stop()
    self._samples.close()
