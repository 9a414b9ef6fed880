"""Videos for tests, of frames whose numbers can be read from their pixels."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from internvl_jax.data.sample import video
from tests.support.data_toys import WHERE

FRAMES = 64
X264 = "bframes=3:b-adapt=0:scenecut=0:keyint=20"


def write_video(
  path, numbers=range(FRAMES), *, codec="libx264", times=None, opts=None, rate=25, mux=None, **stream
):
  """Writes a video of grey frames that hold 3 bits of their number in each third.

  Args:
    path: of the file.
    numbers: of the frames.
    codec: an encoder; the test is skipped where FFmpeg lacks it.
    times: of the frames, in milliseconds; None: `rate` frames a second.
    opts: of the encoder.
    rate: frames a second.
    mux: options of the container.
    stream: attributes of the stream.
  """
  if codec not in av.codecs_available:
    pytest.skip(f"no encoder {codec}")
  if codec == "libx264" and opts is None:
    opts = {"x264-params": X264}
  with av.open(str(path), "w", options=mux or {}) as container:
    out = container.add_stream(codec, rate=rate, options=opts or {})
    out.codec_context.thread_count = 1
    out.width, out.height, out.pix_fmt, out.gop_size = 96, 32, "yuv420p", 20
    if times is not None:
      out.codec_context.time_base = Fraction(1, 1000)
    for name, value in stream.items():
      setattr(out.codec_context, name, value)
    for i, number in enumerate(numbers):
      frame = av.VideoFrame.from_image(picture(number))
      frame.pts, frame.time_base = (i, Fraction(1, rate)) if times is None else (times[i], Fraction(1, 1000))
      container.mux(out.encode(frame))
    container.mux(out.encode(None))
  return str(path)


def picture(number):
  levels = [30 * (number >> shift & 7) + 20 for shift in (6, 3, 0)]
  return Image.fromarray(np.repeat(np.repeat(np.uint8([levels]), 32, 1), 32, 0)).convert("RGB")


def number_in(image):
  assert image.mode == "RGB"
  pixels = np.asarray(image, np.float64)[8:24, :, 1]
  levels = [round((pixels[:, left + 8 : left + 24].mean() - 20) / 30) for left in (0, 32, 64)]
  return levels[0] * 64 + levels[1] * 8 + levels[2]


def numbers_of(path, wanted, *, rng=None, clip=None):
  frames = video.read_frames(str(path), WHERE, min_num_frame=wanted, max_num_frame=wanted, rng=rng, clip=clip)
  return [number_in(frame) for frame in frames]


def planned(path, wanted, *, clip=None):
  limits = {"min_num_frame": wanted, "max_num_frame": wanted}
  return video.planned_frames(str(path), WHERE, **limits, rng=None, clip=clip)


def write_gif(path, count=12, **save):
  pictures = [picture(number) for number in range(count)]
  pictures[0].save(path, save_all=True, append_images=pictures[1:], **{"duration": 100} | save)
  return path


def write_folder(path, names):
  path.mkdir()
  for number, name in enumerate(names):
    picture(number).save(path / name)
  return path
