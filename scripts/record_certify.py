"""Records the assets of tests/certify: a recording of transformers' InternVL, and of it with each fault of tests/support/planted.

  python scripts/record_certify.py --output tests/assets/certify

Needs the extra `parity`. The checkpoint is tests/assets/curve/init in the hf layout. Of a fault only the arrays are kept that
differ from those of the recording without one. The recording of the reference's own code, beside them, was made in its
environment, by scripts/certify_record.py with `--samples 2 --full_below 64 --use_fast_tokenizer`.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))


def main(argv=None):
  from internvl_jax.conversion import convert
  from internvl_jax.hf.model_config import HF
  from tests.certify.recorded import arrays_of
  from tests.support import planted
  from tests.support.toy import CURVE

  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--output", required=True)
  output = Path(parser.parse_args(argv).output)
  with tempfile.TemporaryDirectory() as scratch:
    model = Path(scratch) / "hf"
    convert(str(CURVE / "init"), model, HF, lora="merge")
    for fault in (None, *planted.FAULTS):
      name = (fault or "transformers").replace(" ", "_")
      folder = Path(scratch) / name
      planted.record(folder, model, CURVE / "data/meta.json", fault)
      manifest = json.loads((folder / "manifest.json").read_text())
      manifest["model"] = "hf"
      (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
      if fault is None:
        shutil.copytree(folder, output / name, dirs_exist_ok=True)
        clean = arrays_of(folder)
      else:
        differing = {
          key: value
          for key, value in arrays_of(folder).items()
          if key not in clean or not np.array_equal(clean[key], value)
        }
        np.savez_compressed(output / f"{name}.npz", **differing)


if __name__ == "__main__":
  main()
