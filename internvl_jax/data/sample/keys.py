"""Keys of a line or a turn that are not ours: other trainers', misspelt ones, and notes beside the data.

A key is never passed over in silence if it would change what is seen or learned: by its words (`image_path`, `lossMask`),
by being nearly a known name (`imgaes`), or by a value that is the path of an image, a video or a sound.
"""

import difflib
import functools
import os
import re
from collections.abc import Iterable
from typing import Any, Literal

Kind = Literal["media", "mask", "roles"]
Place = Literal["line", "turn"]

FLAGS = ("loss", "loss_mask", "loss_weight", "loss_scale", "weight", "train", "trainable")
"""Keys of a turn by which trainers say whether it is learned: yes, 1 or true; no, 0 or false."""

CUTS = (
  "start",
  "end",
  "start_time",
  "end_time",
  "video_start",
  "video_end",
  "clip_start",
  "clip_end",
  "segment",
)
"""Keys that cut a video, where the line has one."""

_OPPOSITE_FLAGS = ("masked", "ignore", "ignored")
# Words of names, whole.
_MEDIA = re.compile(
  "(image|img|pic|picture|photo|video|vid|frame|audio|sound)s?|speech|wav|media|multimedia|pixel"
)
_MASK = re.compile(
  "masks?|masked|masking|loss|losses|weights?|train|trained|trainable|learn|learned|learnable|"
  "supervised?|unsupervised|ignored?"
)
# With one of these a name is about a medium or a mask: image_id, num_frames, image_caption.
_ABOUT = re.compile(
  "(id|num|number|count|size|width|height|dim|class|label|caption|description|name|score|answer|question|tag)s?|idx|index|"
  "no|nums|n|counts|w|h|shape|resolution|aspect|ratio|area|source|type|format|category|classes|title|text|quality|"
  "similarity|hash|phash|md5|sha|sha1|sha256|date|author|license|split|fps|rate|duration|length|len|seconds|has|is|"
  "metadata|meta|info|ocr|time|language|lang|version"
)
# The texts of lines in other formats, which would be beside ours.
_ROLES = re.compile(
  "tools?|tool_calls|functions?|function_call|history|messages?|query|responses?|prompt|completion|instruction|input|"
  "output|conversations|dialogue|dialog|turns|chosen|rejected|(chosen|rejected)_(response|messages)|rejected_images|"
  "kto_tag|role|content|system|system_prompt"
)
_TURN_ROLES = re.compile(
  "role|content|tools|tool_calls|tool_call_id|functions|function_call|reasoning_content|reasoning|thinking|thought|chosen|"
  "rejected|rejected_response|from|value"
)
# Notes that lines have beside them, whatever they say.
_NOTES = re.compile(
  "(id|question|answer|caption|label|length|tag)s?|uid|uuid|idx|index|source|data_source|dataset|dataset_name|data_type|task|"
  "task_type|task_name|type|category|categories|subset|split|license|language|lang|meta|metadata|info|extra|gt|gloss|text|"
  "title|width|height|width_list|height_list"
)
_SPELT = {
  "line": (
    *("image", "images", "video", "videos", "audio", "audios", "frames", "image_path", "video_path", "media"),
    *("loss", "loss_mask", "loss_weight", "weight", "mask", "train"),
    *(
      "tools",
      "history",
      "messages",
      "query",
      "response",
      "responses",
      "prompt",
      "completion",
      "instruction",
    ),
    *("system", "system_prompt", "conversations", "rejected", "rejected_response", "chosen", "functions"),
    *("width", "height", "width_list", "height_list", "clip"),
  ),
  "turn": ("image", "images", "video", "videos", "audio", *FLAGS, "mask", "role", "content", "from", "value"),
}
_NEAR = 0.8
_LONGEST_NAME = 40
_MEDIA_PATH = re.compile(
  r"data:(image|video|audio)/|[^\n]{1,4096}\.(jpe?g|png|webp|bmp|gif|tiff?|ppm|heic|heif|avif|svg|jfif|mp4|mov|avi|mkv|webm|"
  r"m4v|mpe?g|flv|wmv|wav|mp3|flac|ogg|m4a)([?#][^\n]*)?\s*\Z",
  re.IGNORECASE,
)
_VALUES_LOOKED_AT = 64


