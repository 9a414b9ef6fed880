"""The checks of the files and folders that a configuration names."""

import os
import re
from collections.abc import Iterator
from typing import Literal

from internvl_jax.config import TrainConfig, get, setting_text
from internvl_jax.hf.files import PICKLES
from internvl_jax.outputs import would_write_over
from internvl_jax.storage.paths import is_bucket
from internvl_jax.storage.remote import is_remote
from internvl_jax.tasks import settings as task_settings

Command = Literal["train", "plan", "doctor"]

REQUIRED: dict[Command, tuple[str, ...]] = {
  "train": ("model.model_name_or_path", "data.meta_path", "training.output_dir"),
  "plan": ("model.model_name_or_path",),
  "doctor": ("model.model_name_or_path", "data.meta_path"),
}
"""What each command reads or writes, so what must be set (and, if it is read, be there)."""

PARTS = ("model.vision_path", "model.llm_path")
"""Checkpoints that together take the place of model.model_name_or_path."""

ON_DISK: dict[str, str] = {
  "loader.cache_dir": "what it holds is mapped into memory; leave it out for a folder in the user's cache folder",
}
"""Field -> why it names a folder of this machine, and no bucket's."""

WRITTEN = ("training.logging_dir", "runtime.compilation_cache_dir")
"""Fields that name a folder to write to, of this machine or of a bucket."""

_NAMED = (
  *("model.model_name_or_path", *PARTS, "model.mlp_path", "data.meta_path", "eval.annotation", "eval.root"),
  *("training.output_dir", *WRITTEN, *ON_DISK),
)
"""Fields that name files or folders, but for those of tasks."""

PROJECTOR_SUFFIXES = (".safetensors", *PICKLES)
"""Forms of the file that model.mlp_path names."""


def path_problems(config: TrainConfig, command: Command) -> Iterator[str]:
  """What is wrong with the paths of a configuration: missing, not there, or not to be written to; a line each."""
  required = REQUIRED[command]
  for path in required:
    if not get(config, path) and not (path == "model.model_name_or_path" and _has_parts(config)):
      yield f"{path}={get(config, path)!r} must be set: --config.{path}=..."
  yield from _parts_problems(config)
  yield from _url_problems(config)
  for path in ("model.model_name_or_path", *PARTS, *(() if command == "plan" else _checkpoints_of_tasks())):
    if get(config, path):
      yield from _model_path_problems(path, get(config, path))
  if config.model.mlp_path and command != "plan":  # which reads no weights
    yield from _projector_path_problems(config.model.mlp_path)
  files = {"data.meta_path": config.data.meta_path if "data.meta_path" in required else None}
  if command in ("train", "doctor"):
    files["eval.annotation"] = _file_of_questions(config.eval.annotation)
    files |= {scored.setting: meta for scored, meta in task_settings.held_out(config)}
  for path, name in files.items():
    if name and not is_remote(name) and not os.path.isfile(name):
      yield f"{path}={name!r}: no such file"
  if command in ("train", "doctor") and config.eval.annotation and (root := config.eval.root):
    if not is_remote(root) and not os.path.isdir(root):
      yield f"eval.root={root!r}: no such folder"
  for path in (path for own in task_settings.of_tasks() for path in own.folders):
    if (name := get(config, path)) and is_remote(name) and not is_bucket(name):
      yield f"{path}={name!r}: runs write to folders, gs:// and s3:// only; name one of these"
  if "training.output_dir" in required and config.training.output_dir:
    yield from _output_path_problems(config)


def _checkpoints_of_tasks() -> tuple[str, ...]:
  return tuple(path for own in task_settings.of_tasks() for path in own.checkpoints)


def _file_of_questions(annotation: str | None) -> str | None:
  # Imported late: it brings `data/` along, for which `--help` should not wait.
  from internvl_jax.eval.sets import is_json

  return None if annotation is None or is_json(annotation) else annotation


# A slash was lost, as shells and os.path.normpath do: the name of a folder called "gs:".
_HALF_A_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)(.*)")


