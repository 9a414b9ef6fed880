"""From a video to a few of its frames.

A video is a file that FFmpeg reads, an animated `.gif`, a folder of images or a list of them. A file on another machine is
copied before it is read: FFmpeg must not open the network. How many frames a sample gets is the first thing
drawn from its generator, and which ones the second:

    num_wanted      uniform from min_num_frame to max_num_frame
    frame_indices   one frame from each of so many equal intervals

A file that has fewer frames than wanted repeats its last one; a gif or a folder gives all it has. Both are the
reference's rules, so the tiles of a file are known before it is opened (`planned_frames`).
"""

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from internvl_jax.data.sample import images, video_file
from internvl_jax.data.sample.images import Picture
from internvl_jax.data.sample.notes import Note
from internvl_jax.data.source import files
from internvl_jax.data.source.media import Media, name_of
from internvl_jax.data.where import DataError, Where, shown

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
"""Files of a folder that are frames; others are passed over."""

# A clip's times may miss a frame's by so many seconds: containers round timestamps to milliseconds.
_ROUNDING = 1e-3
# A clip may end so many seconds after its video: annotations round up to whole seconds.
_CLIP_OVERHANG = 1.0
# No video lasts longer, in seconds; Python's integers go on until they overflow a float.
_LONGEST_VIDEO = 1e9
# Browsers show a gif's frame without a duration for so many seconds.
_GIF_SECONDS = 0.1
# What Pillow raises for a damaged gif.
_GIF_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError)

Sampling = np.random.Generator | Literal["middle"]

Source = Media | tuple[Media, ...]
"""A video: its path, its URL or its bytes; or those of its frames, in order."""


def is_image_name(path: str) -> bool:
  """Says whether a file may be a frame, by its name."""
  return files.suffix(path).lower() in IMAGE_SUFFIXES


def num_wanted(rng: np.random.Generator | None, min_num_frame: int, max_num_frame: int) -> int:
  """A number of frames from min to max, both included; the max without a generator.

  It is the first thing that a video's sample draws.
  """
  return max_num_frame if rng is None else int(rng.integers(min_num_frame, max_num_frame, endpoint=True))


def frame_indices(num_frames: int, wanted: int, sampling: Sampling) -> list[int]:
  """One frame from each of `wanted` equal intervals, ascending; all, and the last again, if too few.

      >>> frame_indices(100, 8, "middle")
      [5, 18, 30, 43, 55, 68, 80, 93]
      >>> frame_indices(3, 5, "middle")
      [0, 1, 2, 2, 2]

  The reference never draws an interval's last frame, and draws from the whole video where an interval has but
  one frame; here every frame of an interval is as likely as the others.

  Args:
    num_frames: frames of the video, 1 or more.
    wanted: how many to return.
    sampling: a generator draws the frame of an interval; "middle" is the one in its middle.
  """
  # A float's last digit decides about an interval's first frame: linspace rounds as the reference does.
  edges = np.linspace(0, num_frames, min(wanted, num_frames) + 1).astype(np.int64)
  first, end = edges[:-1], edges[1:]
  indices = (first + end - 1) // 2 if sampling == "middle" else sampling.integers(first, end)
  return indices.tolist() + [num_frames - 1] * (wanted - len(indices))


def frame_indices_at_rate(
  num_frames: int, fps: float, rate: float, max_num_frame: int | None = None
) -> list[int]:
  """The frames in the middle of each 1/rate seconds, the first `max_num_frame` of them.

      >>> frame_indices_at_rate(300, fps=24, rate=2, max_num_frame=8)
      [6, 18, 30, 42, 54, 66, 78, 90]

  Args:
    num_frames: frames of the video.
    fps: of the video.
    rate: frames wanted a second.
    max_num_frame: most frames returned; None: no limit.
  """
  step = 1 / rate
  middles = np.arange(step / 2, num_frames / fps + step / 2, step)
  indices = np.around(middles * fps).astype(np.int64)
  return indices[indices < num_frames].tolist()[:max_num_frame]


