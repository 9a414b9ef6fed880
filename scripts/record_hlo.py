"""Records what the installed XLA writes about a small sharded program, for tests of what `plan` reads of it.

  python scripts/record_hlo.py cpu|v5e

Recordings of several versions lie in tests/assets/hlo; docs/upgrading.md says when to make one.
"""

import importlib.metadata
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")

import jax

from internvl_jax.aot.target import open_target
from tests.support import hlo


def main(kind: str) -> None:
  """Writes the files of a kind of device."""
  version = (
    f"libtpu{importlib.metadata.version('libtpu')}" if kind != "cpu" else f"jaxlib{jax.lib.__version__}"
  )
  folder = hlo.RECORDINGS / f"{kind}-{version}"
  folder.mkdir(parents=True, exist_ok=True)
  files = hlo.compiled(open_target("cpu:4" if kind == "cpu" else "v5e:2x2").devices)
  for name, text in files.items():
    if text:
      (folder / name).write_text(text.replace(f"{hlo.REPOSITORY}/", ""), encoding="utf-8")
  print(folder, hlo.facts(files))


if __name__ == "__main__":
  if sys.argv[1:] not in (["cpu"], ["v5e"]):
    sys.exit(__doc__)
  main(sys.argv[1])
