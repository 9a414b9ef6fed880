"""Measures how fast photographs become batches, beside what decoding and resizing by Pillow alone take.

  python benchmarks/bench_data.py [--images 240] [--rounds 20] [--json out.json]
  python benchmarks/bench_data.py --quick
  python benchmarks/bench_data.py --lines 10000000

Contenders, on the same JPEG files, on one core and then on all of them:

  floor    what Pillow itself takes: open, convert to RGB, bicubic resize to the grid, crop the tiles, resize the
           thumbnail. The tiles stay Pillow images: no numpy array is made of them.
  plain    the floor, and of each tile, as torchvision does it, a resize to the size it has, ToTensor, Normalize; then
           all are stacked: float32 [tiles, 3, H, W].
  ours     `TrainLoader` with packed rows: plan, decode, cut, tokenise, pack, and hand over batch by batch.
  bare     the same without the extra `decode`, so that Pillow decodes and resizes; on one core only.

On one core a process is pinned to it, and of ours one thread decodes. On all cores the floor and the plain recipe are
one pinned process a core, each with its share of the images; ours is one loader, whose threads or worker processes
decode. All processes live through all rounds and are stopped (SIGSTOP) while it is not their turn, so contenders take
turns every few seconds and meet the same disturbances. Left out of every time: imports, the index of the data, the
start of workers and the first batches. Files are read from the page cache. A loader is consumed faster than it makes
batches, so what is in flight at the beginning of a round is as much as at its end.

Needs Linux (/proc, CPU affinity) and scikit-image, whose photographs are cropped and resized to 0.25-2.5 megapixels.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import platform
import resource
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import PIL
from absl import app, flags
from PIL import Image, features

import bench_lines
import bench_photographs
from bench_turns import Lane, Measured, Prepare, Turn, compare, take_turn
from internvl_jax.arguments import DataTrainingArguments, LoaderConfig, TrainingArguments
from internvl_jax.data.load import loader as loaders
from internvl_jax.data.load.mixture import Mixture
from internvl_jax.data.sample import compiled, images, tiling
from internvl_jax.data.sample.tokenize import ChatTokenizer
from internvl_jax.data.schedule import order as orders
from internvl_jax.data.schedule import packed_rows
from internvl_jax.data.schedule.shapes import pack_settings
from internvl_jax.data.where import Where

_IMAGES = flags.DEFINE_integer("images", 240, "Photographs to make.")
_ROUNDS = flags.DEFINE_integer("rounds", 20, "Turns of each contender.")
_ROWS = flags.DEFINE_integer("rows", 8, "Packed rows of a turn; about six images each.")
_ACCUMULATION = flags.DEFINE_integer(
  "accumulation", 1, "Rows of a batch; divides --rows. Above 1 their tiles are copied to the batch."
)
_QUICK = flags.DEFINE_bool("quick", False, "A few small photographs and one short turn: shows that it runs.")
_CONTENDERS = flags.DEFINE_list("contenders", None, "Names of those that take part; all if unset.")
_LINES = flags.DEFINE_integer("lines", 0, "Measure an annotation file of so many lines in place of all else.")
_JSON = flags.DEFINE_string("json", None, "File for all numbers.")
_FOLDER = flags.DEFINE_string("folder", None, "Photographs are kept here; a temporary folder if unset.")
_SEED = flags.DEFINE_integer("seed", 0, "Of photographs, conversations and order.")

TOKENIZER = pathlib.Path(__file__).parents[1] / "tests" / "assets" / "tokenizer"
TILE, MAX_TILES, TOKENS_PER_TILE = 448, 12, 256


def main(argv: Sequence[str]) -> None:
  """Prints the table, and writes all numbers as JSON if asked to."""
  del argv
  print(machine())
  with contextlib.ExitStack() as stack:
    folder = pathlib.Path(_FOLDER.value or stack.enter_context(tempfile.TemporaryDirectory()))
    result = bench_lines.measure(folder, _LINES.value) if _LINES.value else bench_images(folder)
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps({"machine": machine(), **result}, indent=2))


def machine() -> str:
  """One line on what this runs on."""
  turbo = features.version_feature("libjpeg_turbo") if features.check_feature("libjpeg_turbo") else "none"
  cores = len(os.sched_getaffinity(0))
  return (
    f"{cores} cores of {processor()}, Linux {platform.release()}, Python {platform.python_version()}, "
    f"numpy {np.__version__}, Pillow {PIL.__version__}, libjpeg-turbo {turbo}; {compiled.note()}"
  )


def processor() -> str:
  for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
    if line.startswith("model name"):
      return line.partition(":")[2].strip()
  return platform.machine()


# --- The contenders -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
  """What goes to the contenders' processes.

  Attributes:
    folder: of the photographs.
    max_tokens: of a packed row.
    max_tiles: of a packed row.
    seed: of the order.
    warm_up: rows before the first turn.
    accumulation: rows of a batch, each a micro-batch.
    workers: worker processes of a loader.
    threads: decoding threads of a loader without workers.
  """

  folder: pathlib.Path
  max_tokens: int
  max_tiles: int
  seed: int
  warm_up: int
  accumulation: int = 1
  workers: int = 0
  threads: int = 1

  def path(self, index: int) -> str:
    return str(self.folder / f"{index}.jpg")

  def data(self) -> DataTrainingArguments:
    """The settings of the packed recipes."""
    return DataTrainingArguments(
      meta_path=str(self.folder / "meta.json"),
      conv_style="internvl2_5",
      force_image_size=TILE,
      max_seq_length=self.max_tokens,
      dynamic_image_size=True,
      use_thumbnail=True,
      max_dynamic_patch=MAX_TILES,
      use_packed_ds=True,
      max_packed_tokens=self.max_tokens,
      num_images_expected=self.max_tiles,
      strict_mode=False,
    )

  def tokenizer(self) -> ChatTokenizer:
    import transformers  # Here, because what only decodes does without it.

    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    return ChatTokenizer(tokenizer, self.data().conv_style)

  def loader(self) -> loaders.TrainLoader:
    """An endless loader."""
    training = TrainingArguments(
      per_device_train_batch_size=1,
      gradient_accumulation_steps=self.accumulation,
      max_steps=1 << 40,
      dataloader_num_workers=self.workers,
      seed=self.seed,
      disable_tqdm=True,
    )
    # Without workers so many threads decode as batches are made ahead, but no more than there are cores.
    config = LoaderConfig(cache_dir=str(self.folder / "cache"), prefetch=2 if self.workers else self.threads)
    return loaders.TrainLoader(
      self.data(), training, config, self.tokenizer(), tokens_per_tile=TOKENS_PER_TILE
    )

  def row_stream(self) -> Iterator[list[int]]:
    """The images of each row, in the loader's order."""
    data, policy = self.data(), LoaderConfig().on_over_length
    mixture = Mixture(
      data, self.tokenizer(), tokens_per_tile=TOKENS_PER_TILE, seed=self.seed, policy=policy, cache=None
    )
    mixture.index_sizes(self.folder / "cache", workers=0, quiet=True)
    order = orders.EpochOrder(mixture.num_samples, self.seed, shuffle=True)
    stream = packed_rows.RowStream(order, mixture.size_of, pack_settings(data))
    while True:
      yield next(stream).indices.tolist()


