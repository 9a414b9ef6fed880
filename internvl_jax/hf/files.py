"""A checkpoint's files: reads JSON, finds the files with weights, and recognizes files of other kinds."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from internvl_jax.errors import UserError
from internvl_jax.storage.snapshots import url_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"

JSON_BYTES = 2**27
"""Largest JSON file that is read: the largest tokenizer.json of a language model has 35 MB."""

DEPTH = 64
"""Deepest nesting of a JSON file; what writes it again goes down by recursion."""

HEADER_BYTES = 2**25
"""Longest header of a safetensors file, read whole before anything else: some 150 bytes a tensor."""

# First bytes of files that are saved under the name of another kind.
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
  (b"version https://git-lfs", "only a pointer of Git LFS; fetch the file by `git lfs pull`"),
  (b"<!doctype", "a web page, saved in place of the file; download it again"),
  (b"<html", "a web page, saved in place of the file; download it again"),
  (b"<?xml", "an XML page (a server's error?), saved in place of the file; download it again"),
  (b"gguf", "a GGUF file, which llama.cpp reads; take the checkpoint that holds safetensors"),
  (
    b"pk\x03\x04",
    "a ZIP archive (torch.save writes such), not what its name says; never read, as it may hold code",
  ),
  (b"\x1f\x8b", "compressed by gzip; decompress it"),
)


def what_it_is(path: Path) -> str | None:
  """What a file is by its first bytes, and what to do, where its name does not fit; else None.

  Raises:
    UserError: it cannot be read.
  """
  try:
    with path.open("rb") as file:
      head = file.read(64)
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror})") from None
  return what_begins(head)


def what_begins(head: bytes) -> str | None:
  """`what_it_is` of a file with these first 64 bytes."""
  if not head:
    return "empty; download it again"
  # A safetensors file begins with the length of its header and the header's brace.
  head = head if head[8:9] == b"{" else head.lstrip(b"\xef\xbb\xbf \t\r\n")
  return next((words for start, words in _BEGINNINGS if head.lower().startswith(start)), None)


def shown(value: Any, length: int = 60) -> str:
  """A value in an error message: its repr, cut to about `length` characters."""
  try:
    text = repr(value)
  except (ValueError, RecursionError):  # An integer of too many digits; a list in itself.
    text = f"a {type(value).__name__}"
  return text if len(text) <= length else f"{text[: length - 10]}...{text[-7:]}"


def read_json(path: Path) -> dict[str, Any]:
  """A JSON object from a file.

  Raises:
    UserError: no such file, or no JSON object, or one that is too large or nested too deeply.
  """
  try:
    size = path.stat().st_size
    if size > JSON_BYTES:
      raise UserError(
        f"{path}: has {size:,} bytes, more than the {JSON_BYTES:,} of any such file; download it again"
      )
    found = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    if (url_of(path.parent) or path.parent).parent.name == "checkpoints":
      raise UserError(
        f"{path.parent}: a checkpoint to resume from, not a model; docs/training.md shows how to make a model of it"
      ) from None
    raise UserError(f"{path}: no such file; a checkpoint folder has a {path.name}") from None
  except UserError:
    raise
  except (
    ValueError,
    RecursionError,
  ) as error:  # Not only of JSON: numbers of too many digits, other encodings.
    words = what_it_is(path) or f"not valid JSON ({shown_error(error)}); correct it, or download it again"
    raise UserError(f"{path}: {words}") from None
  if not isinstance(found, dict):
    raise UserError(f"{path}: holds a {type(found).__name__}, expected a JSON object; download it again")
  if _is_deeper([found], DEPTH):
    raise UserError(f"{path}: is nested more than {DEPTH} levels deep; download it again")
  return found


def _is_deeper(level: list[Any], depth: int) -> bool:
  for _ in range(depth):
    containers = [value for value in level if isinstance(value, dict | list)]
    level = [
      inner for value in containers for inner in (value.values() if isinstance(value, dict) else value)
    ]
    if not level:
      return False
  return True


def shown_error(error: BaseException) -> str:
  """An error of another library in one line."""
  lines = str(error).strip().splitlines()
  return (lines[0] if lines else type(error).__name__)[:200]


# --- Which files hold the weights ---------------------------------------------------------------------------

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")

# What trainers leave beside a model: no weights of it.
_LEFTOVERS = re.compile(r"(optimizer|scheduler|rng_state|training_args|scaler).*")


PICKLES = (".pth", ".bin")
"""Suffixes of torch.save's files that are read, with a restricted unpickler, where a projector is named."""

PICKLED = (*PICKLES, ".pt")
"""Suffixes of all files that torch.save may have written."""


