"""What a model says of all samples, computed once and kept on disk: what tasks have in common that do so."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from internvl_jax.config import TrainConfig
from internvl_jax.data.load.loader import TrainLoader
from internvl_jax.data.load.task import DataTask
from internvl_jax.errors import UserError
from internvl_jax.outputs import write_json
from internvl_jax.parallel import distributed
from internvl_jax.storage.paths import AnyPath

WAIT_SECONDS = 600
"""How long processes wait for what the first one writes."""

_KEY = "key.json"

_NO_END = 1 << 40
"""Steps of a loader that is read for as long as it takes."""


def reader_in_order(
  config: TrainConfig, make_loader: Callable[..., TrainLoader], meta_path: str | None, task: DataTask
) -> Callable[[], TrainLoader]:
  """What makes a loader that reads a mixture in order: an epoch of it has every sample once.

  Args:
    config: the run's, which says how samples are made and how many are in a batch.
    make_loader: see `tasks.task.RunContext`.
    meta_path: of the mixture.
    task: what batches are made.
  """
  data = dataclasses.replace(config.data, meta_path=meta_path, use_data_resampling=False, replacement=False)
  training = dataclasses.replace(
    config.training, max_steps=_NO_END, gradient_accumulation_steps=1, group_by_length=False
  )
  loader = dataclasses.replace(config.loader, shuffle=False)
  return lambda: make_loader(data, training, loader, task=task)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyedFolder:
  """A folder that all hosts see, or a bucket's, of log-probabilities, and `key.json`: what they depend on.

  Attributes:
    folder: the folder.
    setting: the field that names it.
    model: whose they are, as messages call it.
  """

  folder: AnyPath
  setting: str
  model: str

  anew = "delete the folder to compute the log-probabilities anew"

  def has(self, name: str = _KEY) -> bool:
    """Whether a file is there, as the first process sees it; a call that all processes make.

    Hosts may see a shared folder's newest entries at different times; one of them looks for all.

    Raises:
      UserError: the folder is a file.
    """
    if self.folder.exists() and not self.folder.is_dir():
      raise UserError(f"{self.setting}={self.folder}: is a file; name a folder")
    return distributed.first_says((self.folder / name).exists())

  def check_seen(self, name: str = _KEY) -> None:
    """Sees that this host has a file that the first process has there.

    Raises:
      UserError: it has not.
    """
    if not (self.folder / name).is_file():
      raise UserError(
        f"{self.setting}={self.folder}: {distributed.host_name()} does not see what process 0 has there; "
        "name a folder of a file system that all hosts share"
      )

  def write_key(self, key: Mapping[str, Any]) -> None:
    """Writes what the numbers depend on, as JSON values; for the first process."""
    self.folder.mkdir(parents=True, exist_ok=True)
    write_json(self.folder / _KEY, dict(key))

  def check(self, key: Mapping[str, Any]) -> None:
    """Sees that the numbers there depend on the same.

    Raises:
      UserError: they do not, or the file is damaged.
    """
    path = self.folder / _KEY
    try:
      stored = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
      raise UserError(f"{path}: damaged ({error}); {self.anew}") from None
    if not isinstance(stored, dict):
      raise UserError(f"{path}: damaged (no JSON object); {self.anew}")
    differing = [name for name in key if stored.get(name) != key[name]]
    if differing:
      name = differing[0]
      raise UserError(
        f"{self.folder}: these log-probabilities are of another {self.model}: {name} is {stored.get(name)} there and "
        f"{key[name]} here ({', '.join(differing)} differ); name another folder ({self.setting}), or "
        "delete this one to compute them anew"
      )


def checksum(params: Mapping[str, jax.Array], dtype: jnp.dtype) -> str:
  """A number of the parameters' contents in that dtype, as hex: the same for any sharding."""
  sums = {path: jax.device_get(_bit_sums(value, jnp.dtype(dtype))) for path, value in params.items()}
  text = json.dumps({path: [list(params[path].shape), *map(int, sums[path])] for path in sorted(params)})
  return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.partial(jax.jit, static_argnums=1)
def _bit_sums(value: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
  """Two sums over the bits, weighted by place, modulo 2^32: integers, which add up to the same in any order."""
  bits = jax.lax.bitcast_convert_type(value.astype(dtype), jnp.uint16 if dtype.itemsize == 2 else jnp.uint32)
  place, stride = jnp.zeros(value.shape, jnp.uint32), 1
  for axis in reversed(range(value.ndim)):
    place += jax.lax.broadcasted_iota(jnp.uint32, value.shape, axis) * jnp.uint32(stride % 2**32)
    stride *= value.shape[axis]
  bits = bits.astype(jnp.uint32) + jnp.uint32(1)
  # Odd factors, so that no place loses bits.
  factors = (2 * place + 1, (place * jnp.uint32(2654435761) ^ (place >> 16)) | 1)
  first, second = (jnp.sum(bits * factor, dtype=jnp.uint32) for factor in factors)
  return first, second
