"""Files and lines as the world has them: read as Pillow and the reference read them, or named in one line and counted.

Each case goes through the loader, packed and not, under both policies for bad samples, and through what the doctor
runs.
"""

import contextlib
import json
import os
import pathlib
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib

import av
import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from internvl_jax.arguments import LoaderConfig, TrainingArguments
from internvl_jax.data.load.batching import EVENTS
from internvl_jax.data.load.inspection import decode_all, examine
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.load.mixture import Mixture
from internvl_jax.data.sample import images, video_file
from internvl_jax.data.source import sizes
from internvl_jax.data.source.jsonl import JsonlFile
from internvl_jax.data.source.sizes import Size, index_sizes
from internvl_jax.data.where import DataError
from tests.support.data_toys import WHERE, arguments, turns, write_jsonl

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


# --- One line between two good ones, through everything that reads it ------------------------------------------


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


# --- Images that are read: the pixels that plain Pillow gives --------------------------------------------------


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


def rows16(width):
  rng = np.random.default_rng(0)
  return [rng.bytes(width) for _ in range(24)]


def rotated(path):
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = 6
  smooth().save(path, exif=exif)


def transparent_palette(path):
  noise(mode="P").save(path, transparency=3)


def frames():
  return [Image.merge("RGB", smooth().split()[shift:] + smooth().split()[:shift]) for shift in range(3)]


def animation(path):
  frames()[0].save(path, save_all=True, append_images=frames()[1:], duration=50)


def long_text(path):
  info = PngImagePlugin.PngInfo()
  info.add_text("history", "x" * 3_000_000, zip=True)
  noise().save(path, pnginfo=info)


READ = {
  "one_pixel.png": lambda path: noise(1, 1).save(path),
  "wide.png": lambda path: noise(20_000, 10).save(path),
  "tall.jpg": lambda path: noise(10, 20_000).save(path),
  "cmyk.jpg": lambda path: smooth().convert("CMYK").save(path),
  "progressive.jpg": lambda path: smooth().save(path, progressive=True),
  "grey16.png": lambda path: write_png(path, 40, 24, 16, 0, rows16(40 * 2)),
  "rgb16.png": lambda path: write_png(path, 40, 24, 16, 2, rows16(40 * 6)),
  "grey16.tif": lambda path: Image.fromarray(np.arange(960, dtype=np.uint16).reshape(24, 40) * 60).save(path),
  "palette.png": lambda path: noise(mode="P").save(path),
  "palette_transparent.png": transparent_palette,
  "la.png": lambda path: noise(mode="LA").save(path),
  "rgba.png": lambda path: noise(mode="RGBA").save(path),
  "one_bit.png": lambda path: noise(mode="1").save(path),
  "animated.gif": animation,
  "animated.webp": animation,
  "animated.png": animation,
  "rotated.jpg": rotated,
  "rotated.png": rotated,
  "rotated.tif": rotated,
  "long_text.png": long_text,
}


@pytest.mark.parametrize("name", READ)
def test_images_are_read_as_pillow_reads_them(tmp_path, tokenizer, name):
  path = tmp_path / name
  READ[name](path)
  expected = tiles_by_pillow(path)
  for batch in batches_of(tmp_path, tokenizer, with_image(name)):
    found = batch.tiles[0, 0]
    np.testing.assert_array_equal(found[: len(expected)], expected)
    assert not found[len(expected) :].any()
    assert (batch.image_index >= 0).sum() == len(expected) * TOKENS_PER_TILE
  # What packing plans with, the header, is what decoding gives.
  assert images.image_size(str(path), WHERE) == images.open_image(str(path), WHERE).size


def test_images_are_not_turned_by_their_exif(tmp_path):
  rotated(tmp_path / "a.jpg")
  image = images.open_image(str(tmp_path / "a.jpg"), WHERE)
  assert image.size == (40, 24) and image.getpixel((39, 0))[0] > 200 > 50 > image.getpixel((0, 0))[0]


def test_animations_give_their_first_frame(tmp_path):
  for suffix in ("gif", "webp", "png"):
    animation(tmp_path / f"a.{suffix}")
    found = np.asarray(images.open_image(str(tmp_path / f"a.{suffix}"), WHERE), np.int64)
    distances = [np.abs(found - np.asarray(frame, np.int64)).mean() for frame in frames()]
    assert distances[0] < 10 < 50 < min(distances[1:])