def floor_tiles(path: str) -> list[Image.Image]:
  """The tiles of an image and its thumbnail, as Pillow images."""
  image = Image.open(path).convert("RGB")
  columns, rows_ = tiling.grid(image.width, image.height, 1, MAX_TILES, TILE)
  whole = image.resize((columns * TILE, rows_ * TILE), Image.Resampling.BICUBIC)
  tiles = [
    whole.crop((x * TILE, y * TILE, (x + 1) * TILE, (y + 1) * TILE))
    for y in range(rows_)
    for x in range(columns)
  ]
  if len(tiles) > 1:
    tiles.append(image.resize((TILE, TILE), Image.Resampling.BICUBIC))
  return tiles


def plain_tiles(path: str) -> Any:
  """The tiles as the model takes them: float32 [tiles, 3, H, W], of torch where it is installed."""
  mean, std = images.normalization("imagenet")
  mean, std = mean[:, None, None], std[:, None, None]
  resized = [tile.resize((TILE, TILE), Image.Resampling.BICUBIC) for tile in floor_tiles(path)]
  try:
    import torch
  except ImportError:
    return np.stack([_normalized(np.array(tile), mean, std) for tile in resized])
  tensors = [torch.from_numpy(np.array(tile)).permute(2, 0, 1).contiguous() for tile in resized]
  mean, std = torch.from_numpy(mean), torch.from_numpy(std)
  return torch.stack([tensor.to(torch.float32).div(255).sub_(mean).div_(std) for tensor in tensors])


def _normalized(pixels: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
  tensor = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32)
  tensor /= 255
  tensor -= mean
  tensor /= std
  return tensor


@contextlib.contextmanager
def floor(job: Job) -> Iterator[Turn]:
  yield lambda indices, number: sum(len(floor_tiles(job.path(index))) for index in indices)


@contextlib.contextmanager
def plain(job: Job) -> Iterator[Turn]:
  yield lambda indices, number: sum(len(plain_tiles(job.path(index))) for index in indices)


