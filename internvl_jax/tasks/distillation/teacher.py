"""The teacher of a distillation: opened, checked against the student, and asked about all data, once.

Letters: A micro-batches, R rows, S tokens of a row, K tokens that are kept.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from internvl_jax import consistency
from internvl_jax.batch import IGNORE_INDEX, TokenBatch
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.where import DataError
from internvl_jax.errors import UserError
from internvl_jax.hf.changes import Changes
from internvl_jax.hf.model import Source, base_folder, open_source
from internvl_jax.hf.tokenizer import placeholder_tokens
from internvl_jax.hf.vocabulary import open_tokenizer
from internvl_jax.inference_settings import read_stated
from internvl_jax.losses import distillation
from internvl_jax.losses.distillation import TopK
from internvl_jax.models.choice import choose_kernels
from internvl_jax.objectives import ForwardPass
from internvl_jax.parallel import batches, distributed, rules, zero
from internvl_jax.parallel.host_arrays import fetch_rows
from internvl_jax.parallel.mesh import data_axes, data_parts
from internvl_jax.state import with_dtypes
from internvl_jax.tasks.distillation.cache import Progress, TeacherLogProbs, token_dtype
from internvl_jax.tasks.distillation.data import SampleTokens, TeacherBatch
from internvl_jax.tasks.precomputed import WAIT_SECONDS
from internvl_jax.tasks.task import RunContext
from internvl_jax.watchdog import Watchdog

TITLE = "teacher"
"""Of the progress bar, and what a run is at meanwhile."""

PART_STEPS, PART_BYTES = 64, 1 << 28
"""Most steps whose log-probabilities a host collects before it writes them, and most bytes of full rows."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Teacher:
  """A model that is asked for its next-token probabilities.

  Attributes:
    name: what names it, for messages.
    source: its checkpoint.
    forward: how a batch goes through it.
    size: tokens of the tokenizer, which both models share.
    top_k: K.
    temperature: what its logits are divided by.
    bf16: whether it computes in bfloat16.
    zero_stage: how its weights are sharded, see `rules.state_shardings`.
    mesh: the devices.
    watchdog: is told of every batch.
  """

  name: str
  source: Source
  forward: ForwardPass
  size: int
  top_k: int
  temperature: float
  bf16: bool
  zero_stage: int
  mesh: jax.sharding.Mesh
  watchdog: Watchdog

  def key(self, loader: TrainLoader) -> dict[str, Any]:
    """What its log-probabilities depend on, as JSON values.

    Args:
      loader: of the data.
    """
    files = sorted(map(str, consistency.weights(self.source).values()))
    return {
      "checkpoint": hashlib.sha256(repr(files).encode()).hexdigest()[:32],
      "model": hashlib.sha256(repr(self.source.config).encode()).hexdigest()[:16],
      "pixels": self.forward.normalize_type,
      "data": loader.fingerprint(),
      "dtype": str(np.dtype(self.forward.how.dtype)),
      "top_k": self.top_k,
      "temperature": self.temperature,
      "tokens": self.size,
      "samples": loader.num_samples,
    }

  def load(self) -> dict[str, jax.Array]:
    """Its parameters by path, in the compute dtype, sharded over the mesh."""
    model = self.source.model
    shapes = with_dtypes(model, set(), bf16=self.bf16)
    places = rules.state_shardings(model.axes, shapes, set(), self.mesh, zero_stage=self.zero_stage)
    with self.watchdog.phase("weights"):
      return self.source.load(shapes, places.params)

  @functools.cached_property
  def program(self) -> Callable[[Mapping[str, jax.Array], TokenBatch], TopK]:
    """What it says of a batch, [A, R, S, ...], sharded over rows alone; compiled for each shape."""
    over_rows = NamedSharding(self.mesh, PartitionSpec(None, data_axes(self.mesh)))
    return jax.jit(self._top_of_batch, out_shardings=over_rows)

  def _top_of_batch(self, params: Mapping[str, jax.Array], batch: TokenBatch) -> TopK:
    with rules.scope(self.mesh):
      return jax.lax.map(functools.partial(self._top, params), batch)

  def _top(self, params: Mapping[str, jax.Array], rows: TokenBatch) -> TopK:
    model = self.source.model.bind(params)
    hidden, _ = self.forward.hidden(model, rows, self.forward.features(model, rows.tiles, None), None)
    kernel = model.language_model.output_embedding
    return distillation.top_log_probs(
      hidden, kernel, k=self.top_k, size=self.size, temperature=self.temperature
    )


