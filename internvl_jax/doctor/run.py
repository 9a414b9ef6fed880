"""Measures and decodes all samples of a configuration's data, and prints what a run would lose."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tqdm

from internvl_jax.config import TrainConfig
from internvl_jax.data.load.inspection import DatasetReport, decode_all, examine, note_lines
from internvl_jax.data.load.mixture import Mixture
from internvl_jax.data.load.show import as_json, show_sample
from internvl_jax.data.sample.notes import NotesShown
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.data.schedule import packing
from internvl_jax.data.schedule.balance import RowCost, waiting
from internvl_jax.data.schedule.packed_rows import RowStream, packable
from internvl_jax.data.schedule.packed_steps import StepShape
from internvl_jax.data.schedule.schedule import make_order
from internvl_jax.data.schedule.shapes import pack_settings
from internvl_jax.data.source.files import default_cache
from internvl_jax.data.where import DataError
from internvl_jax.errors import UserError
from internvl_jax.open_model import open_model
from internvl_jax.setup.balance import run_row_cost
from internvl_jax.setup.export import open_export
from internvl_jax.setup.held_out import start_check
from internvl_jax.storage.paths import filled_file, output_path
from internvl_jax.tasks import open_task

# Numbers of devices that balance is reported for, of at most so many rows: what packs in a second or two.
_DEVICES = (8, 64)
_MEASURED_ROWS = 4096
# Of fewer steps, one says little of the others.
_LEAST_STEPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """What is asked of a look at the data, beside the configuration.

  Attributes:
    show: the number of samples to print.
    dump: a jsonl to write every sample's ids, labels and tiles to; None for none.
    picture: a picture to write, with histograms of tokens and tiles; None for none.
    decode: whether images and videos are decoded, and not only their headers read.
  """

  show: int = 0
  dump: str | None = None
  picture: str | None = None
  decode: bool = True


def examine_data(config: TrainConfig, request: Request) -> bool:
  """Examines the data of a configuration and prints what it finds; whether nothing would be lost."""
  source, tokenizer = open_model(config, with_weights=False)
  chat = ChatTokenizer(tokenizer, config.data.conv_style, rows=source.config.text.vocab_size)
  task = open_task(config, source)
  open_export(config, source, tokenizer, chat, task)
  cache = config.loader.cache_dir or default_cache()
  mixture = Mixture(
    config.data,
    chat,
    tokens_per_tile=source.config.tokens_per_tile,
    seed=config.training.seed,
    policy=config.loader.on_over_length,
    cache=cache,
    lines=task.data.lines,
  )
  mixture.index_sizes(cache, workers=os.cpu_count() or 1, quiet=config.training.disable_tqdm)
  reports = examine(mixture)
  planned = config.data.use_packed_ds or config.training.group_by_length
  damaged, notes = decode(mixture, packed=planned) if request.decode else ([], [])
  print(table(reports))
  for dataset in mixture.datasets:
    print(f"{dataset.spec.name} is read as {dataset.form()}")
  print(sizes(reports))
  if config.data.use_packed_ds:
    stats = fill(mixture, pack_settings(config.data))
    print(fill_line(stats))
    for line in waiting_lines(config, mixture, run_row_cost(config, source, task), stats.rows):
      print(line)
  remarks = [*note_lines(mixture, workers=os.cpu_count() or 1), *notes, *mixture.decoding_lines()]
  for line in remarks:
    print(f"note: {line}")
  for line in [*(line for report in reports for line in report.examples), *damaged]:
    print(f"lost: {line}")
  held_out = start_check(config, source, chat, task).problems()
  for line in held_out:
    print(f"held out: {line}")
  write_outputs(mixture, chat, reports, request)
  mixture.close()
  print(summary(reports, lost=sum(report.lost for report in reports) + len(damaged), held_out=len(held_out)))
  return not (damaged or held_out or any(report.lost for report in reports))


def summary(reports: Sequence[DatasetReport], *, lost: int, held_out: int) -> str:
  """What it comes to, in a line."""
  parts = [f"{lost} of {sum(report.lines for report in reports)} lines would be lost"] if lost else []
  parts += [f"{held_out} lines of the held-out data cannot be used"] if held_out else []
  return ", ".join(parts) or "nothing would be lost"


def decode(mixture: Mixture, *, packed: bool) -> tuple[list[str], list[str]]:
  """Why lines cannot be decoded, and what one should know about the others, with a bar of how far that is."""
  notes = NotesShown()
  with tqdm.tqdm(
    total=sum(dataset.num_samples for dataset in mixture.datasets), desc="decoding", unit="sample"
  ) as bar:
    workers = os.cpu_count() or 1
    lost = list(decode_all(mixture, packed=packed, workers=workers, progress=bar.update, noted=notes.add))
  return lost, notes.lines()


def table(reports: Sequence[DatasetReport]) -> str:
  """A line for each dataset."""
  columns = ("lines", "samples", "unreadable", "over_long", "masked", "shortened", "split")
  width = max(len("dataset"), *(len(report.name) for report in reports))
  rows = [f"{'dataset':<{width}}" + "".join(f"{column:>12}" for column in columns)]
  rows += [
    f"{report.name:<{width}}" + "".join(f"{getattr(report, column):>12,}" for column in columns)
    for report in reports
  ]
  return "\n".join(rows)


def sizes(reports: Sequence[DatasetReport]) -> str:
  """The distribution of tokens and tiles over all readable lines."""
  rows = []
  for name in ("tokens", "tiles"):
    values = np.concatenate([getattr(report, name) for report in reports])
    if len(values):
      points = np.percentile(values, [0, 50, 90, 99, 100]).round().astype(int)
      rows.append(
        f"{name} a sample: least {points[0]}, half up to {points[1]}, 90 % {points[2]}, 99 % {points[3]}, most {points[4]}"
      )
  return "\n".join(rows)


def fill(mixture: Mixture, settings: packing.PackSettings) -> packing.PackStats:
  """Packs an epoch in file order."""
  packer = packing.Packer(settings)
  chosen = packable(mixture.size_of(np.arange(mixture.num_samples)), settings)
  for rows in (packer.feed(chosen), packer.flush()):
    for _ in rows:
      pass
  return packer.stats


def fill_line(stats: packing.PackStats) -> str:
  """How full packed rows are."""
  return (
    f"{stats.rows:,} packed rows an epoch: {100 * stats.token_fill:.1f} % of their tokens and "
    f"{100 * stats.tile_fill:.1f} % of their tiles are filled, {stats.samples_per_row:.1f} samples a row"
  )


def waiting_lines(config: TrainConfig, mixture: Mixture, cost: RowCost, rows: int) -> list[str]:
  """How long devices would wait for the slowest of them: a line for each number of devices that the data suffice for.

  Args:
    config: the run's.
    mixture: its data, their sizes indexed.
    cost: what rows cost a device.
    rows: packed rows of an epoch.
  """
  rows = min(rows, _MEASURED_ROWS)
  found = [devices for devices in _DEVICES if rows >= _LEAST_STEPS * devices]
  if not found:
    return []
  shape = StepShape(accumulation=1, shards=1, rows_per_shard=1)
  samples, shuffle = tuple(mixture.sizes.tolist()), config.loader.shuffle
  order = make_order(
    config.data, config.training, shuffle=shuffle, samples=samples, shape=shape, length_of=mixture.lengths_of
  )
  stream = RowStream(order, mixture.size_of, pack_settings(config.data))
  chosen = [next(stream).indices for _ in range(rows)]
  costs = cost.of_rows(mixture.size_of(np.concatenate(chosen)), np.array([len(row) for row in chosen]))
  lines = []
  for devices in found:
    before, after = waiting(costs, devices, max(1, config.loader.balance_steps))
    line = f"{devices} devices: the slowest has {before:.3f} times the mean's work as rows come"
    if config.loader.balance_steps:
      line += f", {after:.3f} times balanced over {config.loader.balance_steps} steps"
    lines.append(line)
  return lines


def write_outputs(
  mixture: Mixture, chat: ChatTokenizer, reports: Sequence[DatasetReport], request: Request
) -> None:
  """Prints samples, writes the dump and the picture, as asked."""
  for index in range(min(request.show, mixture.num_samples)):
    try:
      print(show_sample(mixture.decode(0, index), chat, mixture.lines))
    except DataError as error:
      print(f"not shown: {error}")
  if request.dump:
    with filled_file(output_path(request.dump, "--dump")) as path:
      dump(mixture, path)
  if request.picture:
    with filled_file(output_path(request.picture, "--picture")) as path:
      draw(reports, path)


def dump(mixture: Mixture, path: Path) -> None:
  """Writes ids, labels and number of tiles of every sample; a line that is split has several."""
  first = 0
  with path.open("w", encoding="utf-8") as file:
    for dataset, size in zip(mixture.datasets, mixture.sizes.tolist(), strict=True):
      samples = np.arange(dataset.num_samples)
      for sample in samples[dataset.sizes_of(samples)[:, 0] > 0].tolist():
        try:
          decoded = mixture.decode(0, first + sample)
        except DataError as error:
          print(f"not dumped: {error}")
          continue
        entry = {"dataset": dataset.spec.name, "index": dataset.locate(sample)[0]}
        entry |= as_json(decoded, mixture.lines)
        file.write(json.dumps({**entry, "num_tiles": len(decoded.tiles)}) + "\n")
      first += size


def draw(reports: Sequence[DatasetReport], path: Path) -> None:
  """Writes histograms of tokens and tiles, a color for each dataset."""
  try:
    import matplotlib.pyplot as plt
  except ImportError:
    raise UserError("--picture needs matplotlib: pip install matplotlib") from None
  figure, axes = plt.subplots(1, 2, figsize=(10, 4))
  for axis, name in zip(axes, ("tokens", "tiles"), strict=True):
    values = [getattr(report, name) for report in reports]
    axis.hist(values, bins=40, stacked=True, label=[report.name for report in reports])
    axis.set_xlabel(f"{name} a sample")
  axes[0].set_ylabel("lines")
  axes[0].legend()
  figure.tight_layout()
  figure.savefig(path)
