"""A run's output directory, a folder or in a bucket: its files, and whether a run starts, resumes or overwrites it."""

import contextlib
import fnmatch
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal

from internvl_jax import digests
from internvl_jax.arguments import TrainingArguments
from internvl_jax.errors import UserError
from internvl_jax.storage import paths, remote
from internvl_jax.storage.paths import AnyPath, BucketPath, path_of

# Messages of file systems that are full, through libraries that pass no errno on.
_DISK_ERRORS = re.compile(
  r"no space left|disk quota|file too large|read-only file system|input/output error", re.I
)

CONFIG_FILE = "train_config.json"
"""What the run was made with."""

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints to resume from."""

EVALUATIONS = "evaluations"
"""Folder of the samples that were shown at evaluations."""

FACTS_FILE = "run_facts.json"
"""Where and how a run was started, and what its data are like."""

LOG_FOLDER = "log"
"""Folder of the log's entries as they come, a file for each start."""

REPORT_FILE = "report.html"
"""The run on a page."""

TRACKERS_FILE = "trackers.json"
"""The run's ids at trackers."""

COMMIT_FILE = "commit_success.txt"
"""Marks a checkpoint in a bucket, where nothing can be renamed, as complete; Orbax's name for it."""

LEASE_FILE = "run.lease"
"""Who writes there: it is there as long as a run is, and no run's output."""

Beginning = Literal["new", "resume", "overwrite"]
"""How a run begins in its directory; see `check_output_dir`."""

RUN_FILES = (
  CONFIG_FILE,
  FACTS_FILE,
  REPORT_FILE,
  TRACKERS_FILE,
  "trainer_state.json",
  "train_results.json",
  "eval_results.json",
  "predictions.jsonl",
  "config.json",
  "generation_config.json",
  "preprocessor_config.json",
  "processor_config.json",
  "video_preprocessor_config.json",
  "model.safetensors",
  "model.safetensors.index.json",
  "model-*-of-*.safetensors",
  "shard-*.tmp",
  "*.json.tmp",
  "tokenizer.json",
  "tokenizer.model",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "chat_template.jinja",
  "chat_template.json",
)
"""The files a run writes at the root of its output directory, but for those of its task."""

RUN_FOLDERS = (CHECKPOINTS, EVALUATIONS, LOG_FOLDER, "adapter", "tensorboard", "profile")
"""The folders a run writes there."""

KEPT_FOLDERS = ("reference_logps", "teacher_logps")
"""Folders that a run makes and that no run deletes: they record what they were made of, and took a pass over the data."""

RUN_MARKS = (CONFIG_FILE, "trainer_state.json", CHECKPOINTS)
"""One of these distinguishes a run's output from a downloaded model; the first of them is written first."""


def write_json(path: AnyPath, value: Any) -> None:
  """Writes JSON, complete or not at all."""
  paths.write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_config(folder: AnyPath, config: dict[str, Any]) -> None:
  """Writes what a run is made with."""
  write_json(folder / CONFIG_FILE, config)


def begin_run(
  folder: AnyPath, beginning: Beginning, config: dict[str, Any], *, of_tasks: Collection[str] = ()
) -> None:
  """Starts a run that does not resume: deletes an earlier run's output, if it may, and marks the folder as this one's.

  Args:
    folder: the output directory.
    beginning: what `check_output_dir` said.
    config: what the run is made with.
    of_tasks: names of files that tasks write there.
  """
  if beginning == "overwrite":
    clear_output_dir(str(folder), of_tasks)
  folder.mkdir(parents=True, exist_ok=True)
  write_config(folder, config)