def weight_files(path: Path, *, pickles: bool = False) -> tuple[list[Path], dict[str, str]]:
  """The safetensors files of a folder, or one file; and by tensor the file that an index names, if there is one.

  Args:
    path: a folder or a file.
    pickles: a file may be one of torch.save's.

  Raises:
    UserError: no weights, only pickled weights, or files that are not one model's.
  """
  if path.is_file():
    if path.suffix != ".safetensors" and not (pickles and path.suffix in PICKLES):
      raise UserError(f"{path.parent}: {_pickle_advice([path.name])}")
    return [path], {}
  found = sorted(p.name for p in path.glob("*.safetensors") if p.name != ADAPTER)
  pickled = sorted(
    p.name for suffix in PICKLED for p in path.glob(f"*{suffix}") if not _LEFTOVERS.fullmatch(p.name)
  )
  index = path / INDEX
  where = _read_index(index) if index.exists() else {}
  names = sorted(set(where.values())) if where else found
  if names and (path / ADAPTER).exists():
    raise UserError(
      f"{path}: holds a model ({listed(names)}) and an adapter ({ADAPTER}); move the adapter with its config to a "
      "folder of its own and name that to open both, or delete it"
    )
  if not names:
    raise UserError(f"{path}: no *.safetensors weights" + (f"; {_pickle_advice(pickled)}" if pickled else ""))
  _check_siblings(path, names, found, indexed=bool(where))
  ignored = [name for name in (*found, *pickled) if name not in names]
  if ignored:
    logging.info("%s: read %s; not read: %s", path, listed(names), listed(ignored))
  return [path / name for name in names], where


def _read_index(index: Path) -> dict[str, str]:
  """By tensor, the name of its file."""
  where = read_json(index).get("weight_map")
  if not isinstance(where, dict) or not where:
    raise UserError(
      f"{index}: not an index of safetensors files (its weight_map is {shown(where)}); download it again"
    )
  for name in {str(name) for name in where.values()}:
    if Path(name).name != name or not name.endswith(".safetensors"):
      raise UserError(f"{index}: names {shown(name)}, which is not a file beside it")
    if not (index.parent / name).is_file():
      raise UserError(f"{index.parent / name}: no such file, but {index.name} names it; download it")
  return {key: str(name) for key, name in where.items()}


def _check_siblings(folder: Path, names: Sequence[str], found: Sequence[str], *, indexed: bool) -> None:
  """Refuses a folder with files of two models, or with a part of one.

  Args:
    folder: where.
    names: the files that would be read.
    found: all safetensors files.
    indexed: an index lists them.
  """
  others = [name for name in found if name not in names and name.startswith("model")]
  if others:
    raise UserError(
      f"{folder}: holds two models: {listed(others)}, and {listed(names)} that {INDEX} names"
      f"{_newer(folder, others, [*names, INDEX])}; delete those files, or the index and its files, whichever are old"
    )
  shards = {name: match for name in names if (match := _SHARD.fullmatch(name))}
  if indexed or not shards:
    return
  if SINGLE in names:
    raise UserError(
      f"{folder}: holds two models: {SINGLE}, and {listed(list(shards))}{_newer(folder, [SINGLE], list(shards))}; "
      "delete those that are old"
    )
  sets = {(match["stem"], int(match["count"])) for match in shards.values()}
  if len(sets) > 1:
    raise UserError(
      f"{folder}: holds files of {len(sets)} models: {listed(list(shards))}; delete those that are old"
    )
  ((stem, count),) = sets
  missing = [
    name for i in range(count) if (name := f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors") not in shards
  ]
  if missing:
    raise UserError(
      f"{folder}: has {len(shards)} of {count} files of the model; missing: {listed(missing)}; download "
      f"{'it' if len(missing) == 1 else 'them'}"
    )


def _newer(folder: Path, ones: Sequence[str], others: Sequence[str]) -> str:
  """Which of two sets of files was written later, by their times; copies may not have kept them."""
  first, second = (max((folder / name).stat().st_mtime for name in names) for names in (ones, others))
  return f" (by its time, {ones[0] if first > second else others[0]} is newer)" if first != second else ""


def listed(names: Iterable[str], most: int = 4) -> str:
  """Names in a line, the first of them where there are many."""
  names = list(names)
  return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _pickle_advice(names: Sequence[str]) -> str:
  """Why pickles are not read, and the command that converts all of them."""
  several = len(names) > 1
  kind = "pickles, which can run code and are" if several else "a pickle, which can run code and is"
  return f"{', '.join(names)} {'are' if several else 'is'} {kind} never read; {convert_command(names)}"


def convert_command(names: Sequence[str]) -> str:
  """How to make safetensors of pickles, beginning with "where torch is installed"."""
  several = len(names) > 1
  files = " ".join(f"'{name}'" for name in names)
  return (
    f"where torch is installed and you trust "
    f"{'them' if several else 'it'}, convert {'all of them' if several else 'it'}, in this folder, with: "
    'python -c "import sys, torch, safetensors.torch as s; [s.save_file({k: v.contiguous().clone() for k, v in '
    "torch.load(f, map_location='cpu', weights_only=True).items()}, f.rpartition('.')[0] + '.safetensors') "
    f'for f in sys.argv[1:]]" {files}'
  )
