"""The recordings of tests/assets/certify, made by scripts/record_certify.py and scripts/certify_record.py."""

import numpy as np

from internvl_jax.certify.recording import open_recording
from tests.support.toy import ASSETS, CURVE

RECORDINGS = ASSETS / "certify"
META = CURVE / "data/meta.json"


def opened(folder):
  return open_recording(str(folder))


def arrays_of(folder):
  """All arrays of a recording, by "file/array"; the manifest is a text."""
  found = {"manifest": np.array((folder / "manifest.json").read_text())}
  for path in sorted(folder.glob("*.npz")):
    with np.load(path) as file:
      found |= {f"{path.stem}/{name}": file[name] for name in file.files}
  return found


def with_fault(fault, folder):
  """Writes the recording with a fault: that without one, and what differs."""
  arrays = arrays_of(RECORDINGS / "transformers")
  with np.load(RECORDINGS / f"{fault.replace(' ', '_')}.npz") as file:
    arrays |= {name: file[name] for name in file.files}
  folder.mkdir()
  (folder / "manifest.json").write_text(str(arrays.pop("manifest")))
  for stem in {name.partition("/")[0] for name in arrays}:
    own = {name.partition("/")[2]: value for name, value in arrays.items() if name.startswith(f"{stem}/")}
    np.savez(folder / f"{stem}.npz", **own)
  return folder