def test_large_images_are_read_in_silence_and_immense_ones_refused(tmp_path, tokenizer):
  """13,000 x 13,000 is read, where Pillow by itself warns; 100,000 x 100,000 is not even decoded."""
  path = tmp_path / "map.png"
  write_png(path, 13_000, 13_000, 1, 0, [bytes(1625)] * 13_000)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert images.image_size(str(path), WHERE) == (13_000, 13_000)
    write_png(path, 9_500, 9_500, 1, 0, [b"\xf0" + bytes(1187)] * 9_500)
    image = images.open_image(str(path), WHERE)
  assert image.size == (9_500, 9_500) and image.getpixel((3, 9_000)) == (255,) * 3
  write_png(tmp_path / "bomb.png", 100_000, 100_000, 8, 2, [bytes(10)])
  assert_named(tmp_path, tokenizer, with_image("bomb.png"), "is too large (Image size (10000000000 pixels)")


# --- Images that cannot be read --------------------------------------------------------------------------------


def cut(path, share):
  content = path.read_bytes()
  path.write_bytes(content[: int(len(content) * share)])


def cut_jpeg(share):
  def make(path):
    noise(200, 120).save(path)
    cut(path, share)

  return make


def loop(path):
  path.symlink_to(path.name)


def unknown_pixels(path):
  noise().save(path)
  content = bytearray(path.read_bytes())
  content[80:84] = bytes(4)  # the flags of the pixel format
  path.write_bytes(content)


TRUNCATED = "image {} cannot be decoded (OSError: image file is truncated"


def video_as_image(path):
  write_video(path.with_suffix(".mp4"))
  path.with_suffix(".mp4").rename(path)


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"
PROGRAM = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"
NAMED = {
  "cut10.jpg": (cut_jpeg(0.1), TRUNCATED),
  "cut50.jpg": (cut_jpeg(0.5), TRUNCATED),
  "cut99.jpg": (cut_jpeg(0.99), TRUNCATED),
  "header.jpg": (cut_jpeg(0.001), "image {} cannot be decoded ("),
  # Pillow raises an error for it that is neither of the system nor of a value.
  "flags.dds": (unknown_pixels, "image {} cannot be decoded (NotImplementedError"),
  "empty.jpg": (lambda path: path.write_bytes(b""), "image {} is empty (0 bytes); restore it or delete"),
  "text.jpg": (
    lambda path: path.write_text("<html>not found</html>"),
    "image {} cannot be decoded: it is an HTML page",
  ),
  "photo.jpg": (
    lambda path: path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(99)),
    "decoded: it is HEIC; convert it",
  ),
  "pointer.png": (lambda path: path.write_text(POINTER), "it is a pointer of Git LFS, not the file"),
  "program.jpg": (lambda path: path.write_text(PROGRAM), "decoded: it is PostScript; convert it"),
  "clip.jpg": (
    video_as_image,
    "it is a video (MP4 or MOV); put it under 'video'",
  ),
  "folder.jpg": (pathlib.Path.mkdir, "image {} is not a file; correct its path or delete the line"),
  "pipe.jpg": (os.mkfifo, "image {} is not a file; correct its path or delete the line"),
  "loop.jpg": (loop, "image {} cannot be opened (Too many levels of symbolic links); correct its path"),
  "gone.jpg": (lambda path: None, "image not found: {}; check the dataset's root"),
  "gone.jpg/a.jpg": (lambda path: path.parent.touch(), "image not found: {}; check the dataset's root"),
}


@pytest.mark.parametrize("name", NAMED)
def test_images_that_cannot_be_read_are_named(tmp_path, tokenizer, name):
  make, cause = NAMED[name]
  path = tmp_path / name
  make(path)
  try:
    assert_named(tmp_path, tokenizer, with_image(name), cause.format(path))
  finally:
    if path.is_fifo():  # threads that wait for it after all would keep the process from ending
      os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))


@pytest.mark.parametrize(
  ("path", "cause"),
  [
    (7, "'image' must be a path or a list of paths, got '7'"),
    (0, "'image' must be a path or a list of paths, got '0'"),
    (False, "'image' must be a path or a list of paths, got 'False'"),
    ({}, "'image' must be a path or a list of paths, got '{}'"),
    ({"path": "a.png"}, "'image' must be a path or a list of paths, got"),
    ([["a.png"]], "'image' must be a path or a list of paths, got"),
    ([None], "'image' must be a path or a list of paths, got '[None]'"),
    ([""], "'image' must be a path or a list of paths, got"),
    ("a\0.png", r"a\x00.png cannot be opened (embedded null byte); correct its path"),
    ("a\udcff\ud800.png", r"a\udcff\ud800.png cannot be opened ('utf-8' codec can't encode"),
    ("a" * 5000 + ".png", "aaa.png cannot be opened (File name too long); correct its path"),
    ("a/" * 2500 + ".png", "a/.png cannot be opened (File name too long); correct its path"),
    (["a.png", "gone.png"], "1 <image> in the human turns but 2 images; make the numbers equal"),
    ("", "1 <image> in the human turns but 0 images; make the numbers equal"),
    (None, "1 <image> in the human turns but 0 images; make the numbers equal"),
    ([], "1 <image> in the human turns but 0 images; make the numbers equal"),
  ],
)
def test_paths_that_are_none(tmp_path, tokenizer, path, cause):
  for name in ("a.png", "gone.png"):
    noise().save(tmp_path / name)
  assert_named(tmp_path, tokenizer, with_image(path), cause)


