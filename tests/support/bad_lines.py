"""What tests of files and lines as the world has them share.

Each case goes through the loader, packed and not, under both policies for bad samples, and through what the doctor
runs.
"""

import contextlib
import json
import os
import shutil
import signal
import struct
import zlib

import av
import numpy as np
import pytest
from PIL import Image

from internvl_jax.arguments import LoaderConfig, TrainingArguments
from internvl_jax.data.load.batching import EVENTS
from internvl_jax.data.load.inspection import decode_all, examine
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.load.mixture import Mixture
from internvl_jax.data.where import DataError
from tests.support.data_toys import WHERE, arguments, turns

GOOD = {"conversations": turns("what is it?", "red circle")}


NOTHING_LOST = {"samples": 3} | dict.fromkeys(EVENTS, 0)


PACKED = {"use_packed_ds": True, "max_packed_tokens": 2048, "num_images_expected": 16}


SIDE, MAX_TILES, TOKENS_PER_TILE = 16, 12, 4


@pytest.fixture(autouse=True)
def hard_time_limit():
  def give_up(number, frame):
    raise TimeoutError("hangs")

  before = signal.signal(signal.SIGALRM, give_up)
  signal.setitimer(signal.ITIMER_REAL, 60)
  yield
  signal.setitimer(signal.ITIMER_REAL, 0)
  signal.signal(signal.SIGALRM, before)


def write_data(folder, *lines, root=None):
  """Writes an annotation file of these lines, records or bytes, and returns the meta file."""
  texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
  (folder / "toy.jsonl").write_bytes(b"".join(text + b"\n" for text in texts))
  (folder / "meta.json").write_text(
    json.dumps({"toy": {"root": str(folder) if root is None else root, "annotation": "toy.jsonl"}})
  )
  return folder / "meta.json"


def settings_of(meta, packed, **changes):
  frames = {"min_num_frame": 2, "max_num_frame": 4, "max_dynamic_patch": MAX_TILES}
  return arguments(meta, **frames, **(PACKED if packed else {}), **changes)


def make_loader(meta, tokenizer, *, packed=False, policy="error", rows=3, data=None, cache=None, **loader):
  return TrainLoader(
    settings_of(meta, packed, **data or {}),
    TrainingArguments(
      per_device_train_batch_size=1 if packed else rows,
      max_steps=-1,
      num_train_epochs=1,
      disable_tqdm=True,
      gradient_accumulation_steps=1,
    ),
    LoaderConfig(
      shuffle=False,
      on_bad_sample=policy,
      max_bad_fraction=1.0,
      cache_dir=str(cache or meta.parent / "cache"),
      **loader,
    ),
    tokenizer,
    tokens_per_tile=TOKENS_PER_TILE,
  )


@contextlib.contextmanager
def loading(meta, tokenizer, **options):
  loader = make_loader(meta, tokenizer, **options)
  try:
    yield loader
  finally:
    loader.close()


def message_of(call):
  """The one line that a call fails with."""
  with pytest.raises(DataError) as caught:
    call()
  message = str(caught.value)
  assert message.isprintable() and len(message) < 2000
  return message


def lost_by_doctor(meta, tokenizer, packed):
  """What the doctor says is lost, line by line."""
  data = settings_of(meta, packed)
  mixture = Mixture(
    data, tokenizer, tokens_per_tile=TOKENS_PER_TILE, seed=42, cache=meta.parent / f"doctor{packed}"
  )
  mixture.index_sizes(meta.parent / f"doctor{packed}", workers=0, quiet=True)
  reports = examine(mixture)
  damaged = list(decode_all(mixture, packed=packed, workers=0))
  assert sum(report.lost for report in reports) == sum(len(report.examples) for report in reports)
  mixture.close()
  return [*(line for report in reports for line in report.examples), *damaged]


def assert_named(folder, tokenizer, line, cause, modes=(False, True)):
  """A line is named, by the loader and the doctor alike, and counted where it is dropped."""
  meta = write_data(folder, GOOD, line, GOOD)
  for packed in modes:
    with loading(meta, tokenizer, packed=packed) as loader:
      message = message_of(lambda: next(loader))
      assert message.startswith(f"{folder}/toy.jsonl:2 (dataset 'toy'): ") and cause in message, message
      assert loader.counters()["toy"] == NOTHING_LOST | {"samples": 0}
    with loading(meta, tokenizer, packed=packed, policy="drop") as loader:
      (batch,) = loader
      assert loader.counters()["toy"] == NOTHING_LOST | {"unreadable": 1}
      # The two good ones are there, and nothing else.
      good = len(tokenizer.encode(GOOD["conversations"], [], WHERE).input_ids)
      assert (batch.segment_ids > 0).sum() == 2 * good and not batch.tiles.any()
    assert lost_by_doctor(meta, tokenizer, packed) == [message]