@functools.lru_cache(maxsize=4096)
def kind_of(name: str, place: Place) -> Kind | Literal["about"] | None:
  """The kind of a key that lines do not have; "about" for a note about a medium or a mask, None for another one."""
  if place == "line" and _NOTES.fullmatch(name):
    return None
  if (_ROLES if place == "line" else _TURN_ROLES).fullmatch(name):
    return "roles"
  if _has_word(name, _MASK) or _has_word(name, _MEDIA):
    if _has_word(name, _ABOUT):
      return "about"
    return "mask" if _has_word(name, _MASK) else "media"
  near = None if _has_word(name, _ABOUT) else nearest(name, place)
  return None if near in (None, "clip") or _NOTES.fullmatch(near) else kind_of(near, place)


@functools.lru_cache(maxsize=4096)
def is_note(name: str) -> bool:
  """Says whether a key of a line is a note beside the data, whatever its value."""
  return _NOTES.fullmatch(name) is not None


@functools.lru_cache(maxsize=4096)
def nearest(name: str, place: Place) -> str | None:
  """The known name that a key nearly has; None if it is one, or near none."""
  if _NOTES.fullmatch(name) or len(name) > _LONGEST_NAME:
    return None
  spelt = {"".join(_words(known)): known for known in _SPELT[place]}
  compact = "".join(_words(name))
  found = difflib.get_close_matches(compact, spelt, n=1, cutoff=_NEAR)
  return spelt[found[0]] if found and spelt[found[0]] != name else None


def changes(name: str, value: Any, place: Place, shown: Iterable[str]) -> Kind | None:
  """The change that a key would make to what is seen or learned; None if it changes nothing.

  Args:
    name: the key.
    value: its value.
    place: the place of the key.
    shown: paths of the media that the line shows anyway.
  """
  if says_nothing(value):
    return None
  kind = kind_of(name, place)
  if kind == "mask":
    return None if _learns_all(name, value) else kind
  if not isinstance(value, str | list | dict):
    return "roles" if name in ("kto_tag", "role", "content") else None
  if kind == "roles":
    return kind
  names = {_stem(path) for path in shown}
  if _is_shown(value, names) or (names and _is_origin(name, value)):
    return None
  if kind == "media":
    return kind
  seen = kind == "about" or not (names or (place == "line" and _NOTES.fullmatch(name)))
  return "media" if seen and _has_media_path(value) else None


def says_nothing(value: Any, depth: int = 3) -> bool:
  """Says whether a value means none: tables that become jsonl have one in every line."""
  if isinstance(value, str):
    return value.strip() in ("", "[]", "{}", "null", "None")
  if isinstance(value, list | dict):
    entries = value.values() if isinstance(value, dict) else value
    return not value or (depth > 0 and all(says_nothing(entry, depth - 1) for entry in entries))
  return value is None


def is_one(value: Any) -> bool:
  """Says whether a flag or a weight says that all is learned as usual."""
  return isinstance(value, bool | int | float) and value == 1


def _learns_all(name: str, value: Any) -> bool:
  """Says whether the value of a mask's name leaves all to be learned, as without it."""
  if name in _OPPOSITE_FLAGS:
    return isinstance(value, bool | int | float) and value == 0
  # A text under a name that is merely like a mask's is none.
  return (name in FLAGS and is_one(value)) or (isinstance(value, str) and not _has_word(name, _MASK))


def _has_word(name: str, kind: re.Pattern[str]) -> bool:
  return any(kind.fullmatch(word.rstrip("0123456789") or word) for word in _words(name))


def _words(name: str) -> list[str]:
  found = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+\d*|\d+|[^\W\d_A-Za-z]+", name)
  return [word.lower() for word in found]


def _stem(path: str) -> str:
  """A file's name without folders and suffix."""
  return os.path.splitext(re.split(r"[?#]", path)[0].rstrip("/").rpartition("/")[2])[0]


def _is_shown(value: Any, names: set[str]) -> bool:
  """Says whether a value names what the line shows anyway."""
  values = value if isinstance(value, list) else [value]
  return all(isinstance(x, str) and _stem(x) in names for x in values)


def _is_origin(name: str, value: Any) -> bool:
  """Says whether a value is the address that what the line shows was fetched from."""
  return bool({"url", "urls", "link"} & set(_words(name))) and isinstance(value, str) and "://" in value


def _has_media_path(value: Any, depth: int = 2) -> bool:
  if isinstance(value, str):
    return _MEDIA_PATH.match(value) is not None
  if depth and isinstance(value, list | dict):
    entries = list(value.values() if isinstance(value, dict) else value)[:_VALUES_LOOKED_AT]
    return any(_has_media_path(entry, depth - 1) for entry in entries)
  return False