@pytest.mark.parametrize("image", ["", None, []])
def test_no_path_is_text_only(tmp_path, tokenizer, image):
  assert_read_as(tmp_path, tokenizer, GOOD | {"image": image, "video": image}, GOOD)


@pytest.mark.parametrize(
  ("stated", "right"),
  [
    ({"width": 64, "height": 16}, False),
    ({"width": 1 << 31, "height": 1}, False),
    ({"width_list": [64], "height_list": [16]}, False),
    ({"width": 40, "height": 24}, True),
    ({"width": 0, "height": 24}, True),
    ({"width": -40, "height": 24}, True),
    ({"width": "24", "height": "40"}, True),
    ({"width": 24.0, "height": 40.0}, True),
    ({"width": True, "height": True}, True),
    ({"width": float("nan"), "height": 40}, True),
    ({"width": 10**400, "height": 1}, True),
    ({"width": 24}, True),
    ({"width_list": [24, 24], "height_list": [40]}, True),
    ({"width_list": ["x"], "height_list": [None]}, True),
  ],
)
def test_sizes_that_lines_state(tmp_path, tokenizer, stated, right):
  """What is no size is not believed; what is a wrong one is harmless, unless rows are planned by it."""
  noise(40, 24).save(tmp_path / "a.png")
  line = with_image("a.png", **stated)
  if right:
    assert_read_as(tmp_path, tokenizer, line, with_image("a.png"))
    return
  assert_named(tmp_path, tokenizer, line, "were planned: the image's size is not what the line says", [True])
  with loading(write_data(tmp_path, GOOD, line, GOOD), tokenizer) as loader:
    (batch,) = loader
    expected = tiles_by_pillow(tmp_path / "a.png")
    np.testing.assert_array_equal(batch.tiles[0, 0, : len(expected)], expected)
    assert loader.counters()["toy"] == NOTHING_LOST
  assert not lost_by_doctor(tmp_path / "meta.json", tokenizer, packed=False)


# --- Videos ----------------------------------------------------------------------------------------------------


def write_video(path, **options):
  with av.open(str(path), "w", options=options) as container:
    out = container.add_stream("mpeg4", rate=25)
    out.width, out.height, out.pix_fmt = 40, 24, "yuv420p"
    for seed in range(30):
      container.mux(out.encode(av.VideoFrame.from_image(noise(seed=seed))))
    container.mux(out.encode(None))


def cut_video(share, **options):
  def make(path):
    write_video(path, **options)
    cut(path, share)

  return make


def sound(path):
  with av.open(str(path), "w") as container:
    out = container.add_stream("aac", rate=16000, layout="mono")
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    frame.sample_rate, frame.pts = 16000, 0
    container.mux(out.encode(frame))
    container.mux(out.encode(None))


