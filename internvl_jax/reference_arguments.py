"""Arguments of the reference's training programs, read by the rules of Hugging Face's HfArgumentParser.

`--name value`, `--name=value`, `--flag` alone for a boolean, `--no_flag`, unique beginnings of a name, several values for a list,
and a JSON file in place of all of them. A name that comes twice has its last value.
"""

import dataclasses
import json
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from internvl_jax.arguments import TrainingArguments
from internvl_jax.config import FIELDS, OF_THE_REFERENCE, type_name
from internvl_jax.errors import UserError, suggest
from internvl_jax.foreign import FOREIGN, SAME_AS, answer
from internvl_jax.parallel import zero

PATHS: dict[str, str] = {
  path.partition(".")[2]: path for path in FIELDS if path.partition(".")[0] in OF_THE_REFERENCE
} | SAME_AS
"""Argument -> the path of its field, names of other trainers included."""

_LISTS = ("report_to", "loss_type")
"""Fields of text that hold a comma list, and take several values; tuples do, too."""

_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Foreign:
  """An argument that no field has.

  Attributes:
    name: "run_name".
    value: as it was given, without secrets.
    changes_nothing: whether what is learned is the same without it.
    why: what takes its place; may be empty if it asks for what is so anyway.
  """

  name: str
  value: str
  changes_nothing: bool
  why: str


@dataclasses.dataclass(kw_only=True, slots=True)
class Arguments:
  """What a program was given.

  Attributes:
    values: of fields, by their paths.
    foreign: what no field has.
    problems: what the program itself would refuse, as (argument, message).
  """

  values: dict[str, Any] = dataclasses.field(default_factory=dict)
  foreign: list[Foreign] = dataclasses.field(default_factory=list)
  problems: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def is_argument(name: str) -> bool:
  """Whether the reference's programs know an argument, without its dashes."""
  return name in PATHS or name in FOREIGN


def parse(words: Sequence[str]) -> Arguments:
  """Reads a program's arguments; reports all problems, raises none.

  >>> parse(["--freeze_llm", "True", "--learning_rate=4e-5"]).values
  {'model.freeze_llm': True, 'training.learning_rate': 4e-05}
  """
  found = Arguments()
  if len(words) == 1 and words[0].endswith(".json"):
    _take_file(words[0], found)
    return found
  at = 0
  while at < len(words):
    word, at = words[at], at + 1
    if not re.match(r"--\w", word):
      found.problems.append((word, f"{word!r} is no argument, and the value of none"))
      continue
    name, equals, value = word[2:].partition("=")
    values = [value] if equals else []
    while not equals and at < len(words) and not re.match(r"--?[A-Za-z]", words[at]):
      values.append(words[at])
      at += 1
    _take(name, values, found)
  return found


def _take_file(path: str, found: Arguments) -> None:
  try:
    settings = json.loads(Path(path).read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    found.problems.append((path, f"{path}: cannot be read as JSON: {error}"))
    return
  if not isinstance(settings, Mapping):
    found.problems.append((path, f"{path}: must hold a JSON object"))
    return
  for name, value in settings.items():
    listed = value if isinstance(value, list) else [value]
    _take(name, [entry if isinstance(entry, str) else json.dumps(entry) for entry in listed], found)


def _take(name: str, values: list[str], found: Arguments) -> None:
  """Takes an argument with the words after it."""
  full = _full_name(name.replace("-", "_"), values)
  if full is None:
    known = [*PATHS, *FOREIGN]
    found.problems.append(
      (name, f"--{name} is no argument of the reference's programs{suggest(name, known)}")
    )
  elif full in FOREIGN and full not in PATHS:
    found.foreign.append(_foreign(full, values))
  else:
    path = PATHS[full]
    try:
      found.values[path] = typed(path, values)
    except UserError as error:
      found.problems.append((name, str(error)))


def _full_name(name: str, values: list[str]) -> str | None:
  """The argument's whole name; `--no_flag` becomes the flag with the value False in `values`."""
  if is_argument(name):
    return name
  if name.startswith("no_") and not values and name[3:] in PATHS:
    values.append("False")
    return name[3:]
  begun = [known for known in {**PATHS, **FOREIGN} if known.startswith(name)]
  return begun[0] if len(begun) == 1 else None


def _foreign(name: str, values: list[str]) -> Foreign:
  value = " ".join(values) or "True"
  accepted, why = answer(name, value)
  return Foreign(name=name, value="***" if "token" in name else value, changes_nothing=accepted, why=why)


# --- Values -------------------------------------------------------------------------------------------------


def typed(path: str, values: Sequence[str]) -> Any:
  """The value of a field that an argument's words say.

  Args:
    path: of the field.
    values: the words after the argument's name; none for a boolean means True.

  Raises:
    UserError: they are none, too many, or of another type.
  """
  annotation, name = FIELDS[path].type, path.partition(".")[2]
  kinds = _kinds(annotation)
  if not values and bool in kinds:
    return True
  if not values:
    raise UserError(f"--{name} has no value; it must be {type_name(annotation)}")
  if typing.get_origin(annotation) is tuple:
    (kind, *_) = typing.get_args(annotation)
    return tuple(_one(name, value, (kind,), annotation) for value in values)
  if name in _LISTS:
    return ",".join(values)
  if len(values) > 1:
    raise UserError(f"--{name} has one value, but there are {' '.join(values)}")
  return _one(name, values[0], kinds, annotation)


def _kinds(annotation: Any) -> tuple[Any, ...]:
  """The types that a value may have."""
  if typing.get_origin(annotation) in (typing.Union, types.UnionType):
    return typing.get_args(annotation)
  return (annotation,)


def _one(name: str, value: str, kinds: Sequence[Any], annotation: Any) -> Any:
  if type(None) in kinds and value in ("None", "null"):
    return None
  for kind in kinds:
    if typing.get_origin(kind) is Literal and value in typing.get_args(kind):
      return value
    if kind is bool and value.lower() in (*_TRUE, *_FALSE):
      return value.lower() in _TRUE
    if kind is str:
      return value
    if kind in (int, float):
      try:
        return kind(value)
      except ValueError:
        continue
  raise UserError(f"--{name} {value} must be {type_name(annotation)}")


# --- What is left out -----------------------------------------------------------------------------------------


def left_out_of(arguments: Arguments) -> tuple[dict[str, str], dict[str, str]]:
  """What no field has, or recipes leave, with the reasons: without and with a change of what is learned or left."""
  kept: dict[str, str] = {}
  lost: dict[str, str] = {}
  for argument in arguments.foreign:
    if argument.why or not argument.changes_nothing:
      (kept if argument.changes_nothing else lost)[f"--{argument.name} {argument.value}"] = argument.why
  if arguments.values.get("training.overwrite_output_dir"):
    kept["--overwrite_output_dir True"] = (
      "a restarted command goes on from its newest checkpoint; the flag would delete what an earlier run left"
    )
  if file := arguments.values.get("training.deepspeed"):
    kept |= _explain_zero(file)
  return kept, lost


def _explain_zero(file: str) -> dict[str, str]:
  flag = f"--deepspeed {file}"
  said = {
    flag: "mesh.fsdp shards parameters, gradients and moments over all devices: the same numbers, least memory"
  }
  offload = "offload" in file
  if os.path.isfile(file):
    offload = any("offload" in line for line in zero.problems(file, TrainingArguments()))
  if offload:
    said[f"{flag}, offload"] = "is not done here: `python -m internvl_jax.plan` tells whether it fits without"
  return said