def planned_frames(
  path: Source,
  where: Where,
  *,
  min_num_frame: int,
  max_num_frame: int,
  rng: np.random.Generator | None,
  clip: Any = None,
) -> int:
  """How many frames `read_frames` gives for a generator in the same state; nothing is decoded.

  Of a remote video nothing is fetched either, but for a gif, whose frames must be counted. Frames that are listed are
  not looked at.

  Raises:
    DataError: the video is missing or empty, or the clip is malformed.
  """
  span = _checked_clip(clip, where)
  wanted = num_wanted(rng, min_num_frame, max_num_frame)
  if isinstance(path, tuple):
    return min(wanted, len(_listed(path, where, span)))
  found, name = _look(path, where), name_of(path)
  if found.is_folder:
    return min(wanted, len(_folder_images(name, where, span)))
  if not _named_gif(name):
    return wanted
  with _local_copy(path, found, where) as copy, _all_errors_named(name, where):
    if not _is_gif(copy):
      return wanted
    with _opened_gif(copy, name, where) as gif:
      return min(wanted, len(_gif_range(gif, name, span, where)))


def read_frames(
  path: Source,
  where: Where,
  *,
  min_num_frame: int,
  max_num_frame: int,
  rng: np.random.Generator | None,
  clip: Any = None,
) -> list[Picture]:
  """Collects `iter_frames` in a list."""
  limits: dict[str, Any] = {"min_num_frame": min_num_frame, "max_num_frame": max_num_frame}
  return list(iter_frames(path, where, **limits, rng=rng, clip=clip))


def iter_frames(
  path: Source,
  where: Where,
  *,
  min_num_frame: int,
  max_num_frame: int,
  rng: np.random.Generator | None,
  clip: Any = None,
  noted: list[Note] | None = None,
) -> Iterator[Picture]:
  """Yields frames of a video in order, RGB, turned as the file says they are shown; images as `open_image` takes them.

  One at a time, because 32 frames of a large video are most of a gigabyte.

  Args:
    path: a video file, a gif, a folder of images or the images themselves; paths, URLs or bytes.
    where: the line that names it, for errors.
    min_num_frame: fewest frames wanted.
    max_num_frame: most frames wanted.
    rng: draws their number, then which; None: `max_num_frame`, from the middle of each interval.
    clip: [start, end] in seconds from the first frame; None or empty: the whole video.
    noted: gets what one should know about frames that are images.

  Raises:
    DataError: the video is missing, empty, damaged or not a video, cannot be fetched, or the clip does not fit it.
  """
  span = _checked_clip(clip, where)
  wanted = num_wanted(rng, min_num_frame, max_num_frame)
  sampling = "middle" if rng is None else rng
  if isinstance(path, tuple):
    yield from _image_frames(_listed(path, where, span), where, wanted, sampling, noted)
    return
  found, name = _look(path, where), name_of(path)
  if found.is_folder:
    yield from _image_frames(_folder_images(name, where, span), where, wanted, sampling, noted)
    return
  with _local_copy(path, found, where) as copy, _all_errors_named(name, where):
    read = _gif_frames if _named_gif(name) and _is_gif(copy) else _file_frames
    yield from read(copy, name, where, wanted, sampling, span)


def _file_frames(
  copy: str, path: str, where: Where, wanted: int, sampling: Sampling, span: tuple[float, float] | None
) -> Iterator[Picture]:
  """Yields the frames of a file that FFmpeg reads; `copy` is read, `path` is what errors call it."""
  video = video_file.scan(copy, where, path)
  numbers = _frames_between(video.seconds, video.end, span, path, where)
  indices = frame_indices(len(numbers), wanted, sampling)
  once = sorted(set(indices))
  repeats = [indices.count(index) for index in once]
  for image, times in zip(
    video_file.pictures(video, [numbers[i] for i in once], where), repeats, strict=True
  ):
    yield from itertools.repeat(image, times)


# --- Clips and paths ----------------------------------------------------------------------------------------


