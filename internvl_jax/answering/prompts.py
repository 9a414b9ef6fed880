"""From a question with its images and videos to a prompt: the same text, tokens and tiles as in training."""

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from internvl_jax.data.sample import depth, images, video
from internvl_jax.data.sample.conversations import CONVERSATION_LINES
from internvl_jax.data.sample.images import Cutting, Picture
from internvl_jax.data.sample.placeholders import VIDEO_PLACEHOLDER
from internvl_jax.data.sample.pool import TilePool
from internvl_jax.data.sample.tokenize import IMAGE_PLACEHOLDER
from internvl_jax.data.source.files import absolute
from internvl_jax.data.source.media import Content, Media
from internvl_jax.data.where import OverLengthError, Typed, Where
from internvl_jax.eval.greedy import Prompt
from internvl_jax.eval.scoring import prompt_ids
from internvl_jax.inference import Inference

ImageLike: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
"""An image: its path, its URL, its file's bytes, a Pillow image, or uint8 [height, width, 3] in RGB."""

VideoLike: TypeAlias = str | os.PathLike[str] | bytes | Sequence[str | os.PathLike[str]]
"""A video: its path, its URL, its file's bytes, a folder of frames, or the frames' paths in order."""

_MARK = re.compile(f"{IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER}")

PYTHON = Typed("question", "a program", 1, "the question")
"""Where questions come from that no file and no flag names."""


