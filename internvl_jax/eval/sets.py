"""The held-out sets that `eval.annotation` names, with the metrics of each."""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from internvl_jax.arguments import EvalConfig
from internvl_jax.data.source import files, records
from internvl_jax.data.source.meta import DatasetSpec, specs_of
from internvl_jax.data.where import DataError
from internvl_jax.errors import did_you_mean
from internvl_jax.eval.metrics import LOSS, METRICS

NAME = "eval.annotation"
"""What errors call the only set: the setting that names it."""

_SET_NAME = re.compile(r"[\w.+-]+")
_OURS = ("metrics", "group_field")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSet:
  """A held-out set, whose files may not have been looked for.

  Attributes:
    name: in the names of its files.
    label: what the names of its scores begin with: "vqa/", or nothing for the only set, which has no name.
    metrics: names of metrics; see `METRICS`.
    group_field: entry of its lines to report by, or None.
    entry: where its lines and images are, as a meta file says it.
    source: the file that names it, or the setting.
  """

  name: str
  label: str
  metrics: tuple[str, ...]
  group_field: str | None
  entry: Mapping[str, Any]
  source: str = NAME

  @property
  def generates(self) -> bool:
    """Whether a metric needs answers."""
    return any(metric != LOSS for metric in self.metrics)

  def spec(self) -> DatasetSpec:
    """Looks for its files.

    Raises:
      DataError: one is missing, or the entry is wrong.
    """
    if not self.label:
      return DatasetSpec(name=NAME, root=self.entry["root"], annotation=self.entry["annotation"])
    (spec,) = specs_of({f"{NAME} {self.name}": self.entry}, self.source)
    # Held-out samples are taken as they are.
    return dataclasses.replace(spec, data_augment=False)


def read_sets(config: EvalConfig) -> tuple[EvalSet, ...]:
  """The sets that a config names; none where it names nothing. Their own files are not looked at.

  Raises:
    DataError: it is neither a file of lines nor sets, or a set's name or metrics are wrong.
  """
  if config.annotation is None:
    return ()
  entries = _parsed(config.annotation) if is_json(config.annotation) else _in_file(config.annotation)
  if entries is None:
    name = _SET_NAME.findall(files.name(config.annotation).partition(".")[0])
    entry = {"annotation": config.annotation, "root": config.root}
    metrics = _metrics(f"{NAME.partition('.')[0]}.metrics", config.metrics)
    found = "_".join(name) or "eval"
    return (EvalSet(name=found, label="", metrics=metrics, group_field=config.group_field, entry=entry),)
  if not entries:
    raise DataError(f"{NAME}={config.annotation}: names no set; add one, or set it to None")
  source = NAME if is_json(config.annotation) else config.annotation
  return tuple(_set(source, name, value, config) for name, value in entries.items())


def first_score(config: EvalConfig) -> str | None:
  """The first score of the first set, as the log names it behind "eval_"; None without sets."""
  sets = read_sets(config)
  return f"{sets[0].label}{sets[0].metrics[0]}" if sets else None


def is_json(annotation: str) -> bool:
  """Whether `eval.annotation` is JSON that names sets, and no file."""
  return re.match(r'\s*\{\s*["}]', annotation) is not None


def is_remote_json(annotation: str) -> bool:
  """Whether only who reads over the network knows which sets there are."""
  return files.is_remote(annotation) and files.suffix(annotation) == ".json"


def _in_file(annotation: str) -> dict[str, Any] | None:
  """The sets that a JSON file names; None where it is a file of lines."""
  if files.suffix(annotation) != ".json":
    return None
  try:
    with files.open_file(annotation) as file:
      begins = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    if not begins.startswith(b"{"):
      return None
    found = json.loads(files.read_bytes(annotation).decode("utf-8-sig"))
  except (
    OSError,
    ValueError,
  ):  # Lines, or nothing that can be read: who opens it as lines says what is wrong.
    return None
  if not isinstance(found, dict):
    return None
  names_records = any(isinstance(value, dict) and _is_entry(value) for value in found.values())
  return _checked(found, annotation) if names_records or all(map(_is_entry, found.values())) else None


def _parsed(text: str) -> dict[str, Any]:
  try:
    found = json.loads(text)
  except ValueError as error:
    raise DataError(f"{NAME}={text}: broken JSON: {error}") from error
  return _checked(found, NAME)


def _checked(found: dict[str, Any], source: str) -> dict[str, Any]:
  for name, value in found.items():
    if not _is_entry(value):
      raise DataError(
        f"{source}: set {name!r}: expected a file, a list of files or an object with 'annotation', got {json.dumps(value)}"
      )
  return found


def _is_entry(value: Any) -> bool:
  if isinstance(value, dict):
    return any(key in value for key in records.keys())
  several = value if isinstance(value, list) else [value]
  return bool(several) and all(isinstance(each, str) for each in several)


def _set(source: str, name: str, value: Any, config: EvalConfig) -> EvalSet:
  blame = f"{source}: set {name!r}"
  if not _SET_NAME.fullmatch(name):
    raise DataError(f"{blame}: its name is one of files and scores; use letters, digits and - _ . + alone")
  entry = dict(value) if isinstance(value, dict) else {"annotation": value}
  metrics, group_field = entry.pop("metrics", config.metrics), entry.pop("group_field", config.group_field)
  if not isinstance(group_field, str | None):
    raise DataError(f"{blame}: 'group_field' must be a string, got {json.dumps(group_field)}")
  return EvalSet(
    name=name,
    label=f"{name}/",
    metrics=_metrics(f"{blame}: 'metrics'", metrics),
    group_field=group_field,
    entry={"root": config.root, **entry},
    source=source,
  )


def _metrics(blame: str, given: Any) -> tuple[str, ...]:
  """The names of metrics, checked."""
  names = [given] if isinstance(given, str) else given
  known = (*METRICS, LOSS)
  if not isinstance(names, list | tuple) or not names:
    raise DataError(f"{blame} must be a list of metrics ({', '.join(known)}), got {json.dumps(given)}")
  for name in names:
    if name not in known:
      raise DataError(f"{blame}: there is no metric {name!r}{did_you_mean(str(name), known)}")
  return tuple(dict.fromkeys(names))
