"""Videos that cannot be read cost a line and no run."""

import json
import os

import av
import numpy as np
import pytest

from internvl_jax.data.sample import video_file
from tests.support.bad_lines import (
  GOOD,
  animation,
  assert_named,
  cut,
  hard_time_limit,  # noqa: F401 - a fixture
  loop,
  write_video,
)


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
