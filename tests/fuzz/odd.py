"""What goes wrong in files: odd values, and small changes of JSON records and of bytes, drawn by a generator.

A change is a function (rng, what is changed) -> what became of it. Records are changed in place and returned.
"""

import copy
import json
import math
from typing import Any

import numpy as np

# A value deeper than `json` can write; `dumps` puts brackets in its place.
DEEP = "(a thousand brackets)"
_BRACKETS = "[" * 1000 + "]" * 1000

VALUES = (
  *(None, True, False),
  *(0, 1, -1, 2, 7, 1200, 2**31, 2**62, -(2**63), 10**12, 10**30, 10**400),
  *(0.0, 0.5, -0.5, 1.5, 1e-320, 1e30, 1e308, math.nan, math.inf, -math.inf),
  *(
    "",
    " ",
    "x",
    "\0",
    "a\0b",
    "\ud800",
    "\udcff",
    "\u202eabc",
    "é\u0301🙂",
    "\n\r\u2028",
    "x" * 5000,
    "/",
    ".",
    "/dev/zero",
  ),
  *(
    "0",
    "-1",
    "1e400",
    "true",
    "None",
    "<image>",
    "<image>" * 300,
    "<video>",
    "<img></img>",
    "<IMG_CONTEXT>",
    "<|im_end|>",
  ),
  *([], [[]], [None], [0], ["x"], [1, 2], [math.nan, 1], [0, 10**400], ["<image>"] * 50),
  *({}, {"": 0}, {"x": 1}, {"content": 1}, {"from": "gpt", "value": "x"}, {"a": {"b": [{}]}}, DEEP),
)


def value(rng: np.random.Generator) -> Any:
  return copy.deepcopy(pick(rng, VALUES))


def pick(rng: np.random.Generator, options: Any) -> Any:
  options = list(options)
  return options[int(rng.integers(len(options)))]


def dumps(record: Any) -> str:
  return json.dumps(record, ensure_ascii=True).replace(json.dumps(DEEP), _BRACKETS)


# --- Records ---------------------------------------------------------------------------------------------------


def places(node: Any) -> list[tuple[Any, Any]]:
  """Returns (container, key) of every value in a record, however deep."""
  keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
  found = [(node, key) for key in keys]
  return found + [place for key in keys for place in places(node[key])]


def _any(rng: np.random.Generator, record: Any, kind: type = object) -> tuple[Any, Any] | None:
  found = [(node, key) for node, key in places(record) if isinstance(node[key], kind)]
  return pick(rng, found) if found else None


def set_value(rng: np.random.Generator, record: Any) -> Any:
  """Puts an odd value in the place of any value."""
  if place := _any(rng, record):
    place[0][place[1]] = value(rng)
  return record


def drop(rng: np.random.Generator, record: Any) -> Any:
  """Leaves out any value."""
  if place := _any(rng, record):
    del place[0][place[1]]
  return record


def wrap(rng: np.random.Generator, record: Any) -> Any:
  """Puts a value in a list, in an object, or in a text."""
  if place := _any(rng, record):
    node, key = place
    node[key] = pick(rng, ([node[key]], {"value": node[key]}, dumps(node[key])))
  return record


def move(rng: np.random.Generator, record: Any) -> Any:
  """Puts one value in the place of another."""
  one, other = _any(rng, record), _any(rng, record)
  if one and other:
    other[0][other[1]] = copy.deepcopy(one[0][one[1]])
  return record


def repeat(rng: np.random.Generator, record: Any) -> Any:
  """Repeats an entry of a list."""
  if place := _any(rng, record, list):
    node, key = place
    if node[key]:
      node[key] += [copy.deepcopy(pick(rng, node[key])) for _ in range(int(pick(rng, (1, 2, 60))))]
  return record


def rename(rng: np.random.Generator, record: Any) -> Any:
  """Misspells a key: capitals, plural, one letter less, a letter twice."""
  keys = [
    (node, key) for node, key in places(record) if isinstance(node, dict) and isinstance(key, str) and key
  ]
  if keys:
    node, key = pick(rng, keys)
    at = int(rng.integers(len(key)))
    node[
      pick(rng, (key.upper(), key + "s", key + " ", key[:at] + key[at + 1 :], key[:at] + key[at] + key[at:]))
    ] = node.pop(key)
  return record