def _url_problems(config: TrainConfig) -> Iterator[str]:
  """URLs that are none, or stand where a folder is wanted, of which libraries would make one called "gs:"."""
  of_tasks = [path for own in task_settings.of_tasks() for path in (*own.folders, *own.checkpoints)]
  of_tasks += [scored.setting for scored, _ in task_settings.held_out(config)]
  for path in (*_NAMED, *of_tasks):
    if (name := get(config, path)) and (found := _HALF_A_URL.match(name)):
      yield f"{path}={name!r} is no URL: did you mean {found[1]}://{found[2]}?"
  for path, why in ON_DISK.items():
    if (name := get(config, path)) and is_remote(name):
      yield f"{path}={name!r}: must be a folder of this machine: {why}"
  for path in WRITTEN:
    if (name := get(config, path)) and is_remote(name) and not is_bucket(name):
      yield f"{path}={name!r}: nothing is written there; name a folder, or one of a bucket (gs://, s3://)"


def _has_parts(config: TrainConfig) -> bool:
  return any(get(config, path) for path in PARTS)


def _parts_problems(config: TrainConfig) -> Iterator[str]:
  whole = "model.model_name_or_path"
  if get(config, whole):
    for path in PARTS:
      if get(config, path):
        yield (
          f"{setting_text(config, whole)} contradicts {setting_text(config, path)}: the one names a whole model, the other "
          "a part to build one from; set one of them to None"
        )
  elif _has_parts(config):
    for path, other in (PARTS, PARTS[::-1]):
      if not get(config, path):
        yield (
          f"{setting_text(config, path)} must be set beside {setting_text(config, other)}: a model is built from both "
          f"(or set {whole})"
        )


def _model_path_problems(path: str, name: str) -> Iterator[str]:
  if is_remote(name):
    yield from (f"{path}={line}" for line in _unread(name))
    return
  if not os.path.isdir(name):
    if not _is_hub_id(name):
      yield f"{path}={name!r}: no such folder; give a checkpoint's folder or its hub id, org/name"
  elif not any(os.path.isfile(os.path.join(name, file)) for file in ("config.json", "adapter_config.json")):
    yield f"{path}={name!r} holds no config.json; give the folder of a whole checkpoint or of a PEFT adapter"


def _projector_path_problems(name: str) -> Iterator[str]:
  if is_remote(name):
    yield from (f"model.mlp_path={line}" for line in _unread(name))
    return
  if os.path.isdir(name):
    return
  if not os.path.isfile(name):
    yield f"model.mlp_path={name!r}: no such file or folder"
  elif not name.endswith(PROJECTOR_SUFFIXES):
    yield f"model.mlp_path={name!r} must end in {', '.join(PROJECTOR_SUFFIXES)}, or be a folder"


def _unread(name: str) -> Iterator[str]:
  from internvl_jax.hf.hub import unread_url

  if line := unread_url(name):
    yield line


def _is_hub_id(name: str) -> bool:
  # Only the form is looked at: whoever fetches the model reports that there is none.
  from internvl_jax.hf.hub import is_hub_id

  return is_hub_id(name)


def _output_path_problems(config: TrainConfig) -> Iterator[str]:
  output = config.training.output_dir
  assert output is not None
  if is_remote(output) and not is_bucket(output):
    yield f"training.output_dir={output!r}: runs write to folders, gs:// and s3:// only; name one of these"
    return
  if is_bucket(output):
    yield from (f"training.output_dir={line}" for line in _unread(output))
  elif os.path.exists(output) and not os.path.isdir(output):
    yield f"training.output_dir={output!r} is a file; name a folder"
  for path in ("model.model_name_or_path", *PARTS, "model.mlp_path", *_checkpoints_of_tasks()):
    name = get(config, path)
    folder = os.path.dirname(name) if name and name.endswith(PROJECTOR_SUFFIXES) else name
    if folder and is_remote(folder) == is_remote(output) and would_write_over(folder, output):
      yield (
        f"{path}={name!r} is where training.output_dir={output!r} would be written; "
        "write to a folder of its own"
      )
