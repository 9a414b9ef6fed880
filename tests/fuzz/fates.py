"""What the loader and the doctor make of every line of an annotation file."""

import collections
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internvl_jax.arguments import DataTrainingArguments, LoaderConfig, TrainingArguments
from internvl_jax.data.load import counters as counting
from internvl_jax.data.load import inspection
from internvl_jax.data.load import loader as loaders
from internvl_jax.data.load.batching import MicroBatch
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.load.mixture import Mixture
from internvl_jax.tasks.preference.data import PairData
from internvl_jax.tasks.preference.lines import PairLines
from internvl_jax.tasks.sft.data import DATA

TRAINED = "trained"

# Small tiles, of few tokens.
_TILES = {"force_image_size": 16, "dynamic_image_size": True, "use_thumbnail": True, "max_dynamic_patch": 4}
_FRAMES = {"min_num_frame": 2, "max_num_frame": 4}
_PACKED = {"use_packed_ds": True, "max_packed_tokens": 450, "num_images_expected": 8}
_LENGTH, _TOKENS_PER_TILE = 224, 4
# Of lines that both name the first of: so many are all.
_ALL = 1 << 30


_PAIRS = PairData(lines=PairLines())


def _settings(meta: Path, packed: bool) -> DataTrainingArguments:
  options: dict[str, Any] = {**_TILES, **_FRAMES, **(_PACKED if packed else {})}
  return DataTrainingArguments(
    meta_path=str(meta), conv_style="internvl2_5", max_seq_length=_LENGTH, **options
  )


def open_mixture(
  meta: Path, tokenizer: Any, *, packed: bool = False, pairs: bool = False, policy: Any = "truncate"
) -> Mixture:
  """The lines of a meta file, without their sizes."""
  return Mixture(
    _settings(meta, packed),
    tokenizer,
    tokens_per_tile=_TOKENS_PER_TILE,
    seed=42,
    policy=policy,
    cache=meta.parent / "cache",
    lines=_PAIRS.lines if pairs else DATA.lines,
  )


def open_loader(
  meta: Path, tokenizer: Any, *, packed: bool = False, pairs: bool = False, policy: Any = "truncate"
) -> TrainLoader:
  """The loader of a run of one epoch that drops what it cannot read, one row a batch."""
  training = TrainingArguments(
    per_device_train_batch_size=1,
    gradient_accumulation_steps=1,
    max_steps=-1,
    num_train_epochs=1,
    disable_tqdm=True,
  )
  loader = LoaderConfig(
    shuffle=False,
    on_bad_sample="drop",
    on_over_length=policy,
    max_bad_fraction=1.0,
    cache_dir=str(meta.parent / "cache"),
  )
  return TrainLoader(
    _settings(meta, packed),
    training,
    loader,
    tokenizer,
    tokens_per_tile=_TOKENS_PER_TILE,
    task=_PAIRS if pairs else DATA,
  )


def measure_and_make(mixture: Mixture, line: int) -> None:
  """Does with one line what the index of sizes and the loader do."""
  (dataset,) = mixture.datasets
  dataset._measure(dataset.file, line)
  mixture.decode(0, line)


def first_batch(meta: Path, tokenizer: Any, *, packed: bool) -> None:
  """Starts a run."""
  loader = open_loader(meta, tokenizer, packed=packed)
  try:
    loader.dataset_lines()
    next(loader)
  finally:
    loader.close()


def by_run(meta: Path, tokenizer: Any, **how: Any) -> tuple[dict[int, list[str]], dict[str, int]]:
  """Goes through an epoch; `how` as of `open_loader`.

  Returns:
    what became of every line, by its number: once for each row that had it or plan that passed it over; and
    the counters.
  """
  fates: dict[int, list[str]] = collections.defaultdict(list)
  with pytest.MonkeyPatch.context() as patch:
    add, skip = counting.Tally.add, counting.Tally.add_skipped

    def added(self: counting.Tally, micro: MicroBatch) -> None:
      for line, fate in _fates(micro, loader):
        fates[line].append(fate)
      add(self, micro)

    def skipped(
      self: counting.Tally, event: str, datasets: np.ndarray, reasons: Any, *, by_all: bool = True
    ) -> None:
      reasons = list(reasons)
      for reason in reasons:
        fates[line_of(reason)].append(reason)
      skip(self, event, datasets, reasons, by_all=by_all)

    patch.setattr(counting.Tally, "add", added)
    patch.setattr(counting.Tally, "add_skipped", skipped)
    patch.setattr(loaders, "_REASONS", _ALL)
    loader = open_loader(meta, tokenizer, **how)
    try:
      collections.deque(loader, maxlen=0)
      (counters,) = loader.counters().values()
    finally:
      loader.close()
  return dict(fates), counters


def _fates(micro: MicroBatch, loader: TrainLoader) -> list[tuple[int, str]]:
  """Returns (line, fate) of each sample of a micro-batch."""
  found, errors = [], iter(micro.errors)
  for index, masked in zip(micro.indices.tolist(), micro.happened("fully_masked"), strict=True):
    if index < 0:
      error = next(errors)
      found.append((line_of(error), error))
    else:
      where = loader._samples.where(index)
      found.append((where.line, f"{where}: no token is supervised" if masked else TRAINED))
  return found


def by_doctor(meta: Path, tokenizer: Any, **how: Any) -> dict[int, str]:
  """Returns what the doctor says of lines that would be lost, by their number; `how` as of `open_mixture`."""
  mixture = open_mixture(meta, tokenizer, **how)
  try:
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(inspection, "_NAMED", _ALL)
      mixture.index_sizes(meta.parent / "cache", workers=0, quiet=True)
      reports = inspection.examine(mixture)
      damaged = list(inspection.decode_all(mixture, packed=how.get("packed", False), workers=0))
  finally:
    mixture.close()
  named = [line for report in reports for line in report.examples]
  assert sum(report.lost for report in reports) == len(named), "the table says another number than the lines"
  return {line_of(reason): reason for reason in [*named, *damaged]}


def line_of(message: str) -> int:
  """Returns the number of the line that a message blames."""
  found = re.match(r".*?:(\d+) \(dataset ", message)
  assert found, message
  return int(found.group(1))
