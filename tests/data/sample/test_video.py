"""Frames of videos: which, how many, from whatever container, and what is said of files that are damaged."""

import itertools
import json
import os
import pathlib

import av
import numpy as np
import pytest
from PIL import Image

from internvl_jax.data.sample import compiled, video, video_file
from internvl_jax.data.where import DataError
from tests.support.data_toys import ASSETS, WHERE
from tests.support.videos import (
  FRAMES,
  X264,
  number_in,
  numbers_of,
  picture,
  planned,
  write_folder,
  write_gif,
  write_video,
)

# --- Which frames -------------------------------------------------------------------------------------------


def test_recorded_frame_indices():
  recorded = json.loads((ASSETS / "frames.json").read_text())
  assert len(recorded) == 6
  for case, expected in recorded.items():
    first, second, third, *rest = case.split(",")
    if third == "middle":
      assert video.frame_indices(int(second), int(first), "middle") == expected
    else:
      most = int(rest[0])
      rate = float(first.removeprefix("fps"))
      indices = video.frame_indices_at_rate(int(second), float(third), rate, most if most > 0 else None)
      assert indices == expected


def test_one_frame_from_each_interval():
  rng = np.random.default_rng(0)
  drawn = np.array([video.frame_indices(103, 8, rng) for _ in range(2000)])
  edges = np.linspace(0, 103, 9).astype(int)
  for column, low, high in zip(drawn.T, edges, edges[1:], strict=False):
    assert set(column) == set(range(low, high))
  assert video.frame_indices(5, 8, rng) == [0, 1, 2, 3, 4, 4, 4, 4]
  assert video.frame_indices(8, 8, rng) == list(range(8))
  assert video.frame_indices(1, 1, rng) == [0]


def test_number_wanted_is_uniform_and_drawn_first():
  drawn = [video.num_wanted(np.random.default_rng((0, i)), 4, 7) for i in range(400)]
  assert set(drawn) == {4, 5, 6, 7} and min(map(drawn.count, set(drawn))) > 70
  assert video.num_wanted(np.random.default_rng(0), 5, 5) == 5
  assert video.num_wanted(None, 4, 7) == 7


# --- Containers and codecs ----------------------------------------------------------------------------------