@contextlib.contextmanager
def ours(job: Job) -> Iterator[Turn]:
  """Consumes our loader."""
  loader = job.loader()

  def turn(indices: Sequence[int], number: int) -> int:
    del indices
    image_tokens = 0
    for _ in range(number // job.accumulation):
      batch = next(loader)
      image_tokens += int((batch.image_index >= 0).sum())
      # Every page is touched: what another process wrote is mapped only then.
      batch.tiles.reshape(-1)[:: resource.getpagesize()].max(initial=0)
    return image_tokens // TOKENS_PER_TILE

  yield turn
  loader.close()


@contextlib.contextmanager
def bare(job: Job) -> Iterator[Turn]:
  """Consumes our loader, which finds nothing compiled."""
  with mock.patch.object(compiled, "load", compiled.Compiled), ours(job) as turn:
    yield turn


KINDS = {"floor": floor, "plain": plain, "ours": ours, "bare": bare}


@contextlib.contextmanager
def warm(kind: str, job: Job) -> Iterator[Turn]:
  """A contender after its first images or rows."""
  with KINDS[kind](job) as turn:
    turn(range(3), job.warm_up)
    yield turn


@dataclasses.dataclass(frozen=True)
class Contender:
  """Processes that take a turn together.

  Attributes:
    name: in the table.
    kind: key of KINDS.
    lanes: the cores of each process.
    workers: worker processes of a loader.
    threads: decoding threads of a loader without workers.
  """

  name: str
  kind: str
  lanes: tuple[tuple[int, ...], ...]
  workers: int = 0
  threads: int = 1

  def job(self, job: Job) -> Job:
    return dataclasses.replace(job, workers=self.workers, threads=self.threads)

  def prepare(self, job: Job) -> Prepare:
    return functools.partial(warm, self.kind, self.job(job))


def contenders() -> list[Contender]:
  """On one core first, then on all."""
  cores = tuple(sorted(os.sched_getaffinity(0)))
  one, each, n = ((cores[-1],),), tuple((core,) for core in cores), len(cores)
  found = [
    Contender("floor-1", "floor", one),
    Contender("plain-1", "plain", one),
    Contender("bare-1", "bare", one),
    Contender("ours-1", "ours", one),
    Contender("floor-all", "floor", each),
    Contender("plain-all", "plain", each),
    Contender("ours-all-threads", "ours", (cores,), threads=n),
    Contender("ours-all-processes", "ours", (cores,), workers=n),
  ]
  return [c for c in found if _CONTENDERS.value is None or c.name in _CONTENDERS.value]


# --- Turns --------------------------------------------------------------------------------------------------


def bench_images(folder: pathlib.Path) -> dict[str, Any]:
  """Makes the data, checks that all see the same pixels, and measures."""
  count, rounds, number = (6, 1, 2) if _QUICK.value else (_IMAGES.value, _ROUNDS.value, _ROWS.value)
  folder = folder / f"{count}-{_SEED.value}"
  if not (folder / "meta.json").exists():
    bench_photographs.write(folder, count, (0.05, 0.5) if _QUICK.value else (0.25, 2.5), _SEED.value)
  # As many rows as the workers make ahead, and some more.
  warm_up = _ACCUMULATION.value * (2 + 3 * len(os.sched_getaffinity(0)))
  job = Job(folder, 8192 if _QUICK.value else 16384, 48, _SEED.value, warm_up, _ACCUMULATION.value)
  print(describe(job, count))
  stream = job.row_stream()
  check_pixels(job, count)
  taking_part = contenders()
  turns: dict[str, list[Measured]] = {contender.name: [] for contender in taking_part}
  with contextlib.ExitStack() as stack:
    lanes = start(taking_part, job, stack)
    rows_ = list(itertools.islice(stream, warm_up + rounds * number))
    for first in range(warm_up, len(rows_), number):
      indices = [index for row in rows_[first : first + number] for index in row]
      wanted = sum(tiles_of(job, index) for index in indices)
      for contender in taking_part:
        measured, tiles = take_turn(lanes[contender.name], indices, number)
        assert tiles == wanted, (contender, tiles, wanted)
        turns[contender.name].append(measured)
  return report(turns)


def start(taking_part: Sequence[Contender], job: Job, stack: contextlib.ExitStack) -> dict[str, list[Lane]]:
  """Starts the contenders' processes and waits until they are warm."""
  lanes: dict[str, list[Lane]] = {}
  for contender in taking_part:
    lanes[contender.name] = [Lane(contender.prepare(job), cores) for cores in contender.lanes]
    for lane in lanes[contender.name]:
      stack.callback(lane.close)
  for lane in itertools.chain(*lanes.values()):
    lane.ready()
  return lanes


def tiles_of(job: Job, index: int) -> int:
  with Image.open(job.path(index)) as image:
    return tiling.num_tiles(*image.size, 1, MAX_TILES, TILE, use_thumbnail=True)


def describe(job: Job, count: int) -> str:
  """One line on the photographs."""
  with contextlib.ExitStack() as stack:
    sizes = [stack.enter_context(Image.open(job.path(index))).size for index in range(count)]
  pixels = [width * height for width, height in sizes]
  bits = sum(os.path.getsize(job.path(index)) for index in range(count)) * 8 / sum(pixels)
  tiles = statistics.mean(tiles_of(job, index) for index in range(count))
  return (
    f"{count} photographs of {min(pixels) / 1e6:.2f} to {max(pixels) / 1e6:.2f} megapixels (mean "
    f"{statistics.mean(pixels) / 1e6:.2f}), {bits:.1f} bits a pixel, {tiles:.1f} tiles of {TILE} pixels each, "
    f"packed into rows of {job.max_tokens} tokens and {job.max_tiles} tiles"
  )


def check_pixels(job: Job, count: int) -> None:
  """Asserts that the tiles of all contenders are the same, and that our batches hold them.

  Raises:
    AssertionError: a pixel differs.
  """
  mean, std = (part[:, None, None] for part in images.normalization("imagenet"))
  for index in range(count):
    wanted = np.stack([np.asarray(tile) for tile in floor_tiles(job.path(index))])
    np.testing.assert_array_equal(our_tiles(job, index), wanted)
    if index < 3:
      plain = np.asarray(plain_tiles(job.path(index)))
      np.testing.assert_allclose((plain * std + mean) * 255, wanted.transpose(0, 3, 1, 2), atol=1e-3)
  loader, stream = job.loader(), job.row_stream()
  for pool in next(loader).tiles[:, 0]:
    tiles = np.concatenate([our_tiles(job, index) for index in next(stream)])
    np.testing.assert_array_equal(pool[: len(tiles)], tiles)
    assert not pool[len(tiles) :].any()
  loader.close()
  print(f"the tiles of {count} photographs are the same to the pixel for all")


def our_tiles(job: Job, index: int) -> np.ndarray:
  """The tiles as our samples have them."""
  return images.image_tiles(
    images.open_image(job.path(index), Where("photographs", "photographs.jsonl", index + 1)),
    images.Cutting(tile_size=TILE, max_tiles=MAX_TILES, use_thumbnail=True, dynamic=True),
  )


# --- The report ---------------------------------------------------------------------------------------------

RATIOS = (
  ("ours-1", "floor-1"),
  ("bare-1", "floor-1"),
  ("ours-1", "plain-1"),
  ("ours-all-threads", "floor-all"),
  ("ours-all-processes", "floor-all"),
  ("ours-all-threads", "plain-all"),
  ("ours-all-processes", "plain-all"),
  ("floor-all", "floor-1"),
  ("ours-all-threads", "ours-1"),
  ("ours-all-processes", "ours-1"),
)


def report(turns: dict[str, list[Measured]]) -> dict[str, Any]:
  """Prints medians over the rounds, and ratios: within each round, and of the best round of each."""
  print(f"\n{'':<20}{'images/s':>10}{'tiles/s':>10}{'CPU ms an image':>18}{'least':>8}{'others':>8}")
  for name, measured in turns.items():
    images_, tiles, cpu, others = (
      statistics.median(getattr(m, f.name) for m in measured) for f in dataclasses.fields(Measured)
    )
    least = min(m.cpu_seconds for m in measured)
    print(f"{name:<20}{images_:>10.1f}{tiles:>10.0f}{1e3 * cpu:>18.1f}{1e3 * least:>8.1f}{others:>8.2f}")
  print(f"\n{'ratio of images/s':<34}{'median':>8}{'quartiles':>14}{'calm rounds':>14}{'of CPU time':>13}")
  ratios = {}
  for ours, other in RATIOS:
    if ours in turns and other in turns:
      ratio = ratios[f"{ours} / {other}"] = compare(turns[ours], turns[other])
      low, high = ratio["quartiles"]
      calm = f"{ratio['calm_median']:.3f} of {ratio['calm_rounds']}" if ratio["calm_rounds"] else "none"
      print(
        f"{f'{ours} / {other}':<34}{ratio['median']:>8.3f}{f'{low:.3f}-{high:.3f}':>14}{calm:>14}"
        f"{ratio['cpu']:>13.3f}"
      )
  print(
    "calm: rounds in which other processes took less than 5 % of a core; CPU time: of both, all rounds together"
  )
  return {
    "turns": {name: [dataclasses.asdict(m) for m in measured] for name, measured in turns.items()},
    "ratios": ratios,
  }


if __name__ == "__main__":
  app.run(main)
