"""Which keys of a line are read, honored, refused or passed over, whatever kind of line it is.

    {"images": ["a.png"], "system": "Be brief.", "conversations": [...], "url": "..."}
    -> {"image": ["a.png"], "conversations": [...]}

A kind of line says by `LineKeys` where its texts are. docs/data.md has the table of what is honored; `keys` says what
other keys mean.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from internvl_jax.data.sample import keys
from internvl_jax.data.sample.tokenize import check_characters
from internvl_jax.data.source.media import Content, media_of
from internvl_jax.data.where import Where, shown

SYSTEM_KEYS = ("system", "system_prompt")
"""Names of a line's own system message."""

_MEDIA = ("image", "video")
_SIZES = ("width", "height", "width_list", "height_list")
_OURS = frozenset((*_MEDIA, *_SIZES, "clip"))
_READ = frozenset((*_OURS, "images", "videos", *SYSTEM_KEYS))
# Keys that mean something by their value, of those that are notes else.
_SPECIAL = frozenset(("label", "objects", "images", "videos", *SYSTEM_KEYS, *keys.CUTS))

_MEDIA_REMEDY = (
  "an image is read from 'image' or 'images', a video from 'video' or 'videos'; rename the key or take it out"
)
# Marks that ms-swift replaces by what 'objects' says.
_OBJECT_MARKS = ("<ref-object>", "<bbox>")


class OtherKind(NamedTuple):
  """Another kind of line that the same file may hold.

  Attributes:
    texts: the keys of its texts. Of a line that has all of these and all of its own, these are passed over.
    hint: what is said of a line that has these instead of its own.
  """

  texts: tuple[str, ...]
  hint: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineKeys:
  """Where a kind of line has its texts, beside the images and videos that all kinds may have.

  Attributes:
    texts: keys that a line must have.
    extra: keys that it may have, and that are kept.
    others: other kinds of lines.
    formats: keys of lines of other programs, and what they are.
    refused: pairs of a key, which must not have a value, and why.
    mask_remedy: what to do about a key that says what is learned.
    roles_remedy: what to do about a key that holds texts under another name.
  """

  texts: tuple[str, ...]
  extra: tuple[str, ...] = ()
  others: tuple[OtherKind, ...] = ()
  formats: tuple[OtherKind, ...] = ()
  needs: str = ""
  refused: tuple[tuple[str, str], ...] = ()
  mask_remedy: str
  roles_remedy: str

  @functools.cached_property
  def kept(self) -> frozenset[str]:
    """The keys that `plain_record` leaves."""
    return _OURS.union(self.texts, self.extra)

  @functools.cached_property
  def read(self) -> frozenset[str]:
    """The keys that mean something."""
    return _READ.union(self.texts)

  @functools.cached_property
  def special(self) -> frozenset[str]:
    """The keys that are looked at although their names are those of notes."""
    return _SPECIAL.union(key for key, _ in self.refused)


def plain_record(record: Any, where: Where, kind: LineKeys) -> dict[str, Any]:
  """A line with our keys alone; the line itself is left as it is.

  Args:
    record: the parsed line.
    where: its file and line, for errors.
    kind: what kind of line it is.

  Raises:
    DataError: it is none, or something in it would change what is seen or learned and is not read.
  """
  if not isinstance(record, dict):
    raise where.error(f"expected a JSON object, got {type(record).__name__}")
  check_texts(record, where, kind)
  plain, to_check = record, keys_to_check(tuple(record), kind)
  if to_check:
    plain = {key: record[key] for key in kind.kept & record.keys()}
    plain |= _media(record, where)
    _check_others(record, to_check, plain, where, kind)
  if plain.get("clip") and not plain.get("video") and not isinstance(plain["clip"], float | int):
    raise where.error(
      f"'clip' {shown(plain['clip'])} cuts a video, but the line has none; take it out or name it"
    )
  return plain


def check_texts(record: Mapping[str, Any], where: Where, kind: LineKeys) -> None:
  """Refuses a line that has not all texts of its kind, and says what it has instead.

  Raises:
    DataError: one is missing.
  """
  missing = [key for key in kind.texts if key not in record]
  if not missing:
    return
  for other in (*kind.others, *kind.formats):
    if record.keys() >= set(other.texts):
      raise where.error(other.hint)
  names = ", ".join(map(repr, list(record)[:20])) + (", ..." if len(record) > 20 else "")
  raise where.error(
    f"key {', '.join(map(repr, missing))} is missing; the line has {names or 'no key'}{kind.needs}"
  )


def unread_keys(record: Mapping[str, Any], kind: LineKeys) -> Iterator[str]:
  """Yields the keys of a line that `plain_record` takes and nobody reads, in quotes."""
  yield from (f"{key!r}" for key in record if key not in kind.read)


@functools.lru_cache(maxsize=1024)
def keys_to_check(names: tuple[str, ...], kind: LineKeys) -> tuple[str, ...]:
  """The keys of a line that are not simply read or passed over; lines of a file have few sets of keys."""
  passed: set[str] = set()
  for other in kind.others:
    if set(names) >= {*kind.texts, *other.texts}:  # The setting says which of the two is meant.
      passed |= {*kind.texts, *other.texts}
  return tuple(
    name
    for name in names
    if name not in kind.kept and name not in passed and (name in kind.special or not keys.is_note(name))
  )