def batches_of(folder, tokenizer, line, **counts):
  """The batches, not packed and packed, of a line that is read; `counts` says what is counted of it."""
  meta = write_data(folder, GOOD, line, GOOD)
  batches = []
  for packed in (False, True):
    with loading(meta, tokenizer, packed=packed) as loader:
      batches += list(loader)
      assert loader.counters()["toy"] == NOTHING_LOST | counts
    masked = counts.get("fully_masked", 0)
    assert len(lost_by_doctor(meta, tokenizer, packed)) == masked
  assert len(batches) == 2
  return batches


def assert_read_as(folder, tokenizer, line, record, **counts):
  """A line gives what a plainer record gives."""
  (folder / "plain").mkdir()
  for name in os.listdir(folder):
    if name.endswith(".png"):
      shutil.copy(folder / name, folder / "plain")
  expected = batches_of(folder / "plain", tokenizer, record, **counts)
  for batch, wanted in zip(batches_of(folder, tokenizer, line, **counts), expected, strict=True):
    for array, other in zip(batch, wanted, strict=True):
      np.testing.assert_array_equal(array, other)


def with_image(path, **fields):
  return {"image": path, **fields, "conversations": turns("<image>\nwhat?", "red")}


def tiles_by_pillow(path):
  """What the reference makes of an image file: the grid of the nearest aspect ratio, and a thumbnail."""
  with Image.open(path) as file:
    image = file.convert("RGB")
    if file.mode.startswith("I;16"):  # there the reference cuts off
      image = Image.fromarray(np.rint(np.asarray(file) / 257).astype(np.uint8)).convert("RGB")
  grids = sorted(
    {(i, j) for n in range(1, MAX_TILES + 1) for i in range(1, n + 1) for j in range(1, n + 1) if i * j <= n},
    key=lambda grid: grid[0] * grid[1],
  )
  best, least = (1, 1), float("inf")
  for i, j in grids:
    distance = abs(image.width / image.height - i / j)
    if distance < least:
      best, least = (i, j), distance
    elif distance == least and image.width * image.height > 0.5 * SIDE * SIDE * i * j:
      best = (i, j)
  columns, rows = best
  whole = image.resize((columns * SIDE, rows * SIDE), Image.Resampling.BICUBIC)
  corners = [(SIDE * column, SIDE * row) for row in range(rows) for column in range(columns)]
  parts = [whole.crop((x, y, x + SIDE, y + SIDE)) for x, y in corners]
  if len(parts) > 1:
    parts.append(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
  return np.stack([np.asarray(part) for part in parts])


def noise(width=40, height=24, mode="RGB", seed=0):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
  return Image.fromarray(pixels).convert(mode)


def smooth(width=40, height=24):
  """What survives JPEG, with a left that differs from its right and a top from its bottom."""
  x, y = np.meshgrid(
    np.arange(width) * 255 // max(width - 1, 1), np.arange(height) * 255 // max(height - 1, 1)
  )
  return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


def png_chunk(kind, data):
  return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path, width, height, depth, color, rows):
  """Writes a PNG of any depth and colour type from the bytes of its rows."""
  header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
  lines = b"".join(b"\0" + row for row in rows)
  chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines, 1)), (b"IEND", b"")]
  path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))


def frames():
  return [Image.merge("RGB", smooth().split()[shift:] + smooth().split()[:shift]) for shift in range(3)]


def animation(path):
  frames()[0].save(path, save_all=True, append_images=frames()[1:], duration=50)


def cut(path, share):
  content = path.read_bytes()
  path.write_bytes(content[: int(len(content) * share)])


def loop(path):
  path.symlink_to(path.name)


def write_video(path, **options):
  with av.open(str(path), "w", options=options) as container:
    out = container.add_stream("mpeg4", rate=25)
    out.width, out.height, out.pix_fmt = 40, 24, "yuv420p"
    for seed in range(30):
      container.mux(out.encode(av.VideoFrame.from_image(noise(seed=seed))))
    container.mux(out.encode(None))


def texts(count, answer="number {}"):
  return [{"conversations": turns("which?", answer.format(i))} for i in range(count)]
