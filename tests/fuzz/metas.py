"""Meta files: the keys that we and the reference know, with values that no one should write."""

from typing import Any

import numpy as np

from tests.fuzz import odd

BASES = (
  {"toy": {"root": ".", "annotation": "toy.jsonl"}},
  {
    "toy": {
      "root": "",
      "annotation": "toy.jsonl",
      "data_augment": True,
      "repeat_time": 2,
      "length": 6,
      "max_dynamic_patch": 4,
    }
  },
  {
    "toy": {"root": ".", "annotation": "toy.jsonl", "repeat_time": 0.5},
    "toy2": {"root": "", "annotation": "toy.jsonl"},
  },
)
_KEYS = (
  "root",
  "annotation",
  "data_augment",
  "repeat_time",
  "length",
  "max_dynamic_patch",
  "max_num_images",
  "weight",
  "conv_style",
)
_PATHS = (
  "gone.jsonl",
  ".",
  "/dev/zero",
  "/dev/null",
  "meta.json",
  "a.png",
  "frames",
  "~",
  "../../../../..",
  "file:///etc/passwd",
)


def entry_value(rng: np.random.Generator, record: Any) -> Any:
  """Gives a dataset a key of ours or of others, with an odd value."""
  entries = (
    [entry for entry in record.values() if isinstance(entry, dict)] if isinstance(record, dict) else []
  )
  if entries:
    odd.pick(rng, entries)[odd.pick(rng, _KEYS)] = odd.value(rng)
  return record


def entry_number(rng: np.random.Generator, record: Any) -> Any:
  """Gives a dataset a number where one belongs."""
  entries = (
    [entry for entry in record.values() if isinstance(entry, dict)] if isinstance(record, dict) else []
  )
  if entries:
    numbers = [number for number in odd.VALUES if isinstance(number, int | float)]
    odd.pick(rng, entries)[odd.pick(rng, ("repeat_time", "length", "max_dynamic_patch"))] = odd.pick(
      rng, numbers
    )
  return record


def path(rng: np.random.Generator, record: Any) -> Any:
  """Names another file or folder."""
  entries = (
    [entry for entry in record.values() if isinstance(entry, dict)] if isinstance(record, dict) else []
  )
  if entries:
    odd.pick(rng, entries)[odd.pick(rng, ("root", "annotation"))] = odd.pick(rng, _PATHS)
  return record


RECORDS = (*odd.RECORDS, entry_value, entry_number, entry_number, entry_number, path)


def make(rng: np.random.Generator) -> tuple[bytes, list[str]]:
  """Returns the bytes of a meta file, and what was done to it."""
  record, done = odd.changed(rng, odd.pick(rng, BASES), RECORDS, most=2)
  text = odd.dumps(record).encode()
  if rng.random() < 0.15:
    text, more = odd.changed(rng, text, odd.BYTES, most=1)
    done += more
  return text, done