def _media(record: dict[str, Any], where: Where) -> dict[str, Any]:
  """Reads `image` and `video` as other trainers' plural keys say them."""
  found = {}
  for key in _MEDIA:
    several = f"{key}s"
    value = record.get(several)
    if keys.says_nothing(value):
      continue
    if not keys.says_nothing(record.get(key)):
      raise where.error(f"the line has both {key!r} and {several!r}; keep one")
    entries = [_path_of(entry, several, where) for entry in (value if isinstance(value, list) else [value])]
    if key == "video" and len(entries) > 1:
      raise where.error(f"'videos' has {len(entries)} videos, and a line may have one; write a line for each")
    found[key] = entries[0] if key == "video" else entries
  return found


def _path_of(entry: Any, key: str, where: Where) -> Any:
  """Reads an entry of `images` or `videos`: a path, or the frames of a video."""
  entry = media_of(entry, f"{key[:-1]} of {key!r}", where)
  if isinstance(entry, Content):
    return entry
  if isinstance(entry, dict) and not keys.says_nothing(entry.get("path")):
    rest = {name: value for name, value in entry.items() if name != "path" and not keys.says_nothing(value)}
    entry = entry if rest else entry["path"]
  frames = key == "videos" and isinstance(entry, list) and entry and all(isinstance(x, str) for x in entry)
  if frames or (isinstance(entry, str) and entry):
    return entry
  raise where.error(
    f"{key!r} must be a list of paths, got {shown(entry)}; write what it holds into a file, and the file's path here"
  )


def _check_others(
  record: dict[str, Any], to_check: tuple[str, ...], plain: dict[str, Any], where: Where, kind: LineKeys
) -> None:
  """Refuses keys that are not read and would change what is seen or learned."""
  media = [path for key in _MEDIA for path in _paths(plain.get(key))]
  has_video = not keys.says_nothing(plain.get("video"))
  refused = dict(kind.refused)
  for key in to_check:
    value = record[key]
    if key in _READ:
      continue
    change = keys.changes(key, value, "line", media)
    if change is not None:
      raise where.error(refusal(f"key {key!r}", key, value, change, "line", remedy_of(change, kind)))
    if has_video and key in keys.CUTS and not keys.says_nothing(value):
      raise where.error(
        f"key {key!r} {shown(value)} is not read, and the line has a video; write 'clip': [start, end] in seconds"
      )
    if key == "objects" and not keys.says_nothing(value):
      _check_objects(record, where, kind)
    if value and key in refused:
      raise where.error(f"key {key!r} {shown(value)} is not read: {refused[key]}; take it out")
    if key == "label" and value is False:
      raise where.error("key 'label' is false: the line is not to be learned as it stands; delete the line")


def _check_objects(record: dict[str, Any], where: Where, kind: LineKeys) -> None:
  texts = json_text(record, kind)
  for mark in _OBJECT_MARKS:
    if mark in texts:
      raise where.error(
        f"{mark} in the texts stands for what 'objects' says, which is not read; write names and boxes into the texts, "
        "as <ref>name</ref><box>[[x1, y1, x2, y2]]</box>"
      )


def json_text(record: Mapping[str, Any], kind: LineKeys) -> str:
  """The texts of a line that are seen or learned, end to end."""
  found = []
  for key in (*kind.texts, *(key for other in kind.others for key in other.texts)):
    value = record.get(key)
    turns = value if isinstance(value, list) else [{"value": value}]
    found += [turn.get("value") for turn in turns if isinstance(turn, dict)]
  return "\n".join(map(str, found))


def system_of(record: Mapping[str, Any], where: Where) -> str | None:
  """The system message of a line, beside its texts; None if there is none.

  Raises:
    DataError: there are two, or it is no text.
  """
  given = [key for key in SYSTEM_KEYS if record.get(key) not in (None, "")]
  if len(given) > 1:
    raise where.error(f"the line has both {', '.join(map(repr, given))}; leave one system message")
  return checked_text(record, given[0], where) if given else None


def checked_text(record: Mapping[str, Any], key: str, where: Where) -> str:
  """The text at a key of a line.

  Raises:
    DataError: it is none, is empty or cannot be encoded.
  """
  text = record[key]
  if not isinstance(text, str) or not text.strip():
    raise where.error(
      f"{key!r} must be a text that is not empty, got {shown(text, json.dumps)}; write one or delete the line"
    )
  check_characters(text, repr(key), where)
  return text


def remedy_of(change: keys.Kind, kind: LineKeys) -> str:
  """The remedy for a key of a line that would change what is seen, learned or said."""
  return {"media": _MEDIA_REMEDY, "mask": kind.mask_remedy, "roles": kind.roles_remedy}[change]


def refusal(blame: str, key: str, value: Any, change: keys.Kind, place: keys.Place, remedy: str) -> str:
  """Why a key is refused that is not read and would change something.

  Args:
    blame: where the key is.
    key: its name.
    value: its value.
    change: what it would change.
    place: in a line or in a turn.
    remedy: what to do about it.
  """
  near = keys.nearest(key, place)
  hint = f"; did you mean {near!r}?" if near else ""
  return f"{blame} {shown(value)} is not read, and would change what is {_CHANGED[change]}{hint}; {remedy}"


_CHANGED: dict[str, str] = {"media": "seen", "mask": "learned", "roles": "said"}


def _paths(value: Any) -> list[str]:
  return [path for path in (value if isinstance(value, list) else [value]) if isinstance(path, str) and path]
