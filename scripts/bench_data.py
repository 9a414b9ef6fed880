"""Measures how fast photographs become batches, beside what decoding and resizing alone take.

  python scripts/bench_data.py [--images 240] [--rounds 20] [--json out.json]
  python scripts/bench_data.py --quick
  python scripts/bench_data.py --lines 10000000

Contenders, on the same JPEG files, on one core and then on all of them:

  floor    what Pillow itself takes: open, convert to RGB, bicubic resize to the grid, crop the tiles, resize the
           thumbnail. The tiles stay Pillow images: no numpy array is made of them.
  plain    the floor, and of each tile, as torchvision does it, a resize to the size it has, ToTensor, Normalize; then
           all are stacked: float32 [tiles, 3, H, W].
  ours     `TrainLoader` with packed rows: plan, decode, cut, tokenise, pack, and hand over batch by batch.

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
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import resource
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import PIL
from absl import app, flags
from PIL import Image, features

from internvl_jax.arguments import DataTrainingArguments, LoaderConfig, TrainingArguments
from internvl_jax.data import images, jsonl, pipeline, plan, rows, sample, tiling
from internvl_jax.data.errors import Where
from internvl_jax.data.tokenize import ChatTokenizer

_IMAGES = flags.DEFINE_integer("images", 240, "Photographs to make.")
_ROUNDS = flags.DEFINE_integer("rounds", 20, "Turns of each contender.")
_BATCHES = flags.DEFINE_integer("batches", 8, "Packed rows of a turn; about six images each.")
_QUICK = flags.DEFINE_bool("quick", False, "A few small photographs and one short turn: shows that it runs.")
_CONTENDERS = flags.DEFINE_list("contenders", None, "Names of those that take part; all if unset.")
_LINES = flags.DEFINE_integer("lines", 0, "Measure an annotation file of so many lines in place of all else.")
_JSON = flags.DEFINE_string("json", None, "File for all numbers.")
_FOLDER = flags.DEFINE_string("folder", None, "Photographs are kept here; a temporary folder if unset.")
_SEED = flags.DEFINE_integer("seed", 0, "Of photographs, conversations and order.")

TOKENIZER = pathlib.Path(__file__).parents[1] / "tests" / "assets" / "tokenizer"
TILE, MAX_TILES, TOKENS_PER_TILE = 448, 12, 256
PHOTOGRAPHS = (
  *("astronaut", "coffee", "chelsea", "rocket", "retina", "hubble_deep_field", "immunohistochemistry"),
  "stereo_motorcycle",
)
TURN_SECONDS = 300


def main(argv: Sequence[str]) -> None:
  """Prints the table, and writes all numbers as JSON if asked to."""
  del argv
  print(machine())
  with contextlib.ExitStack() as stack:
    folder = pathlib.Path(_FOLDER.value or stack.enter_context(tempfile.TemporaryDirectory()))
    result = bench_lines(folder, _LINES.value) if _LINES.value else bench_images(folder)
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps({"machine": machine(), **result}, indent=2))


def machine() -> str:
  """One line on what this runs on."""
  turbo = features.version_feature("libjpeg_turbo") if features.check_feature("libjpeg_turbo") else "none"
  cores = len(os.sched_getaffinity(0))
  return (
    f"{cores} cores of {processor()}, Linux {platform.release()}, Python {platform.python_version()}, "
    f"numpy {np.__version__}, Pillow {PIL.__version__}, libjpeg-turbo {turbo}"
  )


def processor() -> str:
  for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
    if line.startswith("model name"):
      return line.partition(":")[2].strip()
  return platform.machine()


# --- The data -----------------------------------------------------------------------------------------------


def write_photographs(folder: pathlib.Path, count: int, megapixels: tuple[float, float], seed: int) -> None:
  """Writes photographs of many sizes and shapes, each with a conversation, and the meta file."""
  from skimage import data as photographs  # of the test extra

  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  loaded = [getattr(photographs, name)() for name in PHOTOGRAPHS]
  sources = [Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels) for pixels in loaded]
  records = []
  for i in range(count):
    image = photograph(sources[i % len(sources)], np.exp(rng.uniform(*np.log(megapixels))), rng)
    image.save(folder / f"{i}.jpg", quality=int(rng.integers(90, 96)))
    turns = conversation(rng)
    records.append({"id": i, "image": f"{i}.jpg", "conversations": turns})
  (folder / "photographs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
  meta = {"photographs": {"root": str(folder), "annotation": str(folder / "photographs.jsonl")}}
  (folder / "meta.json").write_text(json.dumps(meta))


def photograph(source: Image.Image, megapixels: float, rng: np.random.Generator) -> Image.Image:
  """A random part of a photograph, resized; with noise as a sensor's, so that its file is as long as a camera's."""
  aspect = float(np.exp(rng.uniform(-1, 1) * np.log(2.2)))
  width = min(source.width, source.height * aspect) * rng.uniform(0.6, 1)
  height = width / aspect
  left, top = rng.uniform(0, source.width - width), rng.uniform(0, source.height - height)
  size = round((megapixels * 1e6 * aspect) ** 0.5), round((megapixels * 1e6 / aspect) ** 0.5)
  part = source.convert("RGB").resize(size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
  noise = rng.normal(0, 3, (size[1], size[0], 1)).round()
  return Image.fromarray(np.clip(np.asarray(part) + noise, 0, 255).astype(np.uint8))


def conversation(rng: np.random.Generator) -> list[dict[str, str]]:
  """One to three questions with answers of a few words up to a paragraph."""
  words = [
    "the",
    "a",
    "red",
    "of",
    "cat",
    "on",
    "in",
    "street",
    "with",
    "two",
    "sign",
    "says",
    "left",
    "right",
    "above",
    "small",
    "photo",
    "shows",
    "person",
    "is",
  ]

  def text(low: int, high: int) -> str:
    return " ".join(rng.choice(words, int(rng.integers(low, high)))).capitalize()

  turns = []
  for _ in range(int(rng.integers(1, 4))):
    turns.append({"from": "human", "value": f"{text(6, 20)}?"})
    turns.append({"from": "gpt", "value": f"{text(5, 120)}."})
  turns[0]["value"] = f"<image>\n{turns[0]['value']}"
  return turns


@dataclasses.dataclass(frozen=True)
class Job:
  """What all contenders share; goes to their processes."""

  folder: pathlib.Path
  max_tokens: int
  max_tiles: int
  seed: int
  workers: int = 0
  threads: int = 1

  def path(self, index: int) -> str:
    return str(self.folder / f"{index}.jpg")

  def warm_up(self) -> int:
    """Batches before the first turn: those that workers make ahead, and some more."""
    return 2 + 3 * self.workers

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

  def loader(self) -> pipeline.TrainLoader:
    """An endless loader, one row a batch."""
    training = TrainingArguments(
      per_device_train_batch_size=1,
      max_steps=1 << 40,
      dataloader_num_workers=self.workers,
      seed=self.seed,
      disable_tqdm=True,
    )
    # Without workers so many threads decode as batches are made ahead, but no more than there are cores.
    config = LoaderConfig(cache_dir=str(self.folder / "cache"), prefetch=2 if self.workers else self.threads)
    return pipeline.TrainLoader(
      self.data(), training, config, self.tokenizer(), tokens_per_tile=TOKENS_PER_TILE
    )

  def row_stream(self) -> Iterator[list[int]]:
    """The images of each row, in the loader's order."""
    mixture = sample.Mixture(
      self.data(), self.tokenizer(), tokens_per_tile=TOKENS_PER_TILE, seed=self.seed, cache=None
    )
    mixture.index_sizes(self.folder / "cache", workers=0, progress=lambda lines: None)
    order = plan.Plan(mixture.num_samples, self.seed, shuffle=True)
    stream = rows.RowStream(order, mixture.size_of, pipeline.pack_settings(self.data()))
    while True:
      yield next(stream).indices.tolist()