VIDEOS = {
  "cut30.mp4": (cut_video(0.3), "video {} is not a video or is damaged ("),
  "cut70.mp4": (cut_video(0.7), "video {} is not a video or is damaged ("),
  "index_first30.mp4": (cut_video(0.3, movflags="faststart"), "video {} ends early: "),
  "index_first70.mp4": (cut_video(0.7, movflags="faststart"), "video {} ends early: "),
  "empty.mp4": (lambda path: path.write_bytes(b""), "video {} is empty (0 bytes); restore it"),
  "sound.mp4": (sound, "video {} has no video stream; delete the line"),
  "text.mp4": (lambda path: path.write_text("<html>not found</html>"), "video {} is not a video"),
  "json.mp4": (
    lambda path: path.write_text('{"error": 404}'),
    "video {} is not a video: it is JSON; convert it",
  ),
  "archive.mp4": (
    lambda path: path.write_bytes(b"PK\3\4" + bytes(99)),
    "video {} is not a video: it is a zip archive",
  ),
  "pipe.mp4": (os.mkfifo, "video {} is not a file; name a video file or a folder of images"),
  "loop.mp4": (loop, "video {} cannot be opened (Too many levels of symbolic links); correct its path"),
  "a" * 300 + ".mp4": (lambda path: None, "video {} cannot be opened (File name too long); correct its path"),
  "gone.mp4": (lambda path: None, "video not found: {}"),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_that_cannot_be_read_are_named(tmp_path, tokenizer, name):
  make, cause = VIDEOS[name]
  make(tmp_path / name)
  assert_named(tmp_path, tokenizer, {"video": name, **GOOD}, cause.format(tmp_path / name))


@pytest.mark.parametrize("video", [0, 7, {}, [7], [[]], False])
def test_videos_that_are_no_paths(tmp_path, tokenizer, video):
  assert_named(
    tmp_path, tokenizer, {"video": video, **GOOD}, "'video' must be one path or those of its frames, got "
  )


@pytest.mark.parametrize(
  "error",
  [IndexError("list index out of range"), MemoryError(), UnicodeDecodeError("utf-8", b"x", 0, 1, "bad")],
)
def test_whatever_a_decoder_raises_costs_a_line_and_no_run(tmp_path, tokenizer, monkeypatch, error):
  """PyAV raises IndexError where a stream begins late, as in a damaged broadcast."""

  def fail(*args, **options):
    raise error

  write_video(tmp_path / "a.mp4")
  monkeypatch.setattr(video_file, "pictures", fail)
  assert_named(
    tmp_path, tokenizer, {"video": "a.mp4", **GOOD}, f"a.mp4 cannot be decoded ({type(error).__name__}: "
  )


CLIPS = {
  "huge": f"[0, 1{'0' * 400}]",
  "huge_float": "[0, 1e308]",
  "infinite": "[0, Infinity]",
  "nan": "[NaN, 1]",
  "reversed": "[1, 0.5]",
  "negative": "[-1, 1]",
  "behind": "[100, 101]",
  "texts": '["00:00", "00:01"]',
  "nested": "[[0, 1]]",
  "object": '{"start": 0}',
}


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("video", ["a.mp4", "a.gif"])
def test_clips_that_are_none_cost_a_line_and_no_run(tmp_path, tokenizer, name, video):
  (write_video if video == "a.mp4" else animation)(tmp_path / video)
  line = json.dumps({"video": video, **GOOD})[:-1] + f', "clip": {CLIPS[name]}}}'
  assert_named(tmp_path, tokenizer, line.encode(), "'clip' ")


# --- Lines -----------------------------------------------------------------------------------------------------

GOOD_TEXT = json.dumps(GOOD["conversations"]).encode()
UNREADABLE_LINES = {
  "not_utf8": (b'{"conversations": "\xff\xfe"}', "not UTF-8: 'utf-8' codec can't decode byte 0xff"),
  "utf16": ('{"conversations": []}'.encode("utf-16-le"), "broken JSON at column 2"),
  "nul": (b"\0" * 50, "broken JSON at column 1: Expecting value"),
  "nul_in_text": (b'{"conversations": "a\0b"}', "broken JSON at column 21: Invalid control character"),
  "nested": (b"[" * 100_000, "JSON that cannot be read: "),
  "nested_key": (b'{"a":' * 100_000, "JSON that cannot be read: "),
  "digits": (b'{"id": ' + b"9" * 5000 + b"}", "JSON that cannot be read: Exceeds the limit"),
  "list": (b"[1, 2]", "expected a JSON object, got list"),
  "text": (b'"hello"', "expected a JSON object, got str"),
  "number": (b"NaN", "expected a JSON object, got float"),
  "null": (b"null", "expected a JSON object, got NoneType"),
  "two_records": (b'{"a": 1}{"b": 2}', "broken JSON at column 9: Extra data"),
  "mid_bom": (b"\xef\xbb\xbf", "broken JSON at column 1: Expecting value"),
  "no_turns": (b'{"id": 1}', "key 'conversations' is missing; the line has 'id'"),
  # The reference's parser takes the last one.
  "twice": (
    b'{"image": "gone.png", "image": "", "conversations": ' + GOOD_TEXT + b"}",
    "key 'image' stands twice",
  ),
  "value_twice": (
    b'{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "a", "value": "b"}]}',
    "key 'value' stands twice",
  ),
  "20_megabytes": (b'{"a": "' + b"x" * 20_000_000, "broken JSON at column 7: Unterminated string"),
}


@pytest.mark.parametrize("name", UNREADABLE_LINES)
def test_lines_that_cannot_be_read_are_named(tmp_path, tokenizer, name):
  assert_named(tmp_path, tokenizer, *UNREADABLE_LINES[name])


READABLE_LINES = {
  "nan": b'{"id": NaN, "score": -Infinity, "conversations": ' + GOOD_TEXT + b"}",
  "twice_the_same": b'{"id": 1, "id": 1, "image": "", "image": "", "conversations": ' + GOOD_TEXT + b"}",
  "carriage_return": b'{"conversations": ' + GOOD_TEXT + b"}\r",
  "mid_bom": b'\xef\xbb\xbf{"conversations": ' + GOOD_TEXT + b"}",
  "20_megabytes": b'{"page": "' + b"x" * 20_000_000 + b'", "conversations": ' + GOOD_TEXT + b"}",
}


@pytest.mark.parametrize("name", READABLE_LINES)
def test_odd_lines_that_are_read(tmp_path, tokenizer, name):
  assert_read_as(tmp_path, tokenizer, READABLE_LINES[name], GOOD)


def test_bom_and_crlf_throughout(tmp_path, tokenizer):
  meta = write_data(tmp_path, GOOD, GOOD, GOOD)
  path = tmp_path / "toy.jsonl"
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
  for packed in (False, True):
    with loading(meta, tokenizer, packed=packed) as loader:
      assert len(list(loader)) == 1 and loader.counters()["toy"] == NOTHING_LOST


def said(*pairs):
  return {"conversations": [{"from": role, "value": value} for role, value in pairs]}


BAD_TURNS = {
  "null": (said(("human", "hi"), ("gpt", None)), 'turn 2 must be {"from": role, "value": text}'),
  "missing": ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt"}]}, "turn 2 must be {"),
  "list": (said(("human", "hi"), ("gpt", ["a"])), "turn 2 must be {"),
  "unknown_role": (said(("human", "hi"), ("bot", "yes")), "turn 2 is from 'bot'"),
  "role_null": (said((None, "hi"), ("gpt", "yes")), "turn 1 is from None"),
  "role_list": (said((["human"], "hi"), ("gpt", "yes")), "turn 1 is from ['human']"),
  "empty": ({"conversations": []}, "'conversations' must be a list of at least one turn, got an empty list"),
  "no_list": ({"conversations": "hi"}, "'conversations' must be a list of at least one turn, got str"),
  "turns_null": ({"conversations": None}, "must be a list of at least one turn, got NoneType"),
  "object": ({"conversations": {"from": "gpt"}}, "must be a list of at least one turn, got dict"),
  "texts": ({"conversations": ["hi", "yes"]}, "turn 1 must be {"),
  "surrogate": (
    said(("human", "hi"), ("gpt", "\ud800")),
    "turn 2: character 1 is '\\ud800', half of a surrog",
  ),
  "more_places": (said(("human", "<image>"), ("gpt", "a")), "1 <image> in the human turns but 0 images"),
  # With one image or a video, <image> is put where it is missing; not into a turn that has no text.
  "image_null": (said(("human", None), ("gpt", "a")) | {"image": "a.png"}, "turn 1 must be {"),
  "image_number": (said(("human", 5), ("gpt", "a")) | {"image": "a.png"}, "turn 1 must be {"),
  "image_no_human": (said(("gpt", "a")) | {"image": "a.png"}, "0 <image> in the human turns but 1 images"),
  "video_null": (said(("human", None), ("gpt", "a")) | {"video": "a.gif"}, "no human turn with a text where"),
}


@pytest.mark.parametrize("name", BAD_TURNS)
def test_bad_turns_are_named(tmp_path, tokenizer, name):
  noise().save(tmp_path / "a.png")
  animation(tmp_path / "a.gif")
  assert_named(tmp_path, tokenizer, *BAD_TURNS[name])


@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_answer_without_text_is_named(tmp_path, tokenizer, answer):
  assert_named(
    tmp_path, tokenizer, said(("human", "hi"), ("gpt", answer)), "turn 2 is an answer without text"
  )


def test_a_place_for_an_image_in_an_answer_is_text(tmp_path, tokenizer):
  noise().save(tmp_path / "a.png")
  line = with_image("a.png") | said(("human", "<image>\nwhat?"), ("gpt", "red <image>"))
  tiles = len(tiles_by_pillow(tmp_path / "a.png"))
  for batch in batches_of(tmp_path, tokenizer, line):
    assert (batch.input_ids == tokenizer.image_token_id).sum() == tiles * TOKENS_PER_TILE
    # As the same letters are anywhere else.
    text = tokenizer.decode(batch.targets[batch.loss_weight > 0])
    assert "red <image>" in text


@pytest.mark.parametrize("roles", [("system",), ("system", "human"), ("human",)])
def test_a_line_that_teaches_nothing_is_counted(tmp_path, tokenizer, roles):
  batches_of(tmp_path, tokenizer, said(*((role, "be brief") for role in roles)), fully_masked=1)


def test_an_answer_of_a_million_characters_is_cut_and_counted(tmp_path, tokenizer):
  meta = write_data(tmp_path, GOOD, {"conversations": turns("hi", "red circle " * 90_910)}, GOOD)
  start = time.process_time()
  for packed in (False, True):
    with loading(meta, tokenizer, packed=packed, data={"max_seq_length": 256}) as loader:
      (batch,) = loader
      assert loader.counters()["toy"] == NOTHING_LOST | {"truncated": 1}
    good = len(tokenizer.encode(GOOD["conversations"], [], WHERE).input_ids)
    assert (batch.segment_ids > 0).sum() == 2 * good + 256
  # A second or two for each of the three times that it is tokenised: in proportion to its length, not to its square.
  assert time.process_time() - start < 15


# --- Files that change while they are read ---------------------------------------------------------------------


def texts(count, answer="number {}"):
  return [{"conversations": turns("which?", answer.format(i))} for i in range(count)]


def ids_of(batches):
  """The token ids of all rows that hold a sample."""
  rows = [row for batch in batches for row in zip(batch.input_ids[0], batch.segment_ids[0], strict=True)]
  return [ids[segments > 0].tolist() for ids, segments in rows if segments.any()]


def read_on(meta, tokenizer, change, **loader):
  """Counters and samples of a loader whose annotation file changes after its first sample."""
  with loading(meta, tokenizer, rows=1, policy="drop", prefetch=1, **loader) as loader:
    batches = [next(loader)]
    change(meta.parent / "toy.jsonl")
    batches += list(loader)
    return loader.counters()["toy"], ids_of(batches)


@pytest.mark.parametrize("into_the_line", [0, -1, 1, 30])
def test_an_annotation_file_that_is_cut_while_it_is_read(tmp_path, tokenizer, into_the_line):
  meta = write_data(tmp_path, *texts(40))
  content = (tmp_path / "toy.jsonl").read_bytes()
  kept = sum(len(line) for line in content.splitlines(keepends=True)[:20]) + into_the_line
  counts, samples = read_on(meta, tokenizer, lambda path: os.truncate(path, kept))
  # A line without its line break is whole.
  assert counts == NOTHING_LOST | {"samples": 40, "unreadable": 20}
  with loading(write_data(tmp_path, *texts(40)), tokenizer, rows=1) as loader:
    assert ids_of(loader)[:20] == samples
  with loading(meta, tokenizer, rows=1, prefetch=1) as loader:
    next(loader)
    os.truncate(tmp_path / "toy.jsonl", kept)
    message = message_of(lambda: list(loader))
    assert message.startswith(
      f"{tmp_path}/toy.jsonl:21 (dataset 'toy'): the file was changed after its lines"
    )
    assert message.endswith("start the run again")


def test_an_annotation_file_that_is_written_anew_while_it_is_read(tmp_path, tokenizer):
  records = texts(40)
  meta = write_data(tmp_path, *records)
  first = len(tokenizer.encode(records[0]["conversations"], [], WHERE).input_ids)

  def rewrite(path):
    with path.open("r+b") as file:  # the same file, not another of its name
      lines = file.read()
      file.seek(0)
      file.write(b" " + lines)

  counts, samples = read_on(meta, tokenizer, rewrite)
  assert counts["samples"] == 40 and counts["unreadable"] == 40 - len(samples) and len(samples) < 10
  # Where lines stand on lines, they are those of the file as it is; nothing is read from the middle of one.
  meta = write_data(tmp_path, *records)
  counts, samples = read_on(meta, tokenizer, lambda path: write_jsonl(path, records[::-1][:20]))
  assert counts["samples"] == 40 and counts["unreadable"] >= 20
  whole = [tokenizer.encode(record["conversations"], [], WHERE).input_ids.tolist() for record in records]
  assert all(sample in whole for sample in samples) and len(samples[0]) == first


def test_an_annotation_file_that_vanishes(tmp_path, tokenizer, caplog):
  meta = write_data(tmp_path, *texts(8))
  counts, samples = read_on(meta, tokenizer, pathlib.Path.unlink)
  assert counts == NOTHING_LOST | {"samples": 8} and len(samples) == 8  # it is still open
  meta = write_data(tmp_path, *texts(8))
  cause = f"{tmp_path}/toy.jsonl:1 (dataset 'toy'): the annotation file cannot be read: "
  for policy in ("error", "drop"):
    with loading(meta, tokenizer, policy=policy) as loader:
      (tmp_path / "toy.jsonl").rename(tmp_path / "away")
      # One bad batch does not end a run that drops what is bad.
      message = message_of(lambda: next(loader)) if policy == "error" else next(loader) and caplog.text
      (tmp_path / "away").rename(tmp_path / "toy.jsonl")
    assert cause in message and "restore it" in message


def test_an_annotation_file_that_changes_while_it_is_measured(tmp_path):
  write_data(tmp_path, *texts(8))
  path = tmp_path / "toy.jsonl"

  def measure(file, line):
    file.read(line)
    os.utime(path, ns=(1, 1))
    return Size(5, 0, 1)

  message = message_of(
    lambda: index_sizes(JsonlFile(path, "toy"), measure, {}, tmp_path / "cache", workers=0)
  )
  assert f"{path}: dataset 'toy': the file was changed after its lines were found" in message
  path.unlink()
  message = message_of(lambda: JsonlFile(path, "toy"))
  assert f"{path}: dataset 'toy': the annotation file cannot be read: " in message


# --- The cache -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(size):
  """No file may become longer."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("packed", [False, True])
def test_a_cache_that_cannot_be_written_is_named(tmp_path, tokenizer, packed):
  meta = write_data(tmp_path, *texts(40))
  (tmp_path / "file").touch()
  message = message_of(lambda: make_loader(meta, tokenizer, packed=packed, cache=tmp_path / "file/cache"))
  assert message.startswith(f"the cache in {tmp_path}/file/cache cannot be written or read (Not a directory)")
  assert "set loader.cache_dir to a folder with free space" in message
  with full_disk(300):
    message = message_of(lambda: make_loader(meta, tokenizer, packed=packed))
  assert f"the cache in {tmp_path}/cache cannot be written" in message and "loader.cache_dir" in message
  assert not list((tmp_path / "cache").rglob("*.tmp"))
  with loading(meta, tokenizer, packed=packed) as loader:
    list(loader)
    assert loader.counters()["toy"] == NOTHING_LOST | {"samples": 40 if packed else 42}


def test_a_disk_that_fills_up_while_sizes_are_written(tmp_path, tokenizer):
  meta = write_data(tmp_path, *texts(40))
  with loading(meta, tokenizer):
    pass  # the index of lines is there
  with full_disk(300):
    message = message_of(lambda: make_loader(meta, tokenizer, packed=True))
  assert f"the cache in {tmp_path}/cache cannot be written" in message
  with loading(meta, tokenizer, packed=True) as loader:
    list(loader)
    assert loader.counters()["toy"] == NOTHING_LOST | {"samples": 40}


def test_a_cache_without_permission(tmp_path, tokenizer):
  if not os.geteuid():
    pytest.skip("root may write anywhere")
  meta = write_data(tmp_path, *texts(4))
  (tmp_path / "cache").mkdir(mode=0o500)
  message = message_of(lambda: make_loader(meta, tokenizer, packed=True))
  assert f"the cache in {tmp_path}/cache cannot be written or read (Permission denied)" in message


def damages(content):
  """Copies of a file's content, each damaged in another way."""
  for position in range(0, len(content), 3):
    damaged = bytearray(content)
    damaged[position] ^= 0x15
    yield bytes(damaged)
  for length in range(0, len(content), 20):
    yield content[:length]
    yield content[:length] + bytes(len(content) - length)
  yield from (b"PK\x03\x04 no archive", b"\x80\x04 no pickle", content + b"more", content[::-1])


def test_a_damaged_index_of_lines_is_built_anew(tmp_path):
  path, cache = tmp_path / "toy.jsonl", tmp_path / "cache"
  path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": 3}\n')
  JsonlFile(path, "toy", cache=cache)
  (index,) = cache.iterdir()
  content = index.read_bytes()
  for damaged in damages(content):
    index.write_bytes(damaged)
    file = JsonlFile(path, "toy", cache=cache)
    assert [file.read(i)["a"] for i in range(len(file))] == [1, 2, 3]
    assert [file.where(i).line for i in range(3)] == [1, 3, 4]
    file.close()
    assert index.read_bytes() in (content, damaged)


def measure_letters(file, line):
  """Stands for a real one: the tokens are those that the line says; 13 cannot be read."""
  record = file.read(line)
  if record == 13:
    raise file.where(line).error("unlucky")
  return Size(record, record % 3, record // 2)


def sizes_in(folder, numbers):
  path = folder / "numbers.jsonl"
  path.write_text("".join(f"{number}\n" for number in numbers))
  os.utime(path, ns=(1, 1))
  file = JsonlFile(path, "toy")
  found = index_sizes(file, measure_letters, {}, folder / "cache", workers=0)
  file.close()
  return found


def test_damaged_sizes_are_measured_anew(tmp_path, monkeypatch):
  monkeypatch.setattr(sizes, "BLOCK", 2)
  numbers = [5, 13, 7, 8, 13]
  errors = {line: f"{tmp_path}/numbers.jsonl:{line + 1} (dataset 'toy'): unlucky" for line in (1, 4)}
  expected = sizes_in(tmp_path, numbers).records.tolist()
  (folder,) = (tmp_path / "cache").iterdir()
  for path in [path for path in folder.iterdir() if path.name != "lock"]:
    content = path.read_bytes()
    for damaged in damages(content):
      path.write_bytes(damaged)
      found = sizes_in(tmp_path, numbers)
      assert found.records.tolist() == expected and found.errors == errors, (path, damaged)


BUILD_SLOWLY = """
import json, os, sys, time
from pathlib import Path
from internvl_jax.data.source.jsonl import JsonlFile
from internvl_jax.data.source.sizes import Size, index_sizes

def measure(file, line):
  with open("measured", "a") as log:
    log.write("x")
  time.sleep(0.002)
  record = file.read(line)
  if record == 13:
    raise file.where(line).error("unlucky")
  return Size(record, record % 3, record // 2)

Path(f"ready{sys.argv[1]}").touch()
while not (os.path.exists("ready0") and os.path.exists("ready1")):
  time.sleep(0.001)
file = JsonlFile("numbers.jsonl", "toy", cache="cache")
found = index_sizes(file, measure, {}, "cache", workers=0)
print(json.dumps([found.records.tolist(), found.errors]))
"""


def test_two_processes_build_one_index_at_once(tmp_path):
  numbers = [*range(20, 220), 13]
  path = tmp_path / "numbers.jsonl"
  path.write_text("".join(f"{number}\n" for number in numbers))
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", BUILD_SLOWLY, str(number)],
      cwd=tmp_path,
      env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[3])},
      stdout=subprocess.PIPE,
    )
    for number in range(2)
  ]
  for process in processes:
    out, _ = process.communicate(timeout=20)
    records, errors = json.loads(out)
    assert records == [[number, number % 3, number // 2] for number in range(20, 220)] + [[0, 0, 0]]
    assert errors == {"200": "numbers.jsonl:201 (dataset 'toy'): unlucky"}
  # Who came second found the work done, and only looked again at what could not be read.
  assert len((tmp_path / "measured").read_text()) == 201 + 1


def test_two_processes_without_locks(tmp_path, monkeypatch):
  """Where a file system has no locks, what another process wrote over is noticed."""
  monkeypatch.setattr(sizes, "locked", lambda folder: contextlib.nullcontext())
  path = tmp_path / "numbers.jsonl"
  path.write_text("5\n6\n7\n")

  def interrupted(file, line):
    (folder,) = (tmp_path / "cache").iterdir()
    if line == 2:
      np.save(folder / "other.npy", np.zeros(3, sizes.SIZE))
      (folder / "other.npy").replace(folder / "sizes.npy")
    return measure_letters(file, line)

  build = {"key": {}, "cache": tmp_path / "cache", "workers": 0}
  message = message_of(lambda: index_sizes(JsonlFile(path, "toy"), interrupted, **build))
  assert "another process wrote these sizes at the same time" in message and "loader.cache_dir" in message
  found = index_sizes(JsonlFile(path, "toy"), measure_letters, **build)
  assert found.records["tokens"].tolist() == [5, 6, 7] and not found.errors


def test_one_missing_file_does_not_move_the_root(tmp_path, tokenizer):
  """The files beside the meta file decide, not whether the very first of them is there."""
  noise().save(tmp_path / "a.png")
  animation(tmp_path / "a.gif")
  meta = write_data(
    tmp_path, with_image("gone.png"), with_image("a.png"), {"video": "a.gif", **GOOD}, root=""
  )
  with loading(meta, tokenizer, policy="drop") as loader:
    list(loader)
    assert loader.counters()["toy"] == NOTHING_LOST | {"unreadable": 1}
  assert lost_by_doctor(meta, tokenizer, packed=True) == [
    f"{tmp_path}/toy.jsonl:1 (dataset 'toy'): image not found: {tmp_path}/gone.png; check the dataset's root in the "
    "meta file"
  ]