def _checked_clip(clip: Any, where: Where) -> tuple[float, float] | None:
  """Finds (start, end); None for the whole video."""
  if clip is None or clip == []:
    return None
  numbers = isinstance(clip, list | tuple) and all(
    isinstance(time, int | float) and not isinstance(time, bool) for time in clip
  )
  if not numbers or len(clip) != 2:
    raise where.error(f"'clip' must be [start, end] in seconds, got {shown(clip)}")
  start, end = clip
  if not 0 <= start < end < _LONGEST_VIDEO:
    raise where.error(
      f"'clip' must have 0 <= start < end, got {shown(clip, repr)}; give seconds from the video's beginning"
    )
  return float(start), float(end)


def _frames_between(
  seconds: np.ndarray, end: float, span: tuple[float, float] | None, path: str, where: Where
) -> range:
  """The numbers of the frames that are shown during a clip.

  Args:
    seconds: [frames], when each is first shown.
    end: when the last is over.
    span: the clip.
    path: of the video, for errors.
    where: the line of the clip.
  """
  if span is None:
    return range(len(seconds))
  if span[0] >= end or span[1] > end + _CLIP_OVERHANG:
    raise where.error(
      f"'clip' [{span[0]:g}, {span[1]:g}] is not inside video {path}, which lasts {end:.2f} s; correct it"
    )
  # The frame that is on the screen at the start began before it.
  first = int(np.searchsorted(seconds, span[0] + _ROUNDING, "right")) - 1
  stop = int(np.searchsorted(seconds, span[1] - _ROUNDING, "left"))
  return range(first, max(stop, first + 1))


def _look(media: Media, where: Where) -> files.Status:
  """Finds out what a video is: a folder, or a file that has content."""
  name = name_of(media)
  if isinstance(media, str) and media.endswith("/") and files.is_remote(media):
    return files.Status(is_folder=True, is_file=False, size=None)
  with _named_errors(name, where):
    if isinstance(media, str):
      found = files.status_of(media)
    else:
      found = files.Status(is_folder=False, is_file=True, size=len(media.content))
  if not found.is_folder:
    if not found.is_file:  # opening a pipe would wait for ever
      raise where.error(f"video {name} is not a file; name a video file or a folder of images")
    if found.size == 0:
      raise where.error(f"video {name} is empty (0 bytes); restore it or delete the line")
  return found


@contextlib.contextmanager
def _local_copy(media: Media, found: files.Status, where: Where) -> Iterator[str]:
  """Gives a file on a local disk with the video's content, for the time of the `with`."""
  content = None if isinstance(media, str) else media.content
  with contextlib.ExitStack() as stack:
    with _named_errors(name_of(media), where):
      copy = stack.enter_context(files.local_copy(name_of(media), found.size, content))
    yield copy


@contextlib.contextmanager
def _named_errors(path: str, where: Where) -> Iterator[None]:
  """Names the video whose file cannot be had."""
  try:
    yield
  except FileNotFoundError as error:
    raise where.error(f"video not found: {path}; check {where.root}") from error
  except files.FetchError as error:
    raise where.error(f"video {path} cannot be fetched: {error}") from error
  except OSError as error:
    cause = f"cannot be opened ({error.strerror or error}); correct its path or delete the line"
    raise where.error(f"video {path} {cause}") from error


@contextlib.contextmanager
def _all_errors_named(path: str, where: Where) -> Iterator[None]:
  """Names the video that cannot be decoded, whatever its decoder makes of that."""
  try:
    yield
  except DataError:
    raise
  except Exception as error:
    # PyAV and Pillow have no list of what they raise for damaged files: IndexError for a stream whose codec is not
    # known and MemoryError were seen.
    raise video_file.damaged(path, f"cannot be decoded ({type(error).__name__}: {error})", where) from error


def _named_gif(path: str) -> bool:
  return files.suffix(path).lower() == ".gif"


