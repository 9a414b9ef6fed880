"""Chosen frames of a file that FFmpeg reads, decoded through PyAV.

How many frames a container's header states is often wrong, and not believed. Reading all packets, without decoding
them, costs little and says how many frames there are, when each is shown, and from which key frame it can be
decoded (`scan`). Only the groups of pictures that hold a wanted frame are then decoded (`pictures`), each up to the last
wanted one, and of H.264 no frame that is neither wanted nor needed by another. docs/data.md has times.
"""

import contextlib
import os
import re
import struct
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import av
import av.stream
import numpy as np
from PIL import Image

from internvl_jax.data.sample import compiled, content
from internvl_jax.data.sample.images import Picture
from internvl_jax.data.where import DataError, Where

# A packet may hold a picture that is not shown by itself: an invisible reference frame, one field of two. The
# picture next to it is taken, if it is no further away than this.
_NEAR = 2
# A number that is near no other, and no frame.
_NO_FRAME: tuple[int, Any] = (-1 - _NEAR, None)
# Decoders that can pass over frames no other frame is made from, by FFmpeg's names. Not HEVC: what its bitstream calls
# unreferenced may be referenced by frames of a higher temporal layer.
_MARKS_UNREFERENCED = {"h264"}
# Containers of which packets in the middle of the file may be its last: what is broadcast has no end.
_ENDS_ANYWHERE = {"mpegts", "mpeg"}

# Titles in an unknown encoding are no reason to refuse a video: said so up to av 18, and the rule from av 19 on.
_TOLERANT: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


def damaged(path: str, what: str, where: Where) -> DataError:
  """The error that a file is not whole."""
  return where.error(f"video {path} {what}; restore it or delete the line")


class Video(NamedTuple):
  """The index of a file by its packets, f frames in p packets.

  Attributes:
    path: of the file.
    name: what errors call it.
    seconds: float64 [f], when each frame is first shown, counted from the first.
    end: when the last is over.
    times: int64 [f], the same in the stream's own unit; None where packets do not tell, and frames are counted.
    packets: int64 [p], the packets' times in the order of the file, in which they are decoded; None as above.
    keys: int64 [k], the packets from which decoding may start; the first is 0.
    tag: clockwise degrees by which the stream's own tag says to turn it; 0 if it says nothing.
  """

  path: str
  name: str
  seconds: np.ndarray
  end: float
  times: np.ndarray | None
  packets: np.ndarray | None
  keys: np.ndarray
  tag: int = 0

  def start(self, number: int) -> int:
    """The packet from which decoding must start to give a frame."""
    if self.times is None or self.packets is None:
      return 0
    time = self.times[number]
    packet = int(np.flatnonzero(self.packets == time)[0])
    # Pictures that follow a key frame in the file and come before it on the screen need the group before.
    fit = self.keys[(self.keys <= packet) & (self.packets[self.keys] <= time)]
    return int(fit[-1]) if len(fit) else 0

  def number(self, time: int | None, counted: int) -> int:
    """The number of a decoded frame."""
    if self.times is None:
      return counted
    return -1 if time is None else int(np.searchsorted(self.times, time, "right")) - 1


@contextlib.contextmanager
def _opened(path: str, name: str, where: Where) -> Iterator[tuple[Any, Any]]:
  """Gives (container, video stream), to be decoded on the calling thread alone."""
  try:
    # For the container alone: av 17.0 crashes where decoders get options too.
    # A playlist must not lead to the network, where a sample could wait for ever; names may hold colons.
    options = {"protocol_whitelist": "file"}
    container = av.open(f"file:{path}", container_options=options, **_TOLERANT)
  except (av.FFmpegError, UnicodeError) as error:
    if (found := content.kind_of_file(path)) and not found.startswith(content.VIDEO):
      raise where.error(
        f"video {name} is not a video: it is {found}; {content.remedy(found, image=False)}"
      ) from error
    raise damaged(name, f"is not a video or is damaged ({_cause(error)})", where) from error
  with container:
    kind = container.format.name
    if kind.endswith("_pipe") or kind in ("image2", "tty"):
      raise where.error(f"video {name} is not a video but {kind.removesuffix('_pipe')}; put it under 'image'")
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
      if "mp4" in kind and not container.streams:
        raise damaged(name, "ends early: its index (moov) is missing", where)
      raise where.error(f"video {name} has no video stream; delete the line")
    decoder = streams[0].codec_context
    if decoder is None:
      raise where.error(f"video {name}: FFmpeg here has no decoder for its codec; convert it to H.264")
    # Loader workers are as many as there are cores; threads below them would only get in their way.
    decoder.thread_count = 1
    yield container, streams[0]