@contextlib.contextmanager
def explained(folder: AnyPath, what: str, remedy: Callable[[], str]) -> Iterator[None]:
  """Turns a full disk, and a bucket that takes nothing, which libraries report in many ways, into a line.

  Args:
    folder: where `what` is written.
    what: "the model", say.
    remedy: gives the end of the line: what there is, and what to do.

  Raises:
    UserError: the disk is full, or it or the bucket takes nothing for another reason.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    if isinstance(folder, BucketPath) and (reason := remote.reason(error)) is not None:
      raise UserError(f"{folder}: {what} could not be written ({reason}); {remedy()}") from error
    found = _DISK_ERRORS.search(str(error))
    if found is None or isinstance(folder, BucketPath):
      raise
    free = shutil.disk_usage(folder).free / 2**30
    raise UserError(
      f"{folder}: {what} could not be written ({found[0].lower()}; {free:.1f} GiB are free); {remedy()}"
    ) from error


def would_write_over(model: str, output_dir: str) -> bool:
  """Whether a run would overwrite the weights it starts from, or delete them."""
  model, output_dir = _real(model), _real(output_dir)
  return model == output_dir or any(
    (model + os.sep).startswith(os.path.join(output_dir, folder, "")) for folder in RUN_FOLDERS
  )


def _real(name: str) -> str:
  """A path by which two names of one folder are known."""
  return str(path_of(name)) if paths.is_bucket(name) else os.path.realpath(name)


def check_output_dir(training: TrainingArguments, of_tasks: Collection[str] = ()) -> Beginning:
  """Decides from the file system how a run begins; changes nothing.

  "new": nothing is there. "resume": the directory holds a complete checkpoint. "overwrite":
  `overwrite_output_dir` was asked for and something is there, or there is nothing but the beginnings of a run
  that was stopped before its first checkpoint; `clear_output_dir` then deletes its files.

  Raises:
    UserError: the directory is not empty, and neither resuming nor overwriting is right.
  """
  assert training.output_dir is not None, "validate() comes first"
  folder = path_of(training.output_dir)
  present = (
    {entry.name for entry in folder.iterdir()} - {*KEPT_FOLDERS, LEASE_FILE} if folder.exists() else set()
  )
  where = f"training.output_dir={training.output_dir!r}"
  if not present:
    return "new"
  if not training.overwrite_output_dir:
    if newest_checkpoint(training.output_dir) is not None:
      return "resume"
    if _stopped_early(folder, present, of_tasks):
      return "overwrite"
    raise UserError(
      f"{where} is not empty and holds no complete checkpoint to resume from; "
      "choose another folder or set training.overwrite_output_dir=True"
    )
  ours = sorted(entry.name for entry in _run_outputs(folder, of_tasks))
  if ours and present.isdisjoint(RUN_MARKS):
    raise UserError(
      f"{where} holds {ours[0]}, but nothing shows that a run wrote it, so it is not overwritten; "
      "choose another folder or empty it yourself"
    )
  return "overwrite"


def _stopped_early(folder: AnyPath, present: set[str], of_tasks: Collection[str]) -> bool:
  """Whether a run began here, and left neither a model nor anything that is not a run's."""
  ours = {entry.name for entry in _run_outputs(folder, of_tasks)}
  has_model = any(fnmatch.fnmatch(name, "model*.safetensors") for name in present)
  return CONFIG_FILE in present and present <= ours and not has_model and not checkpoint_steps(str(folder))


def newest_checkpoint(output_dir: str) -> int | None:
  """The step of the newest complete checkpoint under `CHECKPOINTS`, or None.

  Complete is not intact: whether its files are what was written is found out when it is restored.
  """
  root = path_of(output_dir) / CHECKPOINTS
  return next((step for step in checkpoint_steps(output_dir) if is_complete(root / str(step))), None)


def checkpoint_steps(output_dir: str) -> list[int]:
  """The steps of all folders that have the name of a checkpoint and something in them, newest first."""
  root = path_of(output_dir) / CHECKPOINTS
  if not root.exists():
    return []
  steps = (entry for entry in root.iterdir() if re.fullmatch("0|[1-9][0-9]*", entry.name) and entry.is_dir())
  return sorted((int(entry.name) for entry in steps if any(entry.iterdir())), reverse=True)


def is_complete(checkpoint: AnyPath) -> bool:
  """Whether a checkpoint was once written to its end.

  On a disk it is written under a temporary name and renamed then, so that one of the two files that list its content
  shows it; the other one may have been lost since. In a bucket, `COMMIT_FILE` is the last that is written.
  """
  if isinstance(checkpoint, BucketPath):
    return (checkpoint / COMMIT_FILE).exists()
  return any((checkpoint / name).exists() for name in ("_CHECKPOINT_METADATA", digests.FILE))


def clear_output_dir(output_dir: str, of_tasks: Collection[str] = ()) -> list[str]:
  """Deletes what a run wrote (`RUN_FILES`, `RUN_FOLDERS`, files of tasks) and nothing else; returns the names, sorted.

  For one process of a run, after `check_output_dir` said "overwrite" to all of them.
  """
  deleted = _run_outputs(path_of(output_dir), of_tasks)
  for entry in deleted:
    if entry.is_dir() and not entry.is_symlink():  # What a link points to may be anybody's.
      paths.remove_tree(entry)
    else:
      entry.unlink()
  return sorted(entry.name for entry in deleted)


def _run_outputs(folder: AnyPath, of_tasks: Collection[str]) -> list[AnyPath]:
  names = (*RUN_FILES, *of_tasks)
  files: list[AnyPath] = [
    entry for entry in folder.iterdir() if any(fnmatch.fnmatch(entry.name, name) for name in names)
  ]
  return files + [folder / name for name in RUN_FOLDERS if (folder / name).exists()]


@contextlib.contextmanager
def read_from(folder: AnyPath, item: str) -> Iterator[None]:
  """Names an item of a checkpoint whose JSON is damaged, where no digest has shown that before."""
  try:
    yield
  except UserError:
    raise
  except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
    raise UserError(
      f"{folder}: {item} is not what a run has written there ({type(error).__name__}: {error}); remove that folder to go "
      "on from the one before"
    ) from error