# --- The contenders -----------------------------------------------------------------------------------------


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


Turn = Callable[[Sequence[int], int], int]
"""Handles images of these indices, or so many batches; returns how many tiles that were."""


@contextlib.contextmanager
def floor(job: Job) -> Iterator[Turn]:
  yield lambda indices, batches: sum(len(floor_tiles(job.path(index))) for index in indices)


@contextlib.contextmanager
def plain(job: Job) -> Iterator[Turn]:
  yield lambda indices, batches: sum(len(plain_tiles(job.path(index))) for index in indices)


@contextlib.contextmanager
def ours(job: Job) -> Iterator[Turn]:
  """Consumes our loader."""
  loader = job.loader()

  def turn(indices: Sequence[int], batches: int) -> int:
    del indices
    image_tokens = 0
    for _ in range(batches):
      batch = next(loader)
      image_tokens += int((batch.image_index >= 0).sum())
      # Every page is touched: what another process wrote is mapped only then.
      batch.tiles.reshape(-1)[:: resource.getpagesize()].max(initial=0)
    return image_tokens // TOKENS_PER_TILE

  yield turn
  loader.close()


KINDS = {"floor": floor, "plain": plain, "ours": ours}


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


def contenders() -> list[Contender]:
  """On one core first, then on all."""
  cores = tuple(sorted(os.sched_getaffinity(0)))
  one, each, n = ((cores[-1],),), tuple((core,) for core in cores), len(cores)
  found = [
    Contender("floor-1", "floor", one),
    Contender("plain-1", "plain", one),
    Contender("ours-1", "ours", one),
    Contender("floor-all", "floor", each),
    Contender("plain-all", "plain", each),
    Contender("ours-all-threads", "ours", (cores,), threads=n),
    Contender("ours-all-processes", "ours", (cores,), workers=n),
  ]
  return [c for c in found if _CONTENDERS.value is None or c.name in _CONTENDERS.value]