@dataclasses.dataclass(frozen=True)
class Question:
  r"""A question, with what was said before.

  `<image>` and `<video>` in the text say where images and videos are. Where there is none, they come first, as in the
  reference's `chat`: one image as `<image>\n`, several as `Image-1: <image>\nImage-2: <image>\n`, a video by its frames,
  `Frame-1: <image>\nFrame-2: <image>\n`.

  Attributes:
    text: what is asked.
    images: that it is about.
    videos: that it is about.
    history: earlier questions of the conversation, each with its answer; of these, `history` and `system` do not count.
    system: the system message; None: the checkpoint's.
  """

  text: str
  images: Sequence[ImageLike] = ()
  videos: Sequence[VideoLike] = ()
  history: Sequence[tuple["Question", str]] = ()
  system: str | None = None

  def with_places(self, before: int, where: Where) -> str:
    """The text with a placeholder for every image and video.

    Args:
      before: images of the conversation so far.
      where: it comes from, for errors.

    Raises:
      DataError: there are other numbers of them.
    """
    for mark, wanted in ((IMAGE_PLACEHOLDER, self.images), (VIDEO_PLACEHOLDER, self.videos)):
      found = self.text.count(mark)
      if found and found != len(wanted):
        raise where.error(
          f"{found} {mark} in the question but {len(wanted)} given; make the numbers equal or leave {mark} out"
        )
    text = self.text
    if self.videos and VIDEO_PLACEHOLDER not in text:
      text = f"{VIDEO_PLACEHOLDER}\n" * len(self.videos) + text
    if len(self.images) == 1 and IMAGE_PLACEHOLDER not in text:
      text = f"{IMAGE_PLACEHOLDER}\n{text}"
    elif self.images and IMAGE_PLACEHOLDER not in text:
      numbers = range(before + 1, before + len(self.images) + 1)
      text = "".join(f"Image-{number}: {IMAGE_PLACEHOLDER}\n" for number in numbers) + text
    return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompter:
  """Makes prompts for a checkpoint.

  Attributes:
    opened: the checkpoint.
    max_tiles: of each image at most, its thumbnail not counted; None: as in training, where all images of a sample share
      those of the checkpoint.
    frames: of each video; None: what training takes at most.
  """

  opened: Inference
  max_tiles: int | None = None
  frames: int | None = None

  def prompt(self, question: Question, where: Where = PYTHON, *, number: int = 0) -> Prompt:
    """The prompt of a question.

    Args:
      question: with its conversation.
      where: it comes from, for errors.
      number: of the question.

    Raises:
      DataError: an image or video cannot be read, placeholders are amiss, or the prompt is too long.
    """
    data = self.opened.data
    asked = [*question.history, (question, "?")]
    pool, counts, turns = TilePool(data.force_image_size), list[int](), list[dict[str, str]]()
    if question.system is not None:
      turns.append({"from": "system", "value": question.system})
    stills, before = sum(len(one.images) for one, _ in asked), 0
    for one, answer in asked:
      text = one.with_places(before, where)
      before += len(one.images)
      turns.append({"from": "human", "value": self._with_tiles(one, text, stills, where, pool, counts)})
      turns.append({"from": "gpt", "value": answer})
    chat = self.opened.tokenizer.lay_out(turns, len(counts), where)
    tokens = chat.expand([count * self.opened.source.config.tokens_per_tile for count in counts])
    ids = prompt_ids(tokens)
    if len(ids) > self.longest:
      raise where.error(
        f"{len(ids)} tokens and {sum(counts)} tiles exceed the model's {self.longest} tokens; give fewer images or frames, "
        "or fewer tiles of each",
        OverLengthError,
      )
    return Prompt(ids, pool.since(0), number)

  @property
  def longest(self) -> int:
    """Tokens of the longest prompt."""
    source = self.opened.source
    return max(
      self.opened.data.max_seq_length, source.raw[source.layout.text].get("max_position_embeddings") or 0
    )

  def _with_tiles(
    self, question: Question, text: str, stills: int, where: Where, pool: TilePool, counts: list[int]
  ) -> str:
    """Writes a question's tiles to the pool and their numbers to `counts`; its text, where images stand for frames."""
    images_left, videos_left = iter(question.images), iter(question.videos)
    parts, end = [], 0
    for mark in _MARK.finditer(text):
      parts.append(text[end : mark.start()])
      end = mark.end()
      if mark[0] == VIDEO_PLACEHOLDER and question.videos:
        found = [self._tiles(frame, None, pool) for frame in self._frames(next(videos_left), where)]
        parts.append(
          "\n".join(
            f"{CONVERSATION_LINES.frame_name}{n}: {IMAGE_PLACEHOLDER}" for n in range(1, len(found) + 1)
          )
        )
        counts += found
        continue
      parts.append(mark[0])
      if mark[0] == IMAGE_PLACEHOLDER and question.images:
        counts.append(self._tiles(read_image(next(images_left), where), stills, pool))
    return "".join([*parts, text[end:]])

  def _tiles(self, picture: Picture, share: int | None, pool: TilePool) -> int:
    """How many tiles a picture makes, which are written to the pool; `share`: that many share the tiles; None: a frame."""
    data = self.opened.data
    cutting = Cutting(tile_size=data.force_image_size)
    if share is not None:
      least = data.min_dynamic_patch
      most = self.max_tiles or max(least, data.max_dynamic_patch // share)
      cutting = Cutting(
        tile_size=data.force_image_size,
        min_tiles=min(least, most),
        max_tiles=most,
        use_thumbnail=data.use_thumbnail,
        dynamic=data.dynamic_image_size,
      )
    pad = images.mean_color(data.normalize_type) if data.pad2square else None
    return len(images.image_tiles(picture, cutting, pad_color=pad, pool=pool))

  def _frames(self, source: VideoLike, where: Where) -> Iterator[Picture]:
    wanted = self.frames or self.opened.data.max_num_frame
    if isinstance(source, bytes):
      path: Any = Content("the video", source)
    elif isinstance(source, str | os.PathLike):
      path = absolute(os.fspath(source))
    else:
      path = tuple(absolute(os.fspath(frame)) for frame in source)
    return video.iter_frames(path, where, min_num_frame=wanted, max_num_frame=wanted, rng=None)


def read_image(source: ImageLike, where: Where) -> Picture:
  """An image as RGB.

  Raises:
    DataError: it cannot be read, or the array is no image.
  """
  if isinstance(source, Image.Image):
    return depth.to_rgb(source)[0] if source.mode != "RGB" else source
  if isinstance(source, np.ndarray):
    if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
      raise where.error(
        f"an array {source.dtype} {list(source.shape)} is no image; give uint8 [height, width, 3] in RGB"
      )
    return source
  media: Media = Content("the image", source) if isinstance(source, bytes) else absolute(os.fspath(source))
  return images.open_image(images.fetched(media, where), where)
