"""One line of an annotation file becomes one sample of tokens and tiles."""

import dataclasses
import os
from typing import Any

import numpy as np

from internvl_jax.arguments import DataTrainingArguments
from internvl_jax.batch import IGNORE_INDEX
from internvl_jax.data import images
from internvl_jax.data.errors import DataError, Where
from internvl_jax.data.jsonl import JsonlFile
from internvl_jax.data.meta import DatasetSpec, read_meta
from internvl_jax.data.tokenize import ChatTokenizer, with_placeholder


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
  dataset: int = 0,
  index: int = 0,
) -> Sample:
  r"""Turns one parsed line into a sample: a pure function of its arguments and the image file.

      {"image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", ...}]}
      -> input_ids [n], labels [n], tiles [t, H, W, 3] with t * tokens_per_tile image tokens in input_ids

  Args:
    record: the parsed line.
    where: where it stands, for errors.
    spec: its dataset.
    data: tile and length settings.
    tokenizer: writes and tokenises the conversation.
    tokens_per_tile: image tokens of one tile.
    rng: the sample's own generator; None: no augmentation.
    dataset: copied into the sample.
    index: copied into the sample.

  Raises:
    DataError: the line or its image is wrong.
  """
  if not isinstance(record, dict):
    raise where.error(f"expected a JSON object, got {type(record).__name__}")
  if "conversations" not in record:
    raise where.error(
      f"key 'conversations' is missing; the line has {', '.join(map(repr, record)) or 'no key'}"
    )
  conversations: Any = record["conversations"]
  paths = _image_paths(record, where)
  images_tiles = [
    _tiles(os.path.join(spec.root, path), where, spec, data, rng, num_images=len(paths)) for path in paths
  ]
  if len(paths) == 1 and isinstance(conversations, list):
    conversations = with_placeholder(conversations)
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


def _image_paths(record: dict[str, Any], where: Where) -> list[str]:
  """Returns the paths of the line's images as written; none for text only."""
  if record.get("video"):
    raise where.error("samples with 'video' are not supported yet; take the line out")
  image = record.get("image")
  paths = image if isinstance(image, list) else [image] if image else []
  for path in paths:
    if not isinstance(path, str) or not path:
      raise where.error(f"'image' must be a path or a list of paths, got {str(image)[:80]!r}")
  return paths


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
  pad = data.pad2square and not spec.data_augment
  return images.image_tiles(
    images.open_image(path, where),
    tile_size=data.force_image_size,
    min_tiles=data.min_dynamic_patch,
    max_tiles=max(data.min_dynamic_patch, max_grid_tiles(spec, data) // num_images),
    use_thumbnail=data.use_thumbnail,
    dynamic=data.dynamic_image_size,
    pad_color=images.mean_color(data.normalize_type) if pad else None,
    rng=rng if spec.data_augment else None,
  )


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
    self, data: DataTrainingArguments, tokenizer: ChatTokenizer, *, tokens_per_tile: int, seed: int
  ):
    """Reads the meta file and finds the lines of every annotation file.

    Args:
      data: the settings; `meta_path` says which data.
      tokenizer: of the conversations.
      tokens_per_tile: image tokens of one tile.
      seed: of the augmentation.

    Raises:
      DataError: the meta file, an annotation file or a setting is wrong.
    """
    if data.meta_path is None:
      raise DataError("data.meta_path is not set; give the JSON file that lists the datasets")
    images.normalization(data.normalize_type)  # an unknown name fails here, not at the first padded image
    self.specs = read_meta(data.meta_path)
    self.files = [JsonlFile(spec.annotation, spec.name) for spec in self.specs]
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

  def max_tiles(self) -> int:
    """Returns the most tiles that one sample may have: images are never cut, so their tokens must fit a row."""
    return self._data.max_seq_length // self._tokens_per_tile

  def locate(self, index: int) -> tuple[int, int]:
    """Returns (dataset, line index in its file) of a sample of the mixture."""
    dataset = int(np.searchsorted(self._ends, index, side="right"))
    first = int(self._ends[dataset] - self.sizes[dataset])
    return dataset, (index - first) % self._lines[dataset]

  def decode(self, epoch: int, index: int) -> Sample:
    """Returns a sample of the mixture. The augmentation depends on seed, epoch and index alone.

    Raises:
      DataError: the sample cannot be made.
    """
    dataset, line = self.locate(index)
    spec, file = self.specs[dataset], self.files[dataset]
    rng = np.random.default_rng((self._seed, epoch, index)) if spec.data_augment else None
    return make_sample(
      file.read(line),
      file.where(line),
      spec,
      self._data,
      self._tokenizer,
      self._tokens_per_tile,
      rng,
      dataset=dataset,
      index=index,
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