# --- Turns --------------------------------------------------------------------------------------------------


class Lane:
  """A process of a contender, stopped outside its turns. Workers that it starts are stopped with it."""

  def __init__(self, job: Job, kind: str, cores: Sequence[int]):
    context = multiprocessing.get_context("spawn")
    self._pipe, theirs = context.Pipe()
    self._process = context.Process(target=_serve, args=(theirs, job, kind, tuple(cores)))
    self._process.start()

  def ready(self) -> None:
    """Waits until it is warm."""
    self.receive()
    self.pause()

  def send(self, indices: Sequence[int], batches: int) -> None:
    os.killpg(self._pid, signal.SIGCONT)
    self._pipe.send((list(indices), batches))

  def receive(self) -> Any:
    if not self._pipe.poll(TURN_SECONDS):
      raise TimeoutError(f"a contender did not answer within {TURN_SECONDS} s")
    return self._pipe.recv()

  def pause(self) -> None:
    os.killpg(self._pid, signal.SIGSTOP)

  def cpu_seconds(self) -> float:
    """CPU time so far, of the process and its workers."""
    return sum(_cpu_seconds(self._pid))

  def close(self) -> None:
    with contextlib.suppress(ProcessLookupError, BrokenPipeError):  # It may have failed.
      os.killpg(self._pid, signal.SIGCONT)
      self._pipe.send(None)
    self._process.join(TURN_SECONDS)

  @property
  def _pid(self) -> int:
    assert self._process.pid is not None
    return self._process.pid


