"""Reads a checkpoint's preprocessor_config.json and related files as transformers does: tiling and normalization."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from internvl_jax.batch import PIXEL_STATISTICS
from internvl_jax.errors import UserError
from internvl_jax.hf import entries
from internvl_jax.hf import model_config as config_io


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessor:
  """The files' settings of images and videos; None without an entry.

  Attributes:
    path: the file that speaks of images.
    normalize_type: name of the pixel statistics.
    min_patches, max_patches: fewest and most tiles of an image's grid.
    crop_to_patches: whether images are cut.
    num_frames: frames taken from a video.
    notes: what is said and not followed, a line each.
  """

  path: Path | None = None
  normalize_type: str = "imagenet"
  min_patches: int | None = None
  max_patches: int | None = None
  crop_to_patches: bool | None = None
  num_frames: int | None = None
  notes: tuple[str, ...] = ()


# Published files have rounded numbers.
_ATOL = 1e-4
_BICUBIC = 3
# What transformers' image processor of InternVL does where its file is silent.
_DEFAULT_STATISTICS = "clip"
_DEFAULT_SIDE = {"height": 384, "width": 384}


def read_statistics(folder: Path) -> str:
  """The name of the pixel statistics of a checkpoint in the internvl layout; "imagenet" without an entry.

  Nothing else of the file is read there: the reference goes by config.json.

  Raises:
    UserError: the statistics are none of `PIXEL_STATISTICS`.
  """
  path = folder / "preprocessor_config.json"
  found = _read(path) if path.is_file() else {}
  return _statistics(path, found) or "imagenet"


def read_preprocessor(folder: Path, side: int) -> Preprocessor:
  """The settings of images and videos in the files of the hf layout.

  An entry `image_processor` of processor_config.json, where transformers 5 saves it, comes before
  preprocessor_config.json; so for videos with `video_processor` and video_preprocessor_config.json.

  Args:
    folder: the checkpoint.
    side: of the model's tiles, in pixels.

  Raises:
    UserError: pixels would have to be prepared in a way that this program does not have.
  """
  image_path, image = _entries(folder, "image_processor", "preprocessor_config.json")
  if image_path is None:
    return Preprocessor()
  found = {name: value for name, value in image.items() if value is not None}
  _check_scaling(image_path, found)
  _check_side(image_path, found.get("size", _DEFAULT_SIDE), side)
  least, most = found.get("min_patches"), found.get("max_patches")
  if least is not None and most is not None and least > most:
    raise UserError(f"{image_path}: min_patches={least} exceeds max_patches={most}; set it to at most that")
  crop = found.get("crop_to_patches")
  video_notes, frames = _videos(folder, found)
  return Preprocessor(
    path=image_path,
    normalize_type=_statistics(image_path, found) or _DEFAULT_STATISTICS,
    min_patches=least,
    max_patches=most,
    crop_to_patches=None if crop is None else bool(crop),
    num_frames=frames,
    notes=(*_image_notes(image_path, found), *video_notes),
  )


def _entries(folder: Path, entry: str, name: str) -> tuple[Path | None, dict[str, Any]]:
  """The file that has a processor's settings, and them."""
  path = folder / "processor_config.json"
  if path.is_file() and isinstance(nested := config_io.read_json(path).get(entry), dict):
    entries.check(f"{path}: {entry}.", nested, entries.PREPROCESSOR)
    return path, nested
  path = folder / name
  return (path, _read(path)) if path.is_file() else (None, {})


def _read(path: Path) -> dict[str, Any]:
  found = config_io.read_json(path)
  entries.check(f"{path}: ", found, entries.PREPROCESSOR)
  return found


def _statistics(path: Path, found: Mapping[str, Any]) -> str | None:
  """The name of the mean and standard deviation in a file; None if it has none."""
  said = [found.get(name) for name in ("image_mean", "image_std")]
  if said == [None, None]:
    return None
  for name, known in PIXEL_STATISTICS.items():
    if all(_is_close(value, wanted) for value, wanted in zip(said, known, strict=True)):
      return name
  known = "; ".join(f"{name} {list(mean)}, {list(std)}" for name, (mean, std) in PIXEL_STATISTICS.items())
  raise UserError(f"{path}: image_mean and image_std are {said[0]} and {said[1]}; set them to one of {known}")


def _is_close(value: Any, wanted: Sequence[float]) -> bool:
  values = value if isinstance(value, list) else [value]
  if len(values) not in (1, len(wanted)) or not all(_is_number(x) for x in values):
    return False
  return bool(np.allclose(values, wanted, rtol=0, atol=_ATOL))


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _check_scaling(path: Path, found: Mapping[str, Any]) -> None:
  """Refuses pixels that are not scaled to [0, 1] and normalized."""
  for name in ("do_resize", "do_rescale", "do_normalize"):
    if not found.get(name, True):
      raise UserError(
        f"{path}: {name}={found[name]!r} is not supported: set it to true, as the model was trained"
      )
  factor = found.get("rescale_factor", 1 / 255)
  if not _is_number(factor) or abs(255 * factor - 1) > _ATOL:
    raise UserError(f"{path}: rescale_factor={factor!r} is not supported; set it to {1 / 255} (1/255)")


def _check_side(path: Path, size: Any, side: int) -> None:
  """Refuses tiles of another size than the model's."""
  values = list(size.values()) if isinstance(size, dict) else [size]
  sides = [value for value in values if value is not None]
  if not sides or any(value != side for value in sides):
    raise UserError(
      f"{path}: size={size} is not that of the model's tiles, {side} (vision_config.image_size of config.json); "
      f'set it to {{"height": {side}, "width": {side}}}'
    )


def _image_notes(path: Path, found: Mapping[str, Any]) -> list[str]:
  notes = []
  if (resample := found.get("resample", _BICUBIC)) != _BICUBIC:
    notes.append(f"{path}: resample={resample} is not followed: images are resized with {_BICUBIC} (bicubic)")
  kind = str(found.get("image_processor_type", "GotOcr2ImageProcessor"))
  if not kind.startswith("GotOcr2ImageProcessor"):
    notes.append(
      f"{path}: image_processor_type={kind[:80]!r} is not known: images are cut as GotOcr2ImageProcessor cuts them"
    )
  return notes


_SHARED = ("image_mean", "image_std", "size", "resample", "do_rescale", "rescale_factor", "do_normalize")


def _videos(folder: Path, image: Mapping[str, Any]) -> tuple[list[str], int | None]:
  """What is said of videos and not followed, and how many frames are taken of one."""
  path, found = _entries(folder, "video_processor", "video_preprocessor_config.json")
  if path is None:
    return [], None
  others = [
    name for name in _SHARED if found.get(name) is not None and found[name] != image.get(name, found[name])
  ]
  notes = [
    f"{path}: {name}={found[name]} is not followed: frames are prepared as images are" for name in others
  ]
  if not found.get("do_sample_frames"):  # The processor then takes what frames it is given.
    return notes, None
  if found.get("fps") is not None:
    notes.append(f"{path}: fps={found['fps']} is not followed: frames are sampled evenly over a video")
  return notes, found.get("num_frames")
