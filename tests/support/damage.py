"""What tests of bad checkpoints share: a good one's copy, changed, and how it is refused."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest
from safetensors.numpy import load_file, save_file

from internvl_jax.errors import UserError
from internvl_jax.hf.model import Changes, open_source


def load(folder: Path, **changes: Any) -> dict[str, jax.Array]:
  """All parameters of a checkpoint."""
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  source = open_source(folder, Changes(**changes))
  return source.load(source.model.shapes, dict.fromkeys(source.model.shapes, place))


def edit(folder: Path, change: Any) -> None:
  """Changes the dictionary of a checkpoint's tensors."""
  tensors = load_file(folder / "model.safetensors")
  change(tensors)
  save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
  """Sets entries of config.json; `a__b` is the entry b of the entry a."""
  path = folder / "config.json"
  config = json.loads(path.read_text())
  for key, value in changes.items():
    *entries, last = key.split("__")
    inner = config
    for entry in entries:
      inner = inner[entry]
    inner[last] = value
  path.write_text(json.dumps(config))


def refused(folder: Path, *words: str, **changes: Any) -> str:
  """The line in which a checkpoint is refused, which holds all of the words."""
  with pytest.raises(UserError) as error:
    load(folder, **changes)
  line = str(error.value)
  assert len(line.splitlines()) == 1 and all(word in line for word in words), line
  return line