def open_teacher(context: RunContext) -> Teacher:
  """Opens the teacher of a run; reads no weights.

  Raises:
    UserError: it cannot be opened, or does not suit the student.
  """
  config, asked = context.config, context.config.distillation
  assert asked.teacher is not None
  tokenizer = open_tokenizer(asked.teacher)
  source = open_source(asked.teacher, Changes(quantize=config.runtime.quantize))
  size = check_tokens(asked.teacher, tokenizer, context)
  if asked.top_k > size:
    raise UserError(f"distillation.top_k={asked.top_k}: the tokenizer has {size} tokens; lower it")
  _check_tiles(asked.teacher, source, context)
  stated = read_stated(source, tokenizer)
  if stated.template.name != config.data.conv_style:
    logging.warning(
      "The teacher (%s) was trained with the template %r, and is asked with data.conv_style=%r",
      *(asked.teacher, stated.template.name, config.data.conv_style),
    )
  student: ForwardPass = context.objective
  runtime = config.runtime
  kernels = choose_kernels(source.config, attention=runtime.attention, experts=runtime.experts)
  return Teacher(
    name=asked.teacher,
    source=source,
    forward=ForwardPass(
      model=source.model,
      how=dataclasses.replace(student.how, kernels=kernels, remat=None, scan_unroll=1),
      normalize_type=stated.data.normalize_type,
      shards=student.shards,
    ),
    size=size,
    top_k=asked.top_k,
    temperature=asked.temperature,
    bf16=config.training.bf16,
    zero_stage=zero.read_stage(config.training.deepspeed),
    mesh=context.mesh,
    watchdog=context.watchdog,
  )


def check_tokens(name: str, tokenizer: PreTrainedTokenizerBase, context: RunContext) -> int:
  """The number of tokens that teacher and student share: all that either has, with the same ids.

  Args:
    name: the teacher.
    tokenizer: the teacher's.
    context: of the student's run.

  Raises:
    UserError: they differ.
  """
  theirs, ours = _ids(tokenizer, base_folder(name)), _ids(context.tokenizer, context.source.folder)
  for index in sorted({*theirs, *ours}):
    if theirs.get(index) != ours.get(index):
      first, second = (
        f"token {index} is {found[index]!r}" if index in found else f"there is no token {index}"
        for found in (theirs, ours)
      )
      raise UserError(
        f"distillation.teacher={name!r}: {first}, but of the model that trains, {second}; name a teacher with the same "
        "tokenizer: probabilities are compared token by token"
      )
  return max(ours) + 1


def _ids(tokenizer: PreTrainedTokenizerBase, folder: Any) -> dict[int, str]:
  spared = placeholder_tokens(folder)
  return {index: token for token, index in tokenizer.get_vocab().items() if token not in spared}


def _check_tiles(name: str, source: Source, context: RunContext) -> None:
  """Sees that an image is as many tokens, and is cut in the same way, for both."""
  theirs, ours = source.config, context.source.config
  for what, (first, second) in {
    "image tokens a tile": (theirs.tokens_per_tile, ours.tokens_per_tile),
    "pixels a tile's side": (theirs.vision.image_size, ours.vision.image_size),
  }.items():
    if first != second:
      raise UserError(
        f"distillation.teacher={name!r} has {first} {what}, and the model that trains has {second}: they would not see the "
        "same tokens; name another teacher, or set data.force_image_size and data.down_sample_ratio to the teacher's"
      )