def retext(rng: np.random.Generator, record: Any) -> Any:
  """Puts something odd into a text, cuts it, or repeats it."""
  if place := _any(rng, record, str):
    node, key = place
    text = node[key]
    at = int(rng.integers(len(text) + 1))
    odd = pick(rng, [entry for entry in VALUES if isinstance(entry, str)])
    node[key] = pick(rng, (text[:at] + odd + text[at:], text[:at], text * 40, odd + text, text + odd))
  return record


RECORDS = (set_value, drop, wrap, move, repeat, rename, retext)
"""Changes of a record of any shape."""

# --- Bytes -----------------------------------------------------------------------------------------------------


def flip(rng: np.random.Generator, content: bytes) -> bytes:
  """Changes a few bytes."""
  out = bytearray(content)
  for at in rng.integers(len(out), size=int(pick(rng, (1, 3, 20)))) if out else ():
    out[at] ^= int(rng.integers(1, 256))
  return bytes(out)


def cut(rng: np.random.Generator, content: bytes) -> bytes:
  """Leaves out the end, the beginning, or a part between."""
  first, last = sorted(rng.integers(len(content) + 1, size=2).tolist())
  return pick(rng, (content[:first], content[first:], content[:first] + content[last:]))


def double(rng: np.random.Generator, content: bytes) -> bytes:
  """Repeats a part, or all."""
  first, last = sorted(rng.integers(len(content) + 1, size=2).tolist())
  return pick(rng, (content * 2, content[:last] + content[first:]))


def blank(rng: np.random.Generator, content: bytes) -> bytes:
  """Writes one byte over a part, or puts it in between."""
  first, last = sorted(rng.integers(len(content) + 1, size=2).tolist())
  byte = pick(rng, (b"\0", b"\xff", b" "))
  return pick(
    rng,
    (content[:first] + byte * (last - first) + content[last:], content[:first] + byte * 40 + content[first:]),
  )


def lie(rng: np.random.Generator, content: bytes) -> bytes:
  """Writes another number over two or four bytes, mostly near the beginning: sizes, counts, offsets."""
  width = int(pick(rng, (2, 4)))
  number = int(pick(rng, (0, 1, 2, 255, 30_000, 65_535, 2**31 - 1, 2**32 - 1))) % 256**width
  reach = min(len(content), int(pick(rng, (64, 64, 400, 1 << 30)))) - width
  if reach < 0:
    return content
  at = int(rng.integers(reach + 1))
  return content[:at] + number.to_bytes(width, pick(rng, ("big", "little"))) + content[at + width :]


def swap(rng: np.random.Generator, content: bytes) -> bytes:
  """Exchanges two parts."""
  a, b, c = sorted(rng.integers(len(content) + 1, size=3).tolist())
  return content[:a] + content[b:c] + content[a:b] + content[c:]


def replace(rng: np.random.Generator, content: bytes) -> bytes:
  """Puts something else in the place of the file."""
  return pick(
    rng,
    (
      b"",
      b"\0",
      b"{}",
      b"<html><body>404</body></html>",
      b"version https://git-lfs.github.com/spec/v1\n",
      rng.bytes(300),
      content[::-1],
    ),
  )


BYTES = (flip, cut, double, blank, lie, swap, replace)
"""Changes of a file of any kind."""


def changed(rng: np.random.Generator, start: Any, changes: Any, most: int = 3) -> tuple[Any, list[str]]:
  """Returns what one to `most` changes make of something, and their names."""
  start = copy.deepcopy(start)
  chosen = [pick(rng, changes) for _ in range(int(rng.integers(1, most + 1)))]
  for change in chosen:
    start = change(rng, start)
  return start, [change.__name__ for change in chosen]


def difference(old: Any, new: Any, place: str = "") -> list[str]:
  """Returns what is different about a record: `.text_config.hidden_size=-1`, for messages."""
  if isinstance(old, dict) and isinstance(new, dict):
    gone = [f"{place}.{key} is gone" for key in old if key not in new]
    new_keys = [f"{place}.{key}={_short(new[key])}" for key in new if key not in old]
    return (
      gone
      + new_keys
      + [d for key in old if key in new for d in difference(old[key], new[key], f"{place}.{key}")]
    )
  if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
    return [
      d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in difference(a, b, f"{place}[{i}]")
    ]
  # By their text: NaN is not itself.
  return [] if repr(old) == repr(new) else [f"{place}={_short(new)}"]


def _short(found: Any) -> str:
  text = repr(found)
  return text if len(text) <= 80 else f"{text[:60]}...{text[-17:]}"
