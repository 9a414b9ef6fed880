"""One line of an annotation file becomes one sample of tokens and tiles: a conversation, or several."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from internvl_jax.arguments import DataTrainingArguments
from internvl_jax.data.sample import fitting, images, line_media, tiling, video
from internvl_jax.data.sample.conversations import CONVERSATION_LINES
from internvl_jax.data.sample.fitting import Limits
from internvl_jax.data.sample.images import Picture
from internvl_jax.data.sample.lines import LineSchema
from internvl_jax.data.sample.notes import Note
from internvl_jax.data.sample.placeholders import with_places
from internvl_jax.data.sample.pool import TilePool
from internvl_jax.data.sample.tokenize import Chat, ChatTokenizer, ChatTokens, supervised
from internvl_jax.data.source.media import Media, join
from internvl_jax.data.source.meta import DatasetSpec
from internvl_jax.data.source.sizes import Size
from internvl_jax.data.where import Where


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
  """A decoded sample, or a piece of one, of n tokens and t tiles.

  Each of its conversations is a segment of a row, with the whole prompt, or, but for the first, without the tokens that
  all share. Every segment shows all tiles, or sees those of the tokens it shares.

  Attributes:
    input_ids: int32 [n], of the segments end to end.
    labels: int32 [n], not shifted, `IGNORE_INDEX` where not supervised.
    tiles: uint8 [t, H, W, 3]; t is 0 for text only.
    truncated: a part of the sample is in no piece.
    shrunk: its images have fewer tiles, or its video fewer frames, than they would have without limits.
    piece: which piece of the sample it is, from 0.
    where: the line it comes from.
    dataset: index of its dataset in the mixture.
    index: index of the sample in the mixture.
    epoch: how often its data were run through before; see `order.Places`.
    lengths: tokens of each segment; () is one of all tokens.
    shared: how many tokens of the first segment, from its first on, all others follow as well.
    notes: what one should know about how its images were taken.
    compressed: bool [J, t], which tiles are compressed in each of its J segments: they have fewer image tokens there; None:
      none is.
  """

  input_ids: np.ndarray
  labels: np.ndarray
  tiles: np.ndarray
  truncated: bool = False
  shrunk: bool = False
  piece: int = 0
  where: Where
  dataset: int = 0
  index: int = 0
  epoch: int = 0
  lengths: tuple[int, ...] = ()
  shared: int = 0
  notes: tuple[Note, ...] = ()
  compressed: np.ndarray | None = None

  def segments(self) -> list[ChatTokens]:
    """The tokens of each segment."""
    if not self.lengths:
      return [ChatTokens(self.input_ids, self.labels)]
    cuts = np.cumsum(self.lengths)[:-1]
    parts = zip(np.split(self.input_ids, cuts), np.split(self.labels, cuts), strict=True)
    return [ChatTokens(*part) for part in parts]

  def conversations(self) -> list[ChatTokens]:
    """The tokens of each segment, behind those that it shares."""
    first, *others = self.segments()
    whole = (
      [np.concatenate([a[: self.shared], b]) for a, b in zip(first, part, strict=True)] for part in others
    )
    return [first, *(ChatTokens(*part) for part in whole)]

  @property
  def fully_masked(self) -> bool:
    """Whether a segment has no supervised token."""
    return not all(supervised(part.labels).any() for part in self.segments())


class _Shape(NamedTuple):
  """The size of a sample at one size of its images.

  Attributes:
    chats: its conversations.
    tiles: of each image, or 1 of each frame.
    limit: tiles of an image's grid at most, or the frames that are taken.
  """

  chats: tuple[Chat, ...]
  tiles: list[int]
  limit: int


class _Plan(NamedTuple):
  """The plan of a sample, decided before its pixels are looked at.

  Attributes:
    shape: with its images at their size.
    limited: what is left of each of its conversations, all in as many pieces and of the same images.
    shrunk: its images are smaller than they would be without limits.
    shared: tokens that all conversations have in common and that are in the first only.
  """

  shape: _Shape
  limited: tuple[fitting.Limited, ...]
  shrunk: bool
  shared: int

  def pieces(self) -> list[tuple[fitting.Piece, ...]]:
    """Finds for each piece of the sample its part of every conversation."""
    return list(zip(*(part.pieces for part in self.limited), strict=True))

  def spans(self, parts: Sequence[fitting.Piece]) -> list[tuple[int, int]]:
    """Finds for each conversation the first token of its segment in a piece, and the one after the last."""
    return [(part.start + (self.shared if number else 0), part.stop) for number, part in enumerate(parts)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleMaker:
  """Turns the parsed lines of a dataset into samples. It goes to worker processes.

  Attributes:
    spec: the dataset.
    data: tile settings.
    tokenizer: writes and tokenizes conversations.
    tokens_per_tile: image tokens of one tile.
    limits: what is done about long samples.
    lines: what kind of line they are.
  """

  spec: DatasetSpec
  data: DataTrainingArguments
  tokenizer: ChatTokenizer
  tokens_per_tile: int
  limits: Limits
  lines: LineSchema = CONVERSATION_LINES

  def make(
    self,
    record: Any,
    where: Where,
    rng: np.random.Generator | None = None,
    *,
    frames: int | None = None,
    piece: int = 0,
    pool: TilePool | None = None,
  ) -> Sample:
    r"""Makes a sample: a pure function of its arguments and the image or video files.

        {"image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", ...}]}
        -> input_ids [n], labels [n], tiles [t, H, W, 3] with t * tokens_per_tile image tokens in input_ids

    The frames of a video are images of one tile each.

    Args:
      record: the parsed line.
      where: its file and line, for errors.
      rng: the sample's own generator; None: no augmentation, and a video's frames are not drawn (`iter_frames`).
      frames: how many to take of a video; None: data.max_num_frame.
      piece: which piece of a sample that was split; see `pieces`.
      pool: the tiles are written to its end; None: to memory of their own.

    Raises:
      DataError: the line, its image or its video is wrong; `OverLengthError` where nothing of it is kept.
    """
    record = self.lines.plain(record, where)
    sources = functools.cache(lambda: self._sources(record, where))
    plan = self._plan(record, where, frames or self.data.max_num_frame, sources)
    pieces = plan.pieces()
    if piece >= len(pieces):
      raise where.error(
        f"its piece {piece + 1} was planned, but it has {len(pieces)}: its images were replaced since they were "
        "measured (delete the cache, loader.cache_dir), or the line's width and height are not theirs (correct them)"
      )
    parts = pieces[piece]
    chosen = slice(parts[0].first_image, parts[0].end_image)
    image_tokens = [count * self.tokens_per_tile for count in plan.shape.tiles]
    tokens = [chat.expand(image_tokens) for chat in plan.shape.chats]
    spans = plan.spans(parts)
    tiles, noted = self._pixels(record, where, plan.shape.limit, sources()[chosen], chosen, rng, pool)
    return Sample(
      input_ids=_concatenated(
        [t.input_ids[start:stop] for t, (start, stop) in zip(tokens, spans, strict=True)]
      ),
      labels=_concatenated([t.labels[start:stop] for t, (start, stop) in zip(tokens, spans, strict=True)]),
      lengths=tuple(stop - start for start, stop in spans),
      shared=plan.shared,
      tiles=tiles,
      truncated=not all(part.complete for part in plan.limited) and piece == len(pieces) - 1,
      shrunk=plan.shrunk,
      piece=piece,
      where=where,
      notes=tuple(noted),
    )

  def measure(self, record: Any, where: Where, frames: int) -> Size:
    """The sizes that a sample would have without limits, without looking at pixels.

    An image's size is what the line says (`width` and `height`, or `width_list` and `height_list`), or else the
    header of its file.

    Args:
      record: the parsed line.
      where: its file and line, for errors.
      frames: how many to take of a video.

    Raises:
      DataError: the line is wrong, or its image or video cannot be opened.
    """
    shape = next(self._shapes(self.lines.plain(record, where), where, frames, None))
    return Size(
      tokens=sum(self._lengths(shape)) - self._shared(shape),
      tiles=sum(shape.tiles),
      supervised=sum(int(supervised(chat.labels).sum()) for chat in shape.chats),
    )

  def pieces(self, record: Any, where: Where, frames: int) -> list[tuple[int, int]]:
    """Tokens and tiles of each piece that the limits leave of a sample, in order; see `measure`.

    Raises:
      DataError: as in `measure`; `OverLengthError` where nothing of it is kept.
    """
    plan = self._plan(self.lines.plain(record, where), where, frames, None)
    tiles = plan.shape.tiles
    return [
      (
        sum(stop - start for start, stop in plan.spans(parts)),
        sum(tiles[parts[0].first_image : parts[0].end_image]),
      )
      for parts in plan.pieces()
    ]

  def has_video(self, record: Any, where: Where) -> bool:
    """Says whether a parsed line has a video.

    Raises:
      DataError: the line is wrong.
    """
    return line_media.video_of(self.lines.plain(record, where), where) is not None

  def states_sizes(self, record: Any, where: Where) -> bool:
    """Says whether a parsed line states the sizes of all its images, so that none is opened to plan with.

    Raises:
      DataError: the line is wrong.
    """
    plain = self.lines.plain(record, where)
    paths = line_media.image_paths(plain, where)
    return bool(paths) and line_media.stated_sizes(plain, len(paths)) is not None

  def pictures(self, record: Any, where: Where, most: int) -> list[Picture]:
    """Decodes the first `most` images of a parsed line as they are stored, or takes so many frames of its video.

    Raises:
      DataError: the line is wrong, or an image or the video cannot be read.
    """
    record = self.lines.plain(record, where)
    if path := line_media.video_of(record, where):
      return list(self._frames(self._rooted(path, where), record, where, most, None, []))
    return [images.open_image(source, where) for source in self._sources(record, where)[:most]]

  def _sources(self, record: dict[str, Any], where: Where) -> list[Media]:
    """The files of the line's images."""
    paths = [] if line_media.video_of(record, where) else line_media.image_paths(record, where)
    return [images.fetched(join(self.spec.root, path, where), where) for path in paths]

  def _plan(self, record: Any, where: Where, frames: int, sources: Callable[[], list[Media]] | None) -> _Plan:
    shapes = self._shapes(record, where, frames, sources)
    full = shape = next(shapes)
    if self.limits.policy == "shrink_tiles":
      while not self.limits.hold_together(self._lengths(shape), sum(shape.tiles), self._shared(shape)):
        if (smaller := next(shapes, None)) is None:
          break
        shape = smaller
    shared = self._shared(shape)
    limited = self.lines.limited(shape.chats, shape.tiles, self.tokens_per_tile, self.limits, where, shared)
    return _Plan(shape, limited, shape.tiles != full.tiles, shared)

  def _lengths(self, shape: _Shape) -> list[int]:
    image_tokens = [count * self.tokens_per_tile for count in shape.tiles]
    return [chat.length(image_tokens) for chat in shape.chats]

  def _shared(self, shape: _Shape) -> int:
    """How many tokens of the first conversation the others share."""
    return self.lines.shared_tokens(shape.chats, [count * self.tokens_per_tile for count in shape.tiles])

  def _shapes(
    self, record: Any, where: Where, frames: int, sources: Callable[[], list[Media]] | None
  ) -> Iterator[_Shape]:
    """Yields what the sample is as the settings say, and then with ever smaller images or fewer frames.

    Args:
      record: the parsed line.
      where: its file and line.
      frames: wanted of a video.
      sources: gives the images' files; None: they are as large as the line says they are, if it does.
    """
    if path := line_media.video_of(record, where):
      yield from self._video_shapes(record, self._rooted(path, where), where, frames)
      return
    paths = line_media.image_paths(record, where)
    # Before the files, which not every caller looks at: of several faults, the doctor and the run name the same.
    chats = self._chats(record, len(paths), where)
    pixels = line_media.stated_sizes(record, len(paths)) if sources is None else None
    if pixels is None:
      found = sources() if sources else [join(self.spec.root, path, where) for path in paths]
      pixels = [images.image_size(source, where) for source in found]
    least = self.data.min_dynamic_patch
    most = max(least, max_grid_tiles(self.spec, self.data) // max(len(paths), 1))
    for limit in range(most, min(least, most) - 1, -1):
      yield _Shape(chats, [self._count_tiles(size, limit) for size in pixels], limit)

  def _video_shapes(
    self, record: dict[str, Any], path: video.Source, where: Where, wanted: int
  ) -> Iterator[_Shape]:
    options = {"min_num_frame": wanted, "max_num_frame": wanted, "rng": None, "clip": record.get("clip")}
    count = video.planned_frames(path, where, **options)
    yield _Shape(self._chats(record, count, where), [1] * count, wanted)
    # No more frames than fit, the text around them not counted.
    room = min(self.limits.tokens // self.tokens_per_tile, self.limits.row_tiles or count)
    for fewer in range(min(count - 1, room), 0, -1):
      yield _Shape(self._chats(record, fewer, where), [1] * fewer, fewer)

  def _chats(self, record: dict[str, Any], num_images: int, where: Where) -> tuple[Chat, ...]:
    """The line's conversations, tokenized."""
    conversations = [
      with_places(turns, record, num_images, where, self.lines.frame_name)
      for turns in self.lines.conversations(record, where)
    ]
    self.lines.check_places(conversations, num_images, where)
    chats = tuple(self.tokenizer.lay_out(turns, num_images, where) for turns in conversations)
    self.lines.check_chats(chats, where)
    return chats

  def _count_tiles(self, size: tuple[int, int], limit: int) -> int:
    """How many tiles an image (width, height) makes."""
    data = self.data
    if not data.dynamic_image_size:
      return 1
    return tiling.num_tiles(*size, data.min_dynamic_patch, limit, data.force_image_size, data.use_thumbnail)

  def _pixels(
    self,
    record: dict[str, Any],
    where: Where,
    limit: int,
    sources: Sequence[Media],
    chosen: slice,
    rng: np.random.Generator | None,
    pool: TilePool | None,
  ) -> tuple[np.ndarray, list[Note]]:
    """Decodes images, or the chosen frames of the video.

    Returns:
      uint8 [tiles, H, W, 3] at the end of the pool, and the remarks on them.
    """
    data, noted = self.data, list[Note]()
    pool = pool or TilePool(data.force_image_size)
    start = pool.used
    augment = rng if self.spec.data_augment else None
    settings: dict[str, Any] = {"pad_color": self._pad_color(), "rng": augment, "pool": pool}
    if path := line_media.video_of(record, where):
      frames = self._frames(self._rooted(path, where), record, where, limit, rng, noted)
      cutting = images.Cutting(tile_size=data.force_image_size)
      # Frame by frame: together, those of a large video would fill the memory.
      for frame in itertools.islice(frames, chosen.start, chosen.stop):
        images.image_tiles(frame, cutting, **settings)
    else:
      cutting = images.Cutting(
        tile_size=data.force_image_size,
        min_tiles=data.min_dynamic_patch,
        max_tiles=limit,
        use_thumbnail=data.use_thumbnail,
        dynamic=data.dynamic_image_size,
      )
      for source in sources:
        images.image_tiles(images.open_image(source, where, noted), cutting, **settings)
    return pool.since(start), noted

  def _frames(
    self,
    path: video.Source,
    record: dict[str, Any],
    where: Where,
    wanted: int,
    rng: np.random.Generator | None,
    noted: list[Note],
  ) -> Iterator[Any]:
    limits = {"min_num_frame": wanted, "max_num_frame": wanted}
    return video.iter_frames(path, where, **limits, rng=rng, clip=record.get("clip"), noted=noted)

  def _rooted(self, path: video.Source, where: Where) -> video.Source:
    """Resolves the path of a video, or of each of its frames, against the dataset's root."""
    if isinstance(path, tuple):
      return tuple(join(self.spec.root, frame, where) for frame in path)
    return join(self.spec.root, path, where)

  def _pad_color(self) -> tuple[int, int, int] | None:
    pad = self.data.pad2square and not self.spec.data_augment
    return images.mean_color(self.data.normalize_type) if pad else None


def _concatenated(parts: list[np.ndarray]) -> np.ndarray:
  return parts[0] if len(parts) == 1 else np.concatenate(parts)


def max_grid_tiles(spec: DatasetSpec, data: DataTrainingArguments) -> int:
  """The most tiles that the grid of one of the dataset's images may have."""
  return data.max_dynamic_patch if spec.max_dynamic_patch is None else spec.max_dynamic_patch