# --- Asking -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Pass:
  """The teacher's pass over all data; what it says is written by the hosts side by side, and goes on where it was ended.

  Attributes:
    teacher: the teacher.
    known: where it is written.
    make_loader: makes a loader of `TeacherBatch`es that reads the data in order.
    quiet: shows no bar of how far it is.
  """

  teacher: Teacher
  known: TeacherLogProbs
  make_loader: Callable[[], TrainLoader]
  quiet: bool = False

  def run(self, key: dict[str, Any]) -> None:
    """Asks the teacher what is not known yet, and frees its weights; a call that all processes make."""
    loader = self.make_loader()
    progress = self._go_on(loader, key)
    params = self.teacher.load()
    logging.info(
      "The teacher (%s) is asked about %d samples: %d bytes for each supervised token",
      *(self.teacher.name, loader.num_samples, token_dtype(self.teacher.top_k).itemsize),
    )
    progress = self._ask(params, loader, progress)
    if distributed.is_first():
      self.known.finish(progress, loader.num_samples)
    distributed.barrier("the teacher's log-probabilities are written", seconds=WAIT_SECONDS)
    loader.close()
    for value in params.values():
      value.delete()

  def _go_on(self, loader: TrainLoader, key: dict[str, Any]) -> Progress:
    """Where an earlier pass ended, to which the loader goes; or the beginning."""
    progress = self.known.progress()
    if progress is not None:
      try:
        loader.set_state(progress.loader)
        logging.info("The teacher goes on from batch %d", progress.steps)
        return progress
      except DataError as error:
        logging.warning("The teacher begins anew: %s", error)
    if distributed.is_first():
      self.known.begin(key)
    distributed.barrier("the teacher's folder is there", seconds=WAIT_SECONDS)
    feeders = 1 + max(data_parts(self.teacher.mesh))
    return Progress(steps=0, firsts=[], feeders=feeders, loader={})

  def _ask(self, params: Mapping[str, jax.Array], loader: TrainLoader, progress: Progress) -> Progress:
    steps = math.ceil(loader.schedule.rows_per_epoch / loader.global_batch)
    each, hidden = self._part_steps(loader), self.quiet or not distributed.is_first()
    bar = tqdm(total=steps, initial=progress.steps, desc=TITLE, unit="batch", disable=hidden)
    with bar:
      while progress.steps < steps:
        last = min(progress.steps + each, steps)
        written = self._write_part(params, loader, progress.steps, last, bar)
        distributed.barrier(f"the teacher's part {progress.steps}", seconds=WAIT_SECONDS)
        firsts = [*progress.firsts, progress.steps]
        if distributed.is_first() and len(firsts) == 1:
          self.known.check_room(written * progress.feeders, (steps - last) / last)
        progress = dataclasses.replace(progress, steps=last, firsts=firsts, loader=loader.get_state())
        if distributed.is_first():
          self.known.save_progress(progress)
    return progress

  def _part_steps(self, loader: TrainLoader) -> int:
    """Steps of a part: the same on all hosts."""
    tokens = loader.global_batch * loader.sequence_sizes[-1] // (1 + max(data_parts(self.teacher.mesh)))
    return max(1, min(PART_STEPS, PART_BYTES // (tokens * token_dtype(self.teacher.top_k).itemsize)))

  def _write_part(
    self, params: Mapping[str, jax.Array], loader: TrainLoader, first: int, last: int, bar: Any
  ) -> int:
    """Asks about the batches of steps `first` to `last`; returns the bytes that this host wrote, if it is to write."""
    samples, tokens = list[SampleTokens](), list[np.ndarray]()
    under_way: tuple[TeacherBatch, TopK] | None = None
    for _ in range(first, last):
      with self.teacher.watchdog.phase(TITLE):
        batch = next(loader)
        asked = batch, self.teacher.program(params, batches.place_batch(batch.rows, self.teacher.mesh))
        if under_way is not None:  # Devices are at the next one meanwhile.
          tokens.append(_of_targets(*under_way))
      samples += batch.samples
      under_way = asked
      bar.update()
    assert under_way is not None
    tokens.append(_of_targets(*under_way))
    parts, me = data_parts(self.teacher.mesh), jax.process_index()
    if parts.index(parts[me]) != me:  # Another process has the same rows.
      return 0
    return self.known.write(first, parts[me], samples, tokens)


def _of_targets(batch: TeacherBatch, found: TopK) -> np.ndarray:
  """What the teacher says of this host's targets, `token_dtype` [targets]."""
  real = batch.rows.targets != IGNORE_INDEX
  ids, logps, tail = map(fetch_rows, found)
  out = np.zeros(int(real.sum()), token_dtype(ids.shape[-1]))
  out["ids"], out["logps"], out["tail"] = ids[real], logps[real], tail[real]
  return out