def _cpu_seconds(group: int) -> Iterator[float]:
  for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):  # a process that ended meanwhile
      fields = stat.read_text().rpartition(")")[2].split()
      if int(fields[2]) == group:
        yield (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _serve(pipe: Any, job: Job, kind: str, cores: tuple[int, ...]) -> None:
  os.setpgid(0, 0)
  os.sched_setaffinity(0, cores)
  with KINDS[kind](job) as turn:
    turn(range(3), job.warm_up())
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
      start = time.perf_counter()
      tiles = turn(*order)
      pipe.send((time.perf_counter() - start, tiles))


@dataclasses.dataclass
class Measured:
  """A turn of a contender, for each image."""

  images_per_second: float
  tiles_per_second: float
  cpu_seconds: float
  others: float
  """Cores that other processes of the machine took meanwhile."""


def take_turn(lanes: Sequence[Lane], indices: Sequence[int], batches: int) -> tuple[Measured, int]:
  """Lets a contender handle these images; returns also how many tiles they had."""
  before, busy, start = sum(lane.cpu_seconds() for lane in lanes), busy_seconds(), time.perf_counter()
  shares = [indices[i :: len(lanes)] for i in range(len(lanes))]
  for lane, share in zip(lanes, shares, strict=True):
    lane.send(share, batches)
  answers = [lane.receive() for lane in lanes]
  for lane in lanes:
    lane.pause()
  cpu = sum(lane.cpu_seconds() for lane in lanes) - before
  others = (busy_seconds() - busy - cpu) / (time.perf_counter() - start)
  # One lane may end before the other; it would go on with other images, so the rates add up.
  rate = sum(len(share) / seconds for share, (seconds, _) in zip(shares, answers, strict=True))
  tiles = sum(tiles for _, tiles in answers)
  return Measured(rate, rate * tiles / len(indices), cpu / len(indices), others), tiles


def busy_seconds() -> float:
  """CPU time that the machine has spent, or was denied by its host."""
  ticks = [int(field) for field in pathlib.Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
  idle, waiting = ticks[3:5]
  return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def bench_images(folder: pathlib.Path) -> dict[str, Any]:
  """Makes the data, checks that all see the same pixels, and measures."""
  count, rounds, batches = (6, 1, 2) if _QUICK.value else (_IMAGES.value, _ROUNDS.value, _BATCHES.value)
  folder = folder / f"{count}-{_SEED.value}"
  if not (folder / "meta.json").exists():
    write_photographs(folder, count, (0.05, 0.5) if _QUICK.value else (0.25, 2.5), _SEED.value)
  job = Job(folder, 8192 if _QUICK.value else 16384, 48, _SEED.value)
  print(describe(job, count))
  stream = job.row_stream()
  check_pixels(job, count)
  taking_part = contenders()
  turns: dict[str, list[Measured]] = {contender.name: [] for contender in taking_part}
  with contextlib.ExitStack() as stack:
    lanes = start(taking_part, job, stack)
    skipped = {c.name: c.job(job).warm_up() for c in taking_part}
    rows_ = [next(stream) for _ in range(rounds * batches + max(skipped.values()))]
    for number in range(rounds):
      # Loaders with workers are some batches ahead, so their images are others; those of each turn are known.
      for contender in taking_part:
        first = skipped[contender.name] + number * batches
        indices = [index for row in rows_[first : first + batches] for index in row]
        measured, tiles = take_turn(lanes[contender.name], indices, batches)
        assert tiles == sum(tiles_of(job, index) for index in indices), (contender, tiles)
        turns[contender.name].append(measured)
  return report(turns)


def start(taking_part: Sequence[Contender], job: Job, stack: contextlib.ExitStack) -> dict[str, list[Lane]]:
  """Starts the contenders' processes and waits until they are warm."""
  lanes: dict[str, list[Lane]] = {}
  for contender in taking_part:
    lanes[contender.name] = [Lane(contender.job(job), contender.kind, cores) for cores in contender.lanes]
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
  loader = job.loader()
  for row, _ in zip(job.row_stream(), range(2), strict=False):
    pool = next(loader).tiles[0, 0]
    tiles = np.concatenate([our_tiles(job, index) for index in row])
    np.testing.assert_array_equal(pool[: len(tiles)], tiles)
    assert not pool[len(tiles) :].any()
  loader.close()
  print(f"the tiles of {count} photographs are the same to the pixel for all")


def our_tiles(job: Job, index: int) -> np.ndarray:
  """The tiles as our samples have them."""
  return images.image_tiles(
    images.open_image(job.path(index), Where("photographs", "photographs.jsonl", index + 1)),
    tile_size=TILE,
    min_tiles=1,
    max_tiles=MAX_TILES,
    use_thumbnail=True,
    dynamic=True,
  )


# --- The report ---------------------------------------------------------------------------------------------

RATIOS = (
  ("ours-1", "floor-1"),
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


def compare(ours: Sequence[Measured], other: Sequence[Measured]) -> dict[str, Any]:
  """Ratios of the rate within each round, and of the CPU time of all rounds together."""
  pairs = list(zip(ours, other, strict=True))
  speed = [a.images_per_second / b.images_per_second for a, b in pairs]
  calm = [ratio for ratio, pair in zip(speed, pairs, strict=True) if max(m.others for m in pair) < 0.05]
  return {
    "rounds": speed,
    "median": statistics.median(speed),
    "quartiles": np.quantile(speed, (0.25, 0.75)).tolist(),
    "calm_rounds": len(calm),
    "calm_median": statistics.median(calm) if calm else None,
    "cpu": sum(b.cpu_seconds for b in other) / sum(a.cpu_seconds for a in ours),
  }


# --- A long annotation file ---------------------------------------------------------------------------------


def bench_lines(folder: pathlib.Path, count: int) -> dict[str, Any]:
  """Writes an annotation file of so many lines, and times what a run does with it before the first sample."""
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / "lines.jsonl"
  with path.open("w") as file:
    for start in range(0, count, 10_000):
      file.writelines(
        f'{{"id": {i}, "conversations": [{{"from": "human", "value": "What is {i} + 1?"}}, '
        f'{{"from": "gpt", "value": "{i + 1}"}}]}}\n'
        for i in range(start, min(start + 10_000, count))
      )
  print(f"{count} lines, {path.stat().st_size / 1e6:.0f} MB")
  result: dict[str, Any] = {"lines": count, "bytes": path.stat().st_size}
  cache = folder / "lines_cache"
  for name, action in (
    ("first opening", open_file),
    ("second opening", open_file),
    ("1000 random reads", read_lines),
    ("order of an epoch", order_lines),
  ):
    result[name] = in_fresh_process(action, str(path), str(cache), count)
    seconds, grown, peak = (result[name][key] for key in ("seconds", "grown_mb", "peak_mb"))
    print(f"{name:<20}{seconds:>9.3f} s, memory {grown:+.0f} MB, at its peak {peak:+.0f} MB")
  return result


def in_fresh_process(action: Callable[..., Any], *args: Any) -> dict[str, float]:
  """Seconds of an action, and by how much the process's own memory grew: after it, and at its peak."""
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    return pool.apply(_measure, (action, *args))


def _measure(action: Callable[..., Any], *args: Any) -> dict[str, float]:
  prepared = action(*args)
  before, peak = _memory_mb(), _peak_mb()
  start = time.perf_counter()
  kept = prepared()
  seconds = time.perf_counter() - start
  grown = _memory_mb() - before
  del kept
  return {"seconds": seconds, "grown_mb": grown, "peak_mb": max(0, _peak_mb() - peak)}


def _memory_mb() -> float:
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _peak_mb() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def open_file(path: str, cache: str, count: int) -> Callable[[], Any]:
  del count
  return lambda: jsonl.JsonlFile(path, "lines", cache=cache)


def read_lines(path: str, cache: str, count: int) -> Callable[[], Any]:
  file, chosen = (
    jsonl.JsonlFile(path, "lines", cache=cache),
    np.random.default_rng(0).integers(0, count, 1000),
  )
  return lambda: [file.read(index)["id"] for index in chosen.tolist()]


def order_lines(path: str, cache: str, count: int) -> Callable[[], Any]:
  del path, cache
  order = plan.Plan(count, 0, shuffle=True)
  return lambda: (order, order.places(0, 1))


if __name__ == "__main__":
  app.run(main)
