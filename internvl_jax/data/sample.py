"""One line of an annotation file becomes one sample of tokens and tiles."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from internvl_jax.arguments import DataTrainingArguments
from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.data import files, images, sizes, tiling, video
from internvl_jax.data.errors import DataError, Where
from internvl_jax.data.jsonl import JsonlFile
from internvl_jax.data.meta import DatasetSpec, read_meta
from internvl_jax.data.sizes import Size
from internvl_jax.data.tokenize import IMAGE_PLACEHOLDER, ChatTokenizer, with_placeholder

VIDEO_PLACEHOLDER = "<video>"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
  """A decoded sample of n tokens and t tiles.

  Attributes:
    input_ids: int32 [n].
    labels: int32 [n], not shifted, `IGNORE_INDEX` where not supervised.
    tiles: uint8 [t, H, W, 3]; t is 0 for text only.
    truncated: lost its end to max_seq_length.
    where: the line it comes from.
    dataset: index of its dataset in the mixture.
    index: index of the sample in the mixture.
  """

  input_ids: np.ndarray
  labels: np.ndarray
  tiles: np.ndarray
  truncated: bool
  where: Where
  dataset: int
  index: int

  @property
  def fully_masked(self) -> bool:
    """No token is supervised. The first token has nothing before it that could predict it."""
    return bool((self.labels[1:] == IGNORE_INDEX).all())


def make_sample(
  record: Any,
  where: Where,
  spec: DatasetSpec,
  data: DataTrainingArguments,
  tokenizer: ChatTokenizer,
  tokens_per_tile: int,
  rng: np.random.Generator | None,
  *,
  frames: int | None = None,
  dataset: int = 0,
  index: int = 0,
) -> Sample:
  r"""Turns one parsed line into a sample: a pure function of its arguments and the image or video file.

      {"image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", ...}]}
      -> input_ids [n], labels [n], tiles [t, H, W, 3] with t * tokens_per_tile image tokens in input_ids

  The frames of a video are images of one tile each.

  Args:
    record: the parsed line.
    where: where it stands, for errors.
    spec: its dataset.
    data: tile and length settings.
    tokenizer: writes and tokenises the conversation.
    tokens_per_tile: image tokens of one tile.
    rng: the sample's own generator; None: no augmentation, and a video's frames are not drawn (`iter_frames`).
    frames: how many to take of a video; None: the generator draws that too.
    dataset: copied into the sample.
    index: copied into the sample.

  Raises:
    DataError: the line, its image or its video is wrong.
  """
  _check_record(record, where)
  if path := _video_path(record, where):
    images_tiles = _frame_tiles(
      files.join(spec.root, path, where), record, where, spec, data, tokens_per_tile, rng, frames
    )
  else:
    paths = [files.join(spec.root, path, where) for path in _image_paths(record, where)]
    images_tiles = [_tiles(path, where, spec, data, rng, num_images=len(paths)) for path in paths]
  conversations = _with_places(record, len(images_tiles), where)
  image_tokens = [len(tiles) * tokens_per_tile for tiles in images_tiles]
  no_tile = np.zeros((0, data.force_image_size, data.force_image_size, 3), np.uint8)
  chat = tokenizer.encode(conversations, image_tokens, data.max_seq_length, where)
  return Sample(
    input_ids=chat.input_ids,
    labels=chat.labels,
    tiles=np.concatenate([no_tile, *images_tiles]),
    truncated=chat.truncated,
    where=where,
    dataset=dataset,
    index=index,
  )


def measure_sample(
  record: Any,
  where: Where,
  spec: DatasetSpec,
  data: DataTrainingArguments,
  tokenizer: ChatTokenizer,
  tokens_per_tile: int,
  frames: int,
) -> Size:
  """The sizes that `make_sample` gives a line, its conversation not yet cut, without looking at pixels.

  An image's size is what the line says (`width` and `height`, or `width_list` and `height_list`), or else the header
  of its file.

  Args:
    record, where, spec, data, tokenizer, tokens_per_tile: see `make_sample`.
    frames: how many to take of a video.

  Raises:
    DataError: the line is wrong, or its image or video cannot be opened.
  """
  _check_record(record, where)
  if path := _video_path(record, where):
    options = {"min_num_frame": frames, "max_num_frame": frames, "rng": None, "clip": record.get("clip")}
    tiles = [1] * video.planned_frames(files.join(spec.root, path, where), where, **options)
  else:
    paths = [files.join(spec.root, path, where) for path in _image_paths(record, where)]
    stated = _stated_sizes(record, len(paths))
    pixels = stated or [images.image_size(path, where) for path in paths]
    tiles = [_count_tiles(size, spec, data, num_images=len(paths)) for size in pixels]
  chat = tokenizer.encode(
    _with_places(record, len(tiles), where), [n * tokens_per_tile for n in tiles], _UNCUT, where
  )
  image_tokens = np.flatnonzero(chat.input_ids == tokenizer.image_token_id)
  return Size(
    tokens=len(chat.input_ids),
    tiles=sum(tiles),
    supervised=int((chat.labels[1:] != IGNORE_INDEX).sum()),
    needed=int(image_tokens[-1]) + 2 if len(image_tokens) else 1,
  )


_UNCUT = 1 << 62


def _check_record(record: Any, where: Where) -> None:
  if not isinstance(record, dict):
    raise where.error(f"expected a JSON object, got {type(record).__name__}")
  if "conversations" not in record:
    raise where.error(
      f"key 'conversations' is missing; the line has {', '.join(map(repr, record)) or 'no key'}"
    )


def _with_places(record: dict[str, Any], num_images: int, where: Where) -> Any:
  """Returns the line's turns with a place for every image or frame, where the line may leave it out."""
  conversations = record["conversations"]
  if not isinstance(conversations, list):
    return conversations  # The tokenizer says what is wrong about it.
  if _video_path(record, where):
    return with_frames(conversations, num_images, where)
  return with_placeholder(conversations) if num_images == 1 else conversations


