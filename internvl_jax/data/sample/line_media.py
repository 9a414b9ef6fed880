"""A line's images and video, as it names them."""

from collections.abc import Mapping
from typing import Any

from internvl_jax.data.sample import video
from internvl_jax.data.source.media import Media, is_media, media_of, name_of
from internvl_jax.data.where import Where, shown

# No image format has sides beyond 32 bits; Python's integers go on until they overflow a float.
_LARGEST_SIDE = 1 << 32


def stated_sizes(record: Mapping[str, Any], num_images: int) -> list[tuple[int, int]] | None:
  """Finds (width, height) of the images where the line states them all.

  Args:
    record: the parsed line.
    num_images: that it has.
  """
  widths = record.get("width_list", record.get("width"))
  heights = record.get("height_list", record.get("height"))
  widths, heights = ([x] if isinstance(x, int) else x for x in (widths, heights))
  if not isinstance(widths, list) or not isinstance(heights, list):
    return None
  sizes = list(zip(widths, heights, strict=False))
  whole = all(type(side) is int and 0 < side < _LARGEST_SIDE for size in sizes for side in size)
  return sizes if whole and len(widths) == len(heights) == num_images else None


def image_paths(record: dict[str, Any], where: Where) -> list[Media]:
  """Collects the line's images as written, or their bytes; none for text only.

  Raises:
    DataError: they are none.
  """
  image = record.get("image")
  paths = image if isinstance(image, list) else [] if image in (None, "") else [image]
  found = [media_of(path, f"image {number}", where) for number, path in enumerate(paths, 1)]
  for path in found:
    if not is_media(path):
      raise where.error(f"'image' must be a path or a list of paths, got {shown(image)}")
  return found


def video_of(record: dict[str, Any], where: Where) -> video.Source | None:
  """Finds the line's video as written, or its frames; None without one.

  Raises:
    DataError: it is none, or there are images beside it.
  """
  path: Any = record.get("video")
  if path in (None, "", []):
    return None
  if isinstance(path, list) and len(path) == 1:
    path = path[0]  # others list the videos of a line, and each as its path or those of its frames
  named = path if isinstance(path, list) else [path]
  what = "image" if len(named) > 1 else "video"
  paths = [media_of(each, f"{what} {number}", where) for number, each in enumerate(named, 1)]
  if not paths or not all(map(is_media, paths)):
    raise where.error(f"'video' must be one path or those of its frames, got {shown(path)}")
  if record.get("image"):
    raise where.error(
      f"the line has both 'image' {shown(record['image'])} and 'video' {shown(path)}; keep one"
    )
  if all(video.is_image_name(name_of(each)) for each in paths):
    return tuple(paths)
  if len(paths) > 1:
    raise where.error(
      f"'video' lists {len(paths)} files, {shown(paths, repr)}, that are not all images; write a line for each video"
    )
  return paths[0]
