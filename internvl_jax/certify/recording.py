"""Reads what `scripts/certify_record.py` wrote in a PyTorch environment; its docstring lists the arrays."""

import dataclasses
import functools
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from internvl_jax.errors import UserError

FORMAT = 1
"""The manifest's, of the recorder of this version."""

Arrays = Mapping[str, np.ndarray]


def recorder() -> Path:
  """The script that records: in the package, or of a checkout beside it."""
  package, name = Path(__file__).parent, "certify_record.py"
  packed = package / name
  return packed if packed.is_file() else package.parents[1] / "scripts" / name


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
  """A folder that the recorder wrote.

  Attributes:
    folder: where it is.
    manifest: its manifest.json.
  """

  folder: Path
  manifest: Mapping[str, Any]

  @functools.cached_property
  def samples(self) -> list[Arrays]:
    """The arrays of every sample."""
    return [self._arrays(f"sample-{number}") for number in range(len(self.manifest["samples"]))]

  @functools.cached_property
  def deep(self) -> list[int]:
    """Numbers of the samples with activations, which are the micro-batch and the segments of the packed row."""
    return [number for number, entry in enumerate(self.manifest["samples"]) if entry["deep"]]

  def activations(self, number: int) -> Arrays:
    """Norms and rows of every part of the model for a sample."""
    return self._arrays(f"activations-{number}")

  @functools.cached_property
  def gradients(self) -> Arrays | None:
    """Norms, sketches and some whole gradients; None where none are recorded."""
    return self._optional("gradients")

  @functools.cached_property
  def packed(self) -> Arrays | None:
    """The row of segments; None where none is recorded."""
    return self._optional("packed")

  @functools.cached_property
  def update(self) -> Arrays | None:
    """What one AdamW update adds to every parameter; None where none is recorded."""
    return self._optional("update")

  def why_absent(self, what: str) -> str:
    """Why the recorder left something out."""
    return self.manifest["skipped"].get(what, "the recording does not have it")

  def place(self, number: int) -> str:
    """The line that a sample is, for messages."""
    entry = self.manifest["samples"][number]
    return f"sample {number} ({entry['dataset']}, line {entry['line'] + 1})"

  def _optional(self, name: str) -> Arrays | None:
    return self._arrays(name) if (self.folder / f"{name}.npz").is_file() else None

  def _arrays(self, name: str) -> Arrays:
    path = self.folder / f"{name}.npz"
    try:
      with np.load(path, allow_pickle=False) as file:
        return dict(file)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
      raise UserError(f"{path}: cannot be read ({error}); record again, or copy the whole folder") from None


def open_recording(folder: str) -> Recording:
  """Opens what was recorded.

  Raises:
    UserError: it is no such folder, or of another version of the recorder.
  """
  path = Path(folder) / "manifest.json"
  if not path.is_file():
    raise UserError(
      f"--record={folder}: has no manifest.json; make one by certify_record.py (python -m internvl_jax.certify --recorder "
      "prints it)"
    )
  try:
    manifest = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{path}: not JSON ({error}); record again") from None
  if manifest.get("format") != FORMAT:
    raise UserError(
      f"{path}: is of format {manifest.get('format')!r}, this version reads {FORMAT}; record again by the script that "
      "--recorder prints"
    )
  return Recording(Path(folder), manifest)