def _stated_sizes(record: dict[str, Any], num_images: int) -> list[tuple[int, int]] | None:
  """Returns (width, height) of the images where the line states them all."""
  widths = record.get("width_list", record.get("width"))
  heights = record.get("height_list", record.get("height"))
  widths, heights = ([x] if isinstance(x, int) else x for x in (widths, heights))
  if not isinstance(widths, list) or not isinstance(heights, list):
    return None
  sizes = list(zip(widths, heights, strict=False))
  whole = all(isinstance(side, int) and side > 0 for size in sizes for side in size)
  return sizes if whole and len(widths) == len(heights) == num_images else None


def _count_tiles(
  size: tuple[int, int], spec: DatasetSpec, data: DataTrainingArguments, *, num_images: int
) -> int:
  """Returns how many tiles an image (width, height) makes."""
  if not data.dynamic_image_size:
    return 1
  limit = max(data.min_dynamic_patch, max_grid_tiles(spec, data) // num_images)
  return tiling.num_tiles(*size, data.min_dynamic_patch, limit, data.force_image_size, data.use_thumbnail)


def _image_paths(record: dict[str, Any], where: Where) -> list[str]:
  """Returns the paths of the line's images as written; none for text only."""
  image = record.get("image")
  paths = image if isinstance(image, list) else [image] if image else []
  for path in paths:
    if not isinstance(path, str) or not path:
      raise where.error(f"'image' must be a path or a list of paths, got {str(image)[:80]!r}")
  return paths


def _video_path(record: dict[str, Any], where: Where) -> str | None:
  """Returns the path of the line's video as written; None without one."""
  path = record.get("video")
  if not path:
    return None
  if not isinstance(path, str):
    raise where.error(f"'video' must be one path, got {str(path)[:80]!r}; write a line for each video")
  if record.get("image"):
    raise where.error(
      f"the line has both 'image' {str(record['image'])[:80]!r} and 'video' {path!r}; keep one"
    )
  return path


def with_frames(
  conversations: Sequence[Mapping[str, str]], num_frames: int, where: Where
) -> list[Mapping[str, str]]:
  r"""Returns the turns with a line for each frame where the first human one with `<video>` has it.

  Where none has it, it is put with a line break before the first human turn, as `with_placeholder` does.

      human "<video>\nWho?" with 2 frames -> human "Frame-1: <image>\nFrame-2: <image>\nWho?"

  Raises:
    DataError: the human turns have more than one `<video>`, or an `<image>`.
  """
  turns = list(conversations)
  human = {
    i: str(turn.get("value"))
    for i, turn in enumerate(turns)
    if isinstance(turn, Mapping) and turn.get("from") == "human"
  }
  if not human:
    raise where.error(
      f"the line has a video but no human turn where {VIDEO_PLACEHOLDER} could stand; add one"
    )
  videos, stills = (
    sum(text.count(mark) for text in human.values()) for mark in (VIDEO_PLACEHOLDER, IMAGE_PLACEHOLDER)
  )
  if videos > 1 or stills:
    raise where.error(
      f"{videos} {VIDEO_PLACEHOLDER} and {stills} {IMAGE_PLACEHOLDER} in the human turns but 1 video and no image; "
      f"write {VIDEO_PLACEHOLDER} once or leave it out"
    )
  place = next((i for i, text in human.items() if VIDEO_PLACEHOLDER in text), min(human))
  text = human[place] if videos else f"{VIDEO_PLACEHOLDER}\n{human[place]}"
  frames = "\n".join(f"Frame-{number}: {IMAGE_PLACEHOLDER}" for number in range(1, num_frames + 1))
  turns[place] = {**turns[place], "value": text.replace(VIDEO_PLACEHOLDER, frames)}
  return turns


def max_grid_tiles(spec: DatasetSpec, data: DataTrainingArguments) -> int:
  """Returns the most tiles that the grid of one of the dataset's images may have."""
  return data.max_dynamic_patch if spec.max_dynamic_patch is None else spec.max_dynamic_patch


def _tiles(
  path: str,
  where: Where,
  spec: DatasetSpec,
  data: DataTrainingArguments,
  rng: np.random.Generator | None,
  *,
  num_images: int,
) -> np.ndarray:
  """Returns the tiles of one of a sample's images, which share the limit on tiles."""
  return images.image_tiles(
    images.open_image(path, where),
    tile_size=data.force_image_size,
    min_tiles=data.min_dynamic_patch,
    max_tiles=max(data.min_dynamic_patch, max_grid_tiles(spec, data) // num_images),
    use_thumbnail=data.use_thumbnail,
    dynamic=data.dynamic_image_size,
    pad_color=_pad_color(spec, data),
    rng=rng if spec.data_augment else None,
  )


def _frame_tiles(
  path: str,
  record: dict[str, Any],
  where: Where,
  spec: DatasetSpec,
  data: DataTrainingArguments,
  tokens_per_tile: int,
  rng: np.random.Generator | None,
  wanted: int | None,
) -> list[np.ndarray]:
  """Returns the one tile of each frame of a video."""
  frames = video.iter_frames(
    path,
    where,
    min_num_frame=wanted or data.min_num_frame,
    max_num_frame=wanted or data.max_num_frame,
    rng=rng,
    clip=record.get("clip"),
  )
  settings = {"tile_size": data.force_image_size, "dynamic": False, "min_tiles": 1, "max_tiles": 1}
  settings |= {"use_thumbnail": False, "pad_color": _pad_color(spec, data)}
  augment = rng if spec.data_augment else None
  tiles = [images.image_tiles(frame, **settings, rng=augment) for frame in frames]
  if len(tiles) * tokens_per_tile > data.max_seq_length:
    raise where.error(
      f"the video's {len(tiles)} frames need {len(tiles) * tokens_per_tile} tokens but "
      f"data.max_seq_length={data.max_seq_length}; raise it or lower data.max_num_frame={data.max_num_frame}"
    )
  return tiles


def _pad_color(spec: DatasetSpec, data: DataTrainingArguments) -> tuple[int, int, int] | None:
  pad = data.pad2square and not spec.data_augment
  return images.mean_color(data.normalize_type) if pad else None


def _frames(data: DataTrainingArguments, seed: int, dataset: int, line: int) -> int:
  """Returns how many frames a line's video gives: the same in every epoch, so that its size is known."""
  return video.num_wanted(
    np.random.default_rng((seed, dataset, line)), data.min_num_frame, data.max_num_frame
  )


@dataclasses.dataclass(frozen=True)
class _Measure:
  """Measures lines of a dataset; goes to worker processes."""

  spec: DatasetSpec
  data: DataTrainingArguments
  tokenizer: ChatTokenizer
  tokens_per_tile: int
  seed: int
  dataset: int

  def __call__(self, file: JsonlFile, line: int) -> Size:
    frames = _frames(self.data, self.seed, self.dataset, line)
    return measure_sample(
      file.read(line), file.where(line), self.spec, self.data, self.tokenizer, self.tokens_per_tile, frames
    )

  def key(self) -> dict[str, Any]:
    """Returns all that sizes depend on beside the lines, as JSON values."""
    data = self.data
    settings = ("force_image_size", "dynamic_image_size", "use_thumbnail", "min_dynamic_patch", "conv_style")
    return {
      "version": _MEASURE_VERSION,
      "tokenizer": self.tokenizer.fingerprint(),
      "tokens_per_tile": self.tokens_per_tile,
      "root": files.absolute(self.spec.root),
      "max_dynamic_patch": max_grid_tiles(self.spec, data),
      "frames": [data.min_num_frame, data.max_num_frame, self.seed, self.dataset],
      **{name: getattr(data, name) for name in settings},
    }


# Changes whenever the same line would get other sizes.
_MEASURE_VERSION = 1

Progress = Callable[[int], Any]


class Mixture:
  """The datasets one after another, each as often as its `repeat_time` says; samples decoded by number.

  Picklable: worker processes get a copy.

  Attributes:
    specs: the datasets.
    files: their annotation files.
    sizes: int64 [datasets], samples an epoch, repeats included.
    num_samples: of an epoch.
  """

  def __init__(
    self,
    data: DataTrainingArguments,
    tokenizer: ChatTokenizer,
    *,
    tokens_per_tile: int,
    seed: int,
    cache: str | os.PathLike[str] | None = None,
  ):
    """Reads the meta file and finds the lines of every annotation file.

    Args:
      data: the settings; `meta_path` says which data.
      tokenizer: of the conversations.
      tokens_per_tile: image tokens of one tile.
      seed: of the augmentation and of the frames drawn from videos.
      cache: folder of the lines' index; None keeps none (of remote annotation files, a copy).

    Raises:
      DataError: the meta file, an annotation file or a setting is wrong.
    """
    if data.meta_path is None:
      raise DataError("data.meta_path is not set; give the JSON file that lists the datasets")
    images.normalization(data.normalize_type)  # an unknown name fails here, not at the first padded image
    self.specs = read_meta(data.meta_path, cache=cache)
    self.files = [JsonlFile(spec.annotation, spec.name, cache=cache) for spec in self.specs]
    self._lines = [spec.lines_used(len(file)) for spec, file in zip(self.specs, self.files, strict=True)]
    for spec, file, lines in zip(self.specs, self.files, self._lines, strict=True):
      if not lines:
        raise DataError(
          f"{data.meta_path}: dataset {spec.name!r}: repeat_time={spec.repeat_time} of {len(file)} lines is 0 "
          "samples; raise it"
        )
      if data.dynamic_image_size and max_grid_tiles(spec, data) < data.min_dynamic_patch:
        raise DataError(
          f"{data.meta_path}: dataset {spec.name!r}: max_dynamic_patch={max_grid_tiles(spec, data)} is below "
          f"min_dynamic_patch={data.min_dynamic_patch}; raise one or lower the other"
        )
    self.sizes = np.array(
      [n * spec.repeats for n, spec in zip(self._lines, self.specs, strict=True)], np.int64
    )
    self._ends = np.cumsum(self.sizes)
    self.num_samples = int(self._ends[-1])
    self._data, self._tokenizer = data, tokenizer
    self._tokens_per_tile, self._seed = tokens_per_tile, seed
    self._sizes: list[sizes.Sizes] | None = None

  def max_tiles(self) -> int:
    """Returns the most tiles that one sample may have: images are never cut, so their tokens must fit a row."""
    return self._data.max_seq_length // self._tokens_per_tile

  def locate(self, index: int) -> tuple[int, int]:
    """Returns (dataset, line index in its file) of a sample of the mixture."""
    dataset = int(np.searchsorted(self._ends, index, side="right"))
    first = int(self._ends[dataset] - self.sizes[dataset])
    return dataset, (index - first) % self._lines[dataset]

  def decode(self, epoch: int, index: int) -> Sample:
    """Returns a sample of the mixture. Augmentation and a video's frames depend on seed, epoch and index alone.

    Raises:
      DataError: the sample cannot be made.
    """
    dataset, line = self.locate(index)
    spec, file = self.specs[dataset], self.files[dataset]
    rng = np.random.default_rng((self._seed, epoch, index))
    return make_sample(
      file.read(line),
      file.where(line),
      spec,
      self._data,
      self._tokenizer,
      self._tokens_per_tile,
      rng,
      frames=_frames(self._data, self._seed, dataset, line),
      dataset=dataset,
      index=index,
    )

  def index_sizes(self, cache: str | os.PathLike[str], *, workers: int, progress: Progress) -> None:
    """Measures all samples, as far as the cache does not know their sizes; `size_of` then tells them.

    Args:
      cache: folder of the index.
      workers: processes that measure.
      progress: told how many lines are known, as they become so.
    """
    self._sizes = []
    for dataset, (spec, file) in enumerate(zip(self.specs, self.files, strict=True)):
      measure = _Measure(spec, self._data, self._tokenizer, self._tokens_per_tile, self._seed, dataset)
      self._sizes.append(
        sizes.index_sizes(
          file,
          measure,
          measure.key(),
          cache,
          workers=workers,
          progress=progress,
        )
      )

  def records(self, dataset: int) -> np.ndarray:
    """Returns the sizes (sizes.SIZE) of the lines of a dataset that are used."""
    assert self._sizes is not None, "index_sizes() comes first"
    return self._sizes[dataset].records[: self._lines[dataset]]

  def size_of(self, indices: np.ndarray) -> np.ndarray:
    """Returns int64 [n, 2], tokens and tiles of samples of the mixture, cut to max_seq_length.

    Tokens are 0 for a sample that cannot be read, or whose images lie beyond max_seq_length.
    """
    assert self._sizes is not None, "index_sizes() comes first"
    out = np.zeros((len(indices), 2), np.int64)
    datasets = np.searchsorted(self._ends, indices, side="right")
    for dataset in np.unique(datasets):
      chosen = datasets == dataset
      first = self._ends[dataset] - self.sizes[dataset]
      records = self._sizes[dataset].records[(indices[chosen] - first) % self._lines[dataset]]
      fits = records["needed"] <= self._data.max_seq_length
      out[chosen, 0] = np.where(fits, np.minimum(records["tokens"], self._data.max_seq_length), 0)
      out[chosen, 1] = records["tiles"]
    return out

  def why_unreadable(self, index: int) -> str:
    """Returns why a sample whose size has no tokens cannot be read."""
    assert self._sizes is not None, "index_sizes() comes first"
    dataset, line = self.locate(index)
    known = self._sizes[dataset].errors.get(line)
    if known is not None:
      return known
    record = self._sizes[dataset].records[line]
    return str(
      self.files[dataset]
      .where(line)
      .error(
        f"images need the first {record['needed']} of {record['tokens']} tokens but "
        f"data.max_seq_length={self._data.max_seq_length} cuts them; raise it or lower max_dynamic_patch"
      )
    )

  def describe(self) -> list[str]:
    """Returns one line for each dataset, for the log."""
    lines = []
    for spec, file, used, size in zip(self.specs, self.files, self._lines, self.sizes, strict=True):
      stated = f" (the meta file says {spec.length})" if spec.length not in (None, len(file)) else ""
      tiles = f"up to {max_grid_tiles(spec, self._data)} tiles" if self._data.dynamic_image_size else "1 tile"
      lines.append(
        f"{spec.name}: {size} samples an epoch ({100 * size / self.num_samples:.1f} %), {used} of {len(file)} lines"
        f"{stated} x {spec.repeats}, {tiles}{', JPEG augmentation' if spec.data_augment else ''}, "
        f"root {spec.root or '.'}, {spec.annotation}"
      )
    return lines

  def close(self) -> None:
    """Closes the annotation files."""
    for file in self.files:
      file.close()
