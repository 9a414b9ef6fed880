"""Facts that must be equal on all hosts of a run, beside its configuration and its data: programs and weights.

Facts are JSON values by the names that messages give them; see `parallel.agreement`.
"""

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from internvl_jax.hf.model import Source
from internvl_jax.storage.snapshots import url_of

PACKAGES = (
  *(
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
  ),
  *("transformers", "tokenizers", "safetensors", "pillow", "av"),
)
"""Distributions on which numbers depend: one host with another version would train without an error."""

WHOLE_BYTES = 1 << 26
"""Files of weights up to this size are read whole."""

SAMPLES, SAMPLE_BYTES = 64, 1 << 16
"""Of longer ones, so many parts of so many bytes are read: of 5 GB, one every 80 MB, in a few milliseconds."""


def programs() -> dict[str, Any]:
  """The versions of Python and of the packages that compute, and a digest of this package's own code."""
  facts: dict[str, Any] = {"the version of Python": platform.python_version()}
  for package in PACKAGES:
    try:
      facts[f"the version of {package}"] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      facts[f"the version of {package}"] = None
  folder, digest = Path(__file__).parent, hashlib.blake2b(digest_size=8)
  for path in sorted(folder.rglob("*.py")):
    digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
  return {**facts, "the code of internvl_jax": digest.hexdigest()}


def weights(source: Source) -> dict[str, Any]:
  """The config of a checkpoint, and of each of its files size and digest; no more than the config where none is read.

  A digest is of the header, which lists the tensors, and of the numbers: of all of a small file, of parts of
  a large one; of a file in a bucket, of size and checksum as the store knows them.

  Raises:
    OSError: a file cannot be read.
  """
  config = hashlib.blake2b(json.dumps(source.raw, sort_keys=True).encode(), digest_size=8).hexdigest()
  facts: dict[str, Any] = {"the model's config.json": config}
  if source.checkpoint is not None:
    for path in sorted(set(source.checkpoint.where.values())):
      folder = url_of(path.parent) or path.parent
      facts[f"the content of {folder.name}/{path.name}"] = _content(path)
  return facts


def _content(path: Path) -> str:
  size, digest = path.stat().st_size, hashlib.blake2b(digest_size=8)
  with path.open("rb") as file:
    if size <= WHOLE_BYTES:
      digest.update(file.read())
    else:
      header = int.from_bytes(file.read(8), "little")  # of safetensors
      digest.update(file.read(min(header, WHOLE_BYTES)))
      for sample in range(SAMPLES):
        file.seek(sample * (size - SAMPLE_BYTES) // (SAMPLES - 1))
        digest.update(file.read(SAMPLE_BYTES))
  return f"{digest.hexdigest()}, {size} bytes"
