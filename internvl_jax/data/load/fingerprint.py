"""Fingerprints of a mixture and of all that makes samples of it: for caches of what is computed from each, and for runs that go on."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import logging

from internvl_jax.data.load.mixture import Dataset, Mixture
from internvl_jax.data.source import files
from internvl_jax.data.source.interface import Records
from internvl_jax.data.source.line_digests import Digests, digests_of, first_difference
from internvl_jax.data.source.meta import read_meta
from internvl_jax.data.source.records import open_records
from internvl_jax.data.where import DataError
from internvl_jax.errors import redacted

# Changes whenever the same data would become other samples.
_VERSION = 2


def mixture_fingerprint(mixture: Mixture) -> str:
  """A SHA-256, in hex, of all that the samples and their order in the mixture depend on.

  These are the entries of the meta file, the bytes of the annotation files (read once more, whole), the tokenizer and
  the template, all settings of images, videos and lengths, and the seed that says how many frames a video gives. Not
  the images themselves: one that is replaced under its name goes unseen, as it does by the index of sizes. Copies of
  the annotation files elsewhere, or written again, have the same; `root` counts by its absolute path.

  Args:
    mixture: of the samples; their sizes need not be indexed.

  Raises:
    DataError: an annotation file cannot be read.
  """
  content = {
    "version": _VERSION,
    mixture.lines.kind: True,
    "pixels": [mixture.data.pad2square, mixture.data.normalize_type],
    "datasets": [_content(dataset) for dataset in mixture.datasets],
  }
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _content(dataset: Dataset) -> dict[str, Any]:
  spec = dataset.spec
  return {
    "name": spec.name,
    "repeat_time": spec.repeat_time,
    "data_augment": spec.data_augment,
    "annotation": dataset.file.digest(),
    "limits": list(dataset.limits),
    "sizes": dataset.key(),
  }


class Varying(NamedTuple):
  """A dataset whose samples are not the same every time.

  Attributes:
    dataset: its name.
    cause: why, and what to change.
  """

  dataset: str
  cause: str


def first_varying(mixture: Mixture) -> Varying | None:
  """The first dataset of which a sample may differ between epochs; None if every sample is always the same.

  What was computed from a sample of such a dataset, a reference policy's log-probabilities say, holds for one epoch.
  An annotation file is searched for videos, but only lines that may have one are parsed.
  """
  for dataset in mixture.datasets:
    name = dataset.spec.name
    if dataset.spec.data_augment:
      cause = "data_augment re-encodes its images at a random quality; set it to false in the meta file"
      return Varying(name, cause)
    if line := dataset.first_video():
      return Varying(name, f"the frames of its videos are drawn anew in every epoch, from {line} on")
  return None


# --- What a run reads ---------------------------------------------------------------------------------------

# Settings that make other samples of the same lines.
_SETTINGS = (
  *("conv_style", "max_seq_length", "force_image_size", "dynamic_image_size", "use_thumbnail", "pad2square"),
  *("min_dynamic_patch", "max_dynamic_patch", "min_num_frame", "max_num_frame", "normalize_type"),
)
_ENTRIES = ("repeat_time", "data_augment", "max_dynamic_patch")
_REMEDY = "or start anew with training.overwrite_output_dir=True"


def content_of(mixture: Mixture, cache: str | os.PathLike[str] | None) -> dict[str, Any]:
  """A description of a mixture, as JSON values: a checkpoint holds it, and hosts compare it.

      {"settings": {"data.conv_style": "internvl2_5", ...}, "tokenizer": "83b0...",
       "datasets": [{"name": "vqa", "entry": {"repeat_time": 1, ...}, "lines": 2000, "block": 2, "digests": "a1f7..."}]}

  The lines in use are digested by blocks; neither images nor paths.

  Args:
    mixture: the datasets.
    cache: folder of caches, where digests are kept; None reads the annotation files.

  Raises:
    DataError: an annotation file cannot be read, or was changed since its lines were found.
  """
  maker = mixture.datasets[0].maker
  settings = {f"data.{name}": getattr(mixture.data, name) for name in _SETTINGS}
  settings |= {"loader.on_over_length": maker.limits.policy, "training.seed": mixture.seed}
  settings["tokens of a tile"] = maker.tokens_per_tile
  datasets = []
  for dataset in mixture.datasets:
    digests = digests_of(dataset.file, dataset.lines, cache)
    entry = {name: getattr(dataset.spec, name) for name in _ENTRIES}
    lines = {"lines": digests.lines, "block": digests.block, "digests": digests.text}
    datasets.append({"name": dataset.spec.name, "entry": entry, **lines})
  return {"settings": settings, "tokenizer": maker.tokenizer.vocabulary(), "datasets": datasets}


def check_state(state: Mapping[str, Any], content: Mapping[str, Any], mixture: Mixture) -> None:
  """Refuses the loader's state of a run that began with other data; a state of earlier versions does not tell.

  Args:
    state: `TrainLoader.get_state`.
    content: `content_of` the mixture.
    mixture: of the run that goes on.

  Raises:
    DataError: it is of other data, or no such state.
  """
  if missing := {"next_step", "counters", "plan"} - state.keys():
    raise DataError(
      f"the loader's state lacks {', '.join(sorted(missing))}; it has {', '.join(sorted(state))}"
    )
  if "content" in state:
    check_same_content(state["content"], content, mixture)
  else:
    logging.warning(
      "The checkpoint was made by an earlier version, which did not keep what its annotation files held: whether they "
      "were changed since cannot be told"
    )


def check_same_content(then: Mapping[str, Any], now: Mapping[str, Any], mixture: Mixture) -> None:
  """Refuses to go on with other data than a run began with.

  Args:
    then: `content_of` the mixture that it began with.
    now: of this one.
    mixture: this one.

  Raises:
    DataError: a line, an entry of the meta file, a setting or the tokenizer is another.
  """
  meta = mixture.data.meta_path
  names = [[entry["name"] for entry in content["datasets"]] for content in (then, now)]
  if names[0] != names[1]:
    raise DataError(
      f"{meta}: the run began with {_listed(names[0])}, and the meta file has {_listed(names[1])} now; restore it, {_REMEDY}"
    )
  for dataset, before, after in zip(mixture.datasets, then["datasets"], now["datasets"], strict=True):
    for key in before["entry"].keys() & after["entry"].keys():
      _check_equal(
        f"{meta}: {key} of dataset {dataset.spec.name!r}", before["entry"][key], after["entry"][key]
      )
    _check_lines(dataset, _digests(before), _digests(after))
  for name in then["settings"].keys() & now["settings"].keys():
    _check_equal(name, then["settings"][name], now["settings"][name])
  if then["tokenizer"] != now["tokenizer"]:
    raise DataError(
      f"the run began with another tokenizer than the model's folder has now; restore it, {_REMEDY}"
    )


def shared_facts(content: Mapping[str, Any], mixture: Mixture) -> dict[str, Any]:
  """Facts of `content_of` that must be equal on all hosts of a run, by their names in messages."""
  facts: dict[str, Any] = {"the tokenizer": mixture.datasets[0].maker.tokenizer.fingerprint()}
  facts["the datasets of the meta file"] = [entry["name"] for entry in content["datasets"]]
  for dataset, found in zip(mixture.datasets, content["datasets"], strict=True):
    name, annotation = dataset.spec.name, files.name(dataset.spec.annotation)
    facts[f"the meta file's entry of dataset {name!r}"] = found["entry"]
    facts[f"the content of {annotation} (dataset {name!r})"] = (
      f"{found['lines']} lines, digest {_digests(found).summary}"
    )
  return facts


class Watched:
  """The annotation files of a run, of which it is told when one is written to, replaced or removed meanwhile."""

  def __init__(self, mixture: Mixture):
    """Notes how they are now."""
    self._files = [dataset.file for dataset in mixture.datasets]
    self._stamps = [_stamp(file) for file in self._files]

  def tell(self) -> None:
    """Logs a line for each file that was touched since the last time: lines to come may be others than planned."""
    for i, file in enumerate(self._files):
      if (now := _stamp(file)) != self._stamps[i]:
        self._stamps[i] = now
        logging.warning(
          "%s: dataset %r: the annotation file was written to, replaced or removed while the run reads it; put back what it "
          "held, or the run cannot go on from its checkpoints",
          *(redacted(file.path), file.dataset),
        )


def _stamp(file: Records) -> tuple | None:
  # Without the last date, which a backup or a change of permissions moves, too.
  with contextlib.suppress(DataError):
    return file.stamp()[:-1]
  return None


def files_digest(
  annotations: Mapping[str, str | None],
  metas: Mapping[str, str | None],
  cache: str | os.PathLike[str] | None,
) -> dict[str, Any]:
  """Digests of what a model is scored on, whole, by the names that messages give them; see `shared_facts`.

  Args:
    annotations: files by the setting that names them; None where none does.
    metas: meta files likewise, of which the datasets' files are digested.
    cache: folder of caches.

  Raises:
    DataError: a file cannot be read.
  """
  paths = {setting: (path, "annotation") for setting, path in annotations.items() if path is not None}
  for setting, meta_path in metas.items():
    specs = [] if meta_path is None else read_meta(meta_path, cache=cache)
    paths |= {f"dataset {spec.name!r} of {setting}": (spec.annotation, spec.key) for spec in specs}
  return {
    f"the content of {name}": open_records(path, name, key=key, cache=cache).digest()[:16]
    for name, (path, key) in paths.items()
  }


def _digests(entry: Mapping[str, Any]) -> Digests:
  return Digests(int(entry["lines"]), int(entry["block"]), str(entry["digests"]))


def _check_lines(dataset: Dataset, then: Digests, now: Digests) -> None:
  if then == now:
    return
  blame = f"{dataset.spec.annotation}: dataset {dataset.spec.name!r}"
  changed = first_difference(dataset.file, then, now)
  if changed is not None:
    first, last = dataset.file.where(changed[0]), dataset.file.where(changed[-1]).line
    lines = f"line {first.line} is" if first.line == last else f"a line between {first.line} and {last} is"
    raise DataError(
      f"{blame}: {lines} not as it was when the checkpoint was saved; restore the file, {_REMEDY}"
    )
  raise DataError(
    f"{blame}: {then.lines} lines were in use when the checkpoint was saved, and {now.lines} are now; restore the file, "
    f"{_REMEDY}"
  )


def _check_equal(name: str, then: Any, now: Any) -> None:
  if then != now:
    raise DataError(
      f"{name} was {then!r} when the checkpoint was saved and is {now!r} now: the run cannot go on with the same samples; "
      f"restore it, {_REMEDY}"
    )


def _listed(names: list[str]) -> str:
  more = f" and {len(names) - 8} more" if len(names) > 8 else ""
  return f"{len(names)} datasets ({', '.join(names[:8])}{more})"