def _is_gif(path: str) -> bool:
  """Says whether a local file is a gif; what the web calls .gif is a video at times."""
  with open(path, "rb") as file:
    return file.read(4) == b"GIF8"


# --- Images, in a folder or listed --------------------------------------------------------------------------


def _image_frames(
  paths: Sequence[Media], where: Where, wanted: int, sampling: Sampling, noted: list[Note] | None
) -> Iterator[Picture]:
  for index in frame_indices(len(paths), min(wanted, len(paths)), sampling):
    yield images.open_image(paths[index], where, noted)


def _listed(paths: tuple[Media, ...], where: Where, span: tuple[float, float] | None) -> tuple[Media, ...]:
  if span is not None:
    raise where.error(
      f"'clip' [{span[0]:g}, {span[1]:g}] cuts a list of {len(paths)} images, which have no seconds; list the clip's "
      "images and take 'clip' out"
    )
  return paths


def _folder_images(path: str, where: Where, span: tuple[float, float] | None) -> list[str]:
  """The paths of a folder's images in order: by the number before the suffix, then by name."""
  with _named_errors(path, where):
    entries = files.list_folder(path)
  if span is not None:
    raise where.error(
      f"'clip' [{span[0]:g}, {span[1]:g}] cuts video {path}, but a folder of images has no seconds; leave the "
      "clip's images in a folder and take 'clip' out"
    )
  # Names with a leading dot are leftovers of file managers, even if they end in .jpg.
  named = {
    name: entry
    for name, entry in ((files.name(entry), entry) for entry in entries)
    if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
  }
  if not named:
    raise where.error(f"video {path} is a folder without an image ({', '.join(IMAGE_SUFFIXES)}); fill it")
  return [named[name] for name in sorted(named, key=_natural)]


def _natural(name: str) -> tuple[int, list[tuple[int, str]], str]:
  """A key by which shot_2.jpg comes before shot_10.jpg, and both after names without a number."""
  last = re.search(r"(\d+)\.\w+$", name)
  parts = [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
  return int(last.group(1)) if last else -1, parts, name


# --- Gifs ---------------------------------------------------------------------------------------------------


def _gif_frames(
  copy: str, path: str, where: Where, wanted: int, sampling: Sampling, span: tuple[float, float] | None
) -> Iterator[Image.Image]:
  """Yields the frames of a gif; `copy` is read, `path` is what errors call it."""
  with _opened_gif(copy, path, where) as gif:
    numbers = _gif_range(gif, path, span, where)
    for index in frame_indices(len(numbers), min(wanted, len(numbers)), sampling):
      yield _gif_frame(gif, path, numbers[index], where)


@contextlib.contextmanager
def _opened_gif(copy: str, path: str, where: Where) -> Iterator[Any]:
  try:
    gif = Image.open(copy, formats=["GIF"])
  except _GIF_ERRORS as error:
    cause = f"{type(error).__name__}: {error}".replace(repr(copy), repr(path))
    raise video_file.damaged(path, f"cannot be opened ({cause})", where) from error
  with gif:
    yield gif


def _gif_range(gif: Any, path: str, span: tuple[float, float] | None, where: Where) -> range:
  """The numbers of a gif's frames that are shown during a clip."""
  try:
    if span is None:
      return range(gif.n_frames)
    lasts = []
    for number in range(gif.n_frames):
      gif.seek(number)
      lasts.append(gif.info.get("duration", 0) / 1000 or _GIF_SECONDS)
  except _GIF_ERRORS as error:
    raise video_file.damaged(path, f"cannot be read ({type(error).__name__}: {error})", where) from error
  ends = np.cumsum(lasts)
  return _frames_between(ends - lasts, float(ends[-1]), span, path, where)


def _gif_frame(gif: Any, path: str, number: int, where: Where) -> Image.Image:
  try:
    gif.seek(number)
    return gif.convert("RGB")
  except _GIF_ERRORS as error:
    what = f"breaks at frame {number + 1} of {gif.n_frames} ({type(error).__name__}: {error})"
    raise video_file.damaged(path, what, where) from error