def scan(path: str, where: Where, name: str | None = None) -> Video:
  """Reads all packets of a file and decodes none, unless they do not say when frames are shown.

  Args:
    path: of the file, on a local disk.
    where: the line, for errors.
    name: what errors call the file, if it is the copy of another; None: its path.
  """
  name = path if name is None else name
  with _opened(path, name, where) as (container, stream):
    try:
      packets = [
        (p.pts, p.is_keyframe, p.is_discard, p.is_corrupt, p.duration)
        for p in container.demux(stream)
        if p.size
      ]
    except av.FFmpegError as error:
      raise damaged(name, f"cannot be read ({_cause(error)})", where) from error
    _check_whole(path, name, container, stream, packets, where)
    pts = [time for time, *_ in packets]
    tag = _tagged_turn(stream.metadata)
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    unit = float(stream.time_base or 0)
    # An AVI file has no times, and what FFmpeg makes of their absence is wrong for H.264 with B-frames.
    told = container.format.name != "avi" and None not in pts and len(set(pts)) == len(pts) and unit
  if not told:
    count = _count_by_decoding(path, name, where)
    return Video(path, name, np.arange(count) / rate, count / rate, None, None, np.zeros(1, np.int64), tag)
  decoded = np.array(pts, np.int64)
  shown = np.array([not discard for _, _, discard, _, _ in packets])
  if not shown.any():
    raise damaged(name, "has no frame to show", where)
  times = np.sort(decoded[shown])
  seconds = (times - times[0]) * unit
  last = next(duration for time, *_, duration in packets if time == times[-1])
  keys = np.flatnonzero([key for _, key, *_ in packets])
  end = float(seconds[-1]) + (float(last) * unit if last else 1 / rate)
  return Video(path, name, seconds, end, times, decoded, np.union1d(keys, [0]), tag)


def _check_whole(
  path: str, name: str, container: Any, stream: Any, packets: Sequence[tuple], where: Where
) -> None:
  """Refuses a file of which the end is missing."""
  kind = container.format.name
  indexed = sum(entry.size > 0 for entry in stream.index_entries) if "mp4" in kind else 0
  if len(packets) < indexed:
    raise damaged(name, f"ends early: {len(packets)} of {indexed} frames are there", where)
  if not packets:
    raise damaged(name, "has no frame", where)
  *_, corrupt, _ = packets[-1]
  if corrupt and kind not in _ENDS_ANYWHERE:
    raise damaged(name, f"ends early: it is cut in its frame {len(packets)}", where)
  size = os.path.getsize(path)
  stated = _matroska_size(path) if "matroska" in kind else None
  if stated is not None and size < stated:
    raise damaged(name, f"ends early: {size} of {stated} bytes are there", where)


def _matroska_size(path: str) -> int | None:
  """How many bytes an mkv or webm file has by its own account; None if it does not say.

  The file is an EBML header and a segment. Both are an id of 4 bytes, a length in 1 to 8 bytes, and so many bytes;
  leading zero bits say how many more bytes a length has, and one of only ones means unknown.
  """
  with open(path, "rb") as file:
    head = file.read(4096)
  end = 0
  for element in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
    if head[end : end + 4] != element or len(head) < end + 12 or not head[end + 4]:
      return None
    width = 9 - head[end + 4].bit_length()
    unmarked = (1 << 7 * width) - 1
    length = int.from_bytes(head[end + 4 : end + 4 + width], "big") & unmarked
    if length == unmarked:
      return None
    end += 4 + width + length
  return end


def _count_by_decoding(path: str, name: str, where: Where) -> int:
  count = 0
  with _opened(path, name, where) as (container, stream):
    try:
      for _ in container.decode(stream):
        count += 1
    except av.FFmpegError as error:
      raise damaged(name, f"breaks after frame {count} ({_cause(error)})", where) from error
  if not count:
    raise damaged(name, "has no frame", where)
  return count


def pictures(video: Video, numbers: Sequence[int], where: Where) -> Iterator[Picture]:
  """Yields the frames of these numbers, which ascend."""
  done = 0
  for jump in (True, False):
    # What a container calls a key frame may not be one. If frames are missing, all are decoded from the beginning.
    cause = "frames are missing, damaged or out of order"
    try:
      for frame in _decoded(video, numbers[done:], where, jump=jump):
        yield _turn(frame, video.tag)(_picture(frame))
        done += 1
    except av.FFmpegError as error:
      cause = _cause(error)
    if done == len(numbers):
      return
  what = f"breaks before frame {numbers[done] + 1} of {len(video.seconds)} ({cause}): {done} of {len(numbers)} wanted"
  raise damaged(video.name, f"{what} frames were decoded", where)


def _picture(frame: Any) -> Picture:
  """A frame as RGB: an array where it need not become an image of Pillow's, which takes longer than the conversion."""
  if compiled.found(frame.width * frame.height).resize is None:
    return frame.to_image()
  return frame.to_ndarray(format="rgb24")


# --- How a picture is to be turned --------------------------------------------------------------------------


class Turn(NamedTuple):
  """The orientation that makes a stored picture upright: rows and columns change places, then it is mirrored.

  Attributes:
    transpose: the first row becomes the first column.
    left_right: then left and right change places.
    top_bottom: and top and bottom.
  """

  transpose: bool = False
  left_right: bool = False
  top_bottom: bool = False

  def __call__(self, image: Picture) -> Picture:
    """The picture as it is to be seen."""
    if isinstance(image, Image.Image):
      way = _WAYS.get(self)
      return image if way is None else image.transpose(way)
    turned = image.swapaxes(0, 1) if self.transpose else image
    return turned[:: -1 if self.top_bottom else 1, :: -1 if self.left_right else 1]