KINDS = {
  "b_frames.mp4": {},
  "index_first.mp4": {"mux": {"movflags": "faststart"}},
  "fragments.mp4": {"mux": {"movflags": "frag_keyframe+empty_moov"}},
  "open_groups.mp4": {"opts": {"x264-params": X264 + ":open-gop=1"}},
  "one_group.mp4": {"opts": {"x264-params": "bframes=3:b-adapt=0:scenecut=0:keyint=1000"}},
  "b_frames.mkv": {},
  "b_frames.avi": {},
  "b_frames.ts": {},
  "b_frames.flv": {},
  "bare.h264": {},
  "mpeg4.avi": {"codec": "mpeg4", "max_b_frames": 2, "bit_rate": 2_000_000},
  "mpeg4.mov": {"codec": "mpeg4", "max_b_frames": 2, "bit_rate": 2_000_000},
  "mpeg2.mpg": {"codec": "mpeg2video", "max_b_frames": 2, "bit_rate": 2_000_000},
  "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
  "vp8.webm": {"codec": "libvpx", "opts": {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "2M"}},
  "vp9.webm": {
    "codec": "libvpx-vp9",
    "opts": {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "realtime"},
  },
  "av1.mp4": {"codec": "libsvtav1", "opts": {"preset": "12"}},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_of_every_kind_of_file(tmp_path, name, monkeypatch):
  path = write_video(tmp_path / name, **KINDS[name])
  # The way round, decoding all from the start, would hide a wrong jump.
  decoded, starts = video_file._decoded, []
  monkeypatch.setattr(
    video_file, "_decoded", lambda *a, jump: (starts.append(jump), decoded(*a, jump=jump))[1]
  )
  assert numbers_of(path, FRAMES) == list(range(FRAMES))
  for wanted in (1, 2, 5, 9):
    expected = video.frame_indices(FRAMES, wanted, "middle")
    assert numbers_of(path, wanted) == expected
    rng, again = np.random.default_rng(wanted), np.random.default_rng(wanted)
    video.num_wanted(again, wanted, wanted)
    assert numbers_of(path, wanted, rng=rng) == video.frame_indices(FRAMES, wanted, again)
  assert all(starts)
  scanned = video_file.scan(path, WHERE)
  for number in (*range(0, FRAMES, 5), FRAMES - 1):
    (image,) = video_file.pictures(scanned, [number], WHERE)
    assert number_in(image) == number
  assert all(starts)


def test_only_groups_that_hold_wanted_frames_are_decoded(tmp_path, monkeypatch):
  path = write_video(tmp_path / "a.mp4", range(200))
  scanned = video_file.scan(path, WHERE)
  assert scanned.keys.tolist() == list(range(0, 200, 20))
  decoded = []
  number = video_file.Video.number
  monkeypatch.setattr(
    video_file.Video, "number", lambda self, *a: decoded.append(number(self, *a)) or decoded[-1]
  )
  assert [number_in(image) for image in video_file.pictures(scanned, [3, 105, 107], WHERE)] == [3, 105, 107]
  # B-frames hold a few back.
  assert {3, 100, 107} <= set(decoded) <= {*range(10), *range(100, 115)}


def test_frames_that_no_other_needs_are_passed_over(tmp_path, monkeypatch):
  """The wanted ones are the same to the bit, whether references or not."""
  path = write_video(
    tmp_path / "a.mp4", range(120), opts={"x264-params": "bframes=3:b-adapt=0:scenecut=0:keyint=60"}
  )
  scanned = video_file.scan(path, WHERE)
  unneeded, number, counted = video_file._unneeded, video_file.Video.number, []
  monkeypatch.setattr(
    video_file.Video, "number", lambda self, time, n: counted.append(n) or number(self, time, n)
  )

  def decode(numbers, *, skip):
    monkeypatch.setattr(video_file, "_unneeded", unneeded if skip else lambda *_: np.zeros(0, bool))
    counted.clear()
    return [np.asarray(image) for image in video_file.pictures(scanned, numbers, WHERE)], len(counted)

  for numbers in ([40, 41, 42, 43, 44], [7], [0, 59, 60, 119], [25, 55, 100]):
    (found, fewer), (expected, all_of_them) = decode(numbers, skip=True), decode(numbers, skip=False)
    np.testing.assert_array_equal(found, expected)
  assert fewer < 0.7 * all_of_them


def test_large_frames_are_arrays_turned_like_images(tmp_path):
  assert compiled.load().resize is not None
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8))
  for sides in itertools.product((False, True), repeat=3):
    turn = video_file.Turn(*sides)
    np.testing.assert_array_equal(turn(np.asarray(image)), np.asarray(turn(image)))
  path = str(tmp_path / "a.mp4")
  with av.open(path, "w") as container:
    out = container.add_stream("libx264", rate=25)
    out.width, out.height, out.pix_fmt = 322, 246, "yuv420p"
    noise = np.random.default_rng(0).integers(0, 256, (246, 322, 3), np.uint8)
    container.mux(out.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
    container.mux(out.encode(None))
  (found,) = video_file.pictures(video_file.scan(path, WHERE), [0], WHERE)
  with av.open(path) as container:
    expected = next(container.decode(video=0)).to_image()
  assert isinstance(found, np.ndarray)
  np.testing.assert_array_equal(found, np.asarray(expected))


def test_a_key_frame_that_is_none_costs_time_and_no_frame(tmp_path):
  path = write_video(tmp_path / "a.mp4", opts={"x264-params": "bframes=3:b-adapt=0:scenecut=0:keyint=1000"})
  scanned = video_file.scan(path, WHERE)._replace(keys=np.arange(0, FRAMES, 7))
  wanted = [2, 3, 30, 31, 45, FRAMES - 1]
  assert [number_in(image) for image in video_file.pictures(scanned, wanted, WHERE)] == wanted


def test_variable_frame_rate(tmp_path):
  gaps = np.random.default_rng(0).integers(10, 90, FRAMES - 1)
  times = [0, *np.cumsum(gaps).tolist()]
  for name in ("a.mp4", "a.mkv"):
    path = write_video(tmp_path / name, times=times)
    assert numbers_of(path, 7) == video.frame_indices(FRAMES, 7, "middle")
    # The frames on the screen from 0.5 to 1.5 seconds, whatever the average rate.
    shown = [i for i in range(FRAMES - 1) if times[i + 1] > 500 and times[i] < 1500]
    assert numbers_of(path, len(shown), clip=[0.5, 1.5]) == shown


def test_what_the_header_says_is_not_believed(tmp_path):
  path = write_video(tmp_path / "a.avi", codec="mjpeg", pix_fmt="yuvj420p")
  content = bytearray((tmp_path / "a.avi").read_bytes())
  at = content.index(b"avih") + 8 + 16  # dwTotalFrames
  assert content[at] == FRAMES
  content[at] = 200
  at = content.index(b"strh") + 8 + 32  # dwLength
  assert content[at] == FRAMES
  content[at] = 200
  (tmp_path / "a.avi").write_bytes(content)
  with av.open(path) as container:
    assert container.streams.video[0].frames == 200
  assert numbers_of(path, 4) == video.frame_indices(FRAMES, 4, "middle")


def test_fewer_frames_than_wanted(tmp_path):
  path = write_video(tmp_path / "a.mp4", range(3))
  assert numbers_of(path, 5) == [0, 1, 2, 2, 2] and planned(path, 5) == 5
  gif = write_gif(tmp_path / "a.gif", 3)
  assert numbers_of(gif, 5) == [0, 1, 2] and planned(gif, 5) == 3
  folder = write_folder(tmp_path / "a", ["f_1.png", "f_2.png", "f_3.png"])
  assert numbers_of(folder, 5) == [0, 1, 2] and planned(folder, 5) == 3


def test_gif(tmp_path):
  path = write_gif(tmp_path / "a.GIF")
  assert numbers_of(path, 4) == video.frame_indices(12, 4, "middle") and planned(path, 4) == 4
  # 0.1 s a frame.
  assert numbers_of(path, 9, clip=[0.25, 0.6]) == [2, 3, 4, 5] and planned(path, 9, clip=[0.25, 0.6]) == 4
  # What the web calls a gif is a video at times.
  os.rename(write_video(tmp_path / "b.mp4"), tmp_path / "b.gif")
  assert numbers_of(tmp_path / "b.gif", 3) == video.frame_indices(FRAMES, 3, "middle")


def test_folder_of_images_in_natural_order(tmp_path):
  names = [f"shot_{number}.{'jpg' if number % 2 else 'png'}" for number in range(8, 13)]
  folder = write_folder(tmp_path / "clip", names)
  (folder / "notes_1.txt").write_text("not a frame")
  (folder / "._shot_9.jpg").write_text("left by a file manager")
  for path in (folder, f"{folder}/"):
    assert numbers_of(path, 9) == [0, 1, 2, 3, 4]
    assert numbers_of(path, 2) == video.frame_indices(5, 2, "middle")
  (folder / "shot_10.png").write_bytes(b"broken")
  with pytest.raises(DataError, match=r"shot_10\.png cannot be decoded"):
    numbers_of(folder, 9)


# --- Clips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "fragments.mp4", "a.avi", "a.ts"])
def test_clip_of_a_file(tmp_path, name):
  path = write_video(tmp_path / name, **KINDS.get(name, {}))  # 64 frames of 0.04 s
  assert numbers_of(path, 10, clip=[0.4, 0.8]) == list(range(10, 20))
  assert numbers_of(path, 3, clip=(0.41, 0.43)) == [10, 10, 10]
  assert numbers_of(path, 4, clip=[2.4, 3]) == [60, 61, 62, 63]  # half a second past the end: rounded up
  assert numbers_of(path, FRAMES, clip=[]) == list(range(FRAMES))


@pytest.mark.parametrize(
  ("clip", "message"),
  [
    ("0-3", "'clip' must be [start, end] in seconds, got '0-3'"),
    ([1], "'clip' must be [start, end] in seconds, got '[1]'"),
    ([0, True], "'clip' must be [start, end] in seconds"),
    (["0", "3"], "'clip' must be [start, end] in seconds"),
    (3, "'clip' must be [start, end] in seconds, got '3'"),
    ([2, 1], "'clip' must have 0 <= start < end, got [2, 1]"),
    ([1, 1], "0 <= start < end"),
    ([-1, 1], "0 <= start < end"),
    ([0, float("nan")], "0 <= start < end"),
    ([3, 4], "'clip' [3, 4] is not inside video"),
    ([1, 9], "which lasts 2.56 s"),
  ],
)
def test_wrong_clips(tmp_path, clip, message):
  path = write_video(tmp_path / "a.mp4")
  with pytest.raises(DataError) as caught:
    numbers_of(path, 4, clip=clip)
  assert message in str(caught.value) and str(caught.value).startswith("toy.jsonl:3 (dataset 'toy'): ")
  folder = write_folder(tmp_path / "folder", ["f_1.png"])
  with pytest.raises(DataError, match="a folder of images has no seconds"):
    planned(folder, 4, clip=[0, 1])


# --- Damage -------------------------------------------------------------------------------------------------


def message_of(path, wanted=8):
  with pytest.raises(DataError) as caught:
    numbers_of(path, wanted)
  message = str(caught.value)
  assert message.startswith("toy.jsonl:3 (dataset 'toy'): ") and "\n" not in message
  assert os.path.basename(str(path).rstrip("/")) in message
  return message


def test_files_that_are_no_videos(tmp_path):
  assert "video not found" in message_of(tmp_path / "gone.mp4")
  assert "video not found" in message_of(f"{tmp_path}/gone/")
  (tmp_path / "file.mp4").write_bytes(b"0")
  assert "video not found" in message_of(f"{tmp_path}/file.mp4/")
  (tmp_path / "empty.mp4").write_bytes(b"")
  assert "is empty (0 bytes)" in message_of(tmp_path / "empty.mp4")
  (tmp_path / "text.mp4").write_text("a line of text\n" * 100)
  assert "is not a video: it is text; convert it to MP4 or delete" in message_of(tmp_path / "text.mp4")
  picture(0).save(tmp_path / "picture.png")
  assert "is not a video but png; put it under 'image'" in message_of(tmp_path / "picture.png")
  (tmp_path / "playlist.m3u8").write_text("#EXTM3U\n#EXTINF:10,\nhttp://192.0.2.1/a.ts\n#EXT-X-ENDLIST\n")
  message_of(tmp_path / "playlist.m3u8")  # at once, without a word to the network
  os.mkfifo(tmp_path / "pipe.mp4")
  assert "is not a file" in message_of(tmp_path / "pipe.mp4")
  (tmp_path / "nothing").mkdir()
  (tmp_path / "nothing" / "readme.txt").write_text("")
  assert "is a folder without an image" in message_of(tmp_path / "nothing")


def test_sound_without_a_picture(tmp_path):
  with av.open(str(tmp_path / "a.mp4"), "w") as container:
    sound = container.add_stream("aac", rate=16000, layout="mono")
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    frame.sample_rate, frame.pts = 16000, 0
    container.mux(sound.encode(frame))
    container.mux(sound.encode(None))
  assert "has no video stream" in message_of(tmp_path / "a.mp4")


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("b_frames.mp4", "ends early: its index (moov) is missing"),
    ("index_first.mp4", "ends early: "),
    ("fragments.mp4", "is damaged (InvalidDataError"),
    ("b_frames.mkv", "bytes are there"),
    ("vp9.webm", "bytes are there"),
    ("b_frames.avi", "ends early: it is cut in its frame"),
    ("b_frames.flv", "ends early: it is cut in its frame"),
  ],
)
def test_a_file_that_ends_early(tmp_path, name, message):
  path = write_video(tmp_path / name, **KINDS[name])
  content = pathlib.Path(path).read_bytes()
  pathlib.Path(path).write_bytes(content[: len(content) * 6 // 10])
  assert message in message_of(path)


def test_a_file_that_ends_between_two_frames(tmp_path):
  path = write_video(tmp_path / "a.mp4", mux={"movflags": "faststart"})
  with av.open(path) as container:
    ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
  content = pathlib.Path(path).read_bytes()
  pathlib.Path(path).write_bytes(content[: ends[39]])
  assert f"ends early: 40 of {FRAMES} frames are there" in message_of(path)


def test_a_stream_that_breaks_in_the_middle(tmp_path):
  path = write_video(tmp_path / "a.mp4")
  with av.open(path) as container:
    packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
  content = bytearray(pathlib.Path(path).read_bytes())
  for begin, size in packets[30:40]:
    content[begin : begin + size] = b"\xff" * size
  pathlib.Path(path).write_bytes(content)
  message = message_of(path)
  assert "breaks before frame 2" in message or "breaks before frame 3" in message
  assert f"of {FRAMES} (InvalidDataError" in message and "of 8 wanted frames were decoded" in message
  # The groups around it are whole.
  assert numbers_of(path, 10, clip=[0, 0.4]) == list(range(10))
  assert numbers_of(path, 10, clip=[2, 2.4]) == list(range(50, 60))


def test_damaged_gif(tmp_path):
  path = write_gif(tmp_path / "a.gif")
  content = path.read_bytes()
  path.write_bytes(content[:10])
  message_of(path)
  path.write_bytes(content[: len(content) // 2])
  message_of(path, 12)
  path.write_bytes(b"")
  assert "is empty" in message_of(path)