_WAYS = {
  Turn(left_right=True): Image.Transpose.FLIP_LEFT_RIGHT,
  Turn(top_bottom=True): Image.Transpose.FLIP_TOP_BOTTOM,
  Turn(left_right=True, top_bottom=True): Image.Transpose.ROTATE_180,
  Turn(transpose=True): Image.Transpose.TRANSPOSE,
  Turn(transpose=True, left_right=True): Image.Transpose.ROTATE_270,  # Pillow counts the other way round
  Turn(transpose=True, top_bottom=True): Image.Transpose.ROTATE_90,
  Turn(transpose=True, left_right=True, top_bottom=True): Image.Transpose.TRANSVERSE,
}
_CLOCKWISE = {
  90: Turn(transpose=True, left_right=True),
  180: Turn(left_right=True, top_bottom=True),
  270: Turn(transpose=True, top_bottom=True),
}
# A matrix within one degree of a quarter turn is one, as for FFmpeg's own program: tan(1 degree).
_ASKEW = 0.0175


def turn_of(matrix: Sequence[int]) -> Turn:
  """The turn of a display matrix (a, b, u, c, d, v, x, y, w); none if it is not a quarter of one.

  A stored point (x, y) is shown at (ax + cy, bx + dy). Mirroring is part of it, where the reference's decord sees the
  angle of (a, b) alone, so that it turns a mirrored video upside down.
  """
  a, b, _, c, d, *_ = matrix
  straight, crossed = min(abs(a), abs(d)), min(abs(b), abs(c))
  if straight and max(abs(b), abs(c)) <= _ASKEW * straight:
    return Turn(left_right=a < 0, top_bottom=d < 0)
  if crossed and max(abs(a), abs(d)) <= _ASKEW * crossed:
    return Turn(transpose=True, left_right=c < 0, top_bottom=b < 0)
  return Turn()


def _turn(frame: Any, tagged: int) -> Turn:
  """How a frame is to be turned: as its display matrix says, or else the stream's tag."""
  matrix = frame.side_data.get("DISPLAYMATRIX")
  if matrix is None:
    return _CLOCKWISE.get(tagged, Turn())
  return turn_of(struct.unpack("=9i", bytes(matrix)))


def _tagged_turn(tags: Mapping[str, str]) -> int:
  """The clockwise degrees of a tag "rotate": what FFmpeg once made of a matrix that Matroska has no place for."""
  text = next((value for name, value in tags.items() if name.lower() == "rotate"), "")
  return int(text) % 360 if re.fullmatch(r"[+-]?\d{1,4}", text.strip()) else 0


# --- Decoding -----------------------------------------------------------------------------------------------


def _decoded(video: Video, numbers: Sequence[int], where: Where, *, jump: bool) -> Iterator[Any]:
  """Yields decoded frames of these numbers, and stops early where one cannot be had.

  Args:
    video: the file.
    numbers: of frames, ascending.
    where: the line, for errors.
    jump: feed the decoder only what wanted frames need; else all packets from the first.
  """
  waiting = deque(numbers)
  start = video.start(waiting[0]) if jump else 0
  unneeded = _unneeded(video, numbers) if jump else np.zeros(0, bool)
  counted, position = 0, -1
  before = _NO_FRAME
  with _opened(video.path, video.name, where) as (container, stream):
    for packet in container.demux(stream):
      if packet.size:  # the last one is empty: it asks the decoder for what it holds back
        position += 1
        if position < start:
          continue
        if position < len(unneeded) and stream.codec_context.name in _MARKS_UNREFERENCED:
          stream.codec_context.skip_frame = "NONREF" if unneeded[position] else "DEFAULT"
      for frame in packet.decode():
        number = video.number(frame.pts, counted)
        counted += 1
        if number < before[0]:
          return
        while waiting and waiting[0] <= number:
          if (found := _nearest(waiting.popleft(), before, (number, frame))) is None:
            return
          yield found
          start = video.start(waiting[0]) if jump and waiting else 0
        before = number, frame
      if not waiting:
        return
      if start > position:
        stream.codec_context.flush_buffers()
        before = _NO_FRAME
  while waiting and (found := _nearest(waiting.popleft(), before, before)) is not None:
    yield found


def _unneeded(video: Video, numbers: Sequence[int]) -> np.ndarray:
  """Which packets hold no wanted frame, nor one that may be taken for it: bool [packets]; none if times are not known."""
  if video.times is None or video.packets is None:
    return np.zeros(0, bool)
  held = np.searchsorted(video.times, video.packets, "right") - 1
  return np.abs(held[:, None] - np.asarray(numbers)).min(1) > _NEAR


def _nearest(number: int, before: tuple[int, Any], after: tuple[int, Any]) -> Any:
  """The frame of a number, else the nearer of those around it; None if they are far or damaged."""
  found, frame = min(before, after, key=lambda pair: abs(pair[0] - number))
  return None if frame is None or frame.is_corrupt or abs(found - number) > _NEAR else frame


def _cause(error: Exception) -> str:
  return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
