#!/usr/bin/env bash
# Makes an InternVL3.5-Flash of the quickstart's model: larger pictures, the consistency stage, the router stage, and what
# its answers are worth with no tile compressed, with all, and with those that its router chooses.
#
#   scripts/quickstart_flash.sh                        goes on from quickstart/, which it makes if need be
#   OUT=elsewhere PYTHON=python3.12 scripts/quickstart_flash.sh
#
# Run it again to go on where it was stopped, or to see the results of a finished run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out="${OUT:-quickstart}"
python=.venv-quickstart/bin/python

if [[ ! -x "$python" || ! -f "$out/output/model.safetensors" ]]; then
  scripts/quickstart.sh
fi

export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
for stage in tiles consistency router; do
  echo "== $stage"
  "$python" -m internvl_jax.train --config "configs/quickstart_flash.py:$out,$stage" "$@"
done
for compress in none all auto; do
  folder="$out/output_router/compress_$compress"
  if [[ ! -f "$folder/eval_results.json" ]]; then
    echo "== answers, compressed tiles: $compress"
    "$python" -m internvl_jax.evaluate --model "$out/output_router" --annotation "$out/data/test.jsonl" \
      --root "$out/data/images" --batch_size 128 --max_new_tokens 2 --compress "$compress" --output "$folder"
  fi
done
echo "== results"
"$python" - "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
before = json.loads((out / "output_tiles" / "eval_results.json").read_text())
print(f"before, no tile compressed: {before['accuracy']:.4f}")
for compress in ("none", "all", "auto"):
  found = json.loads((out / "output_router" / f"compress_{compress}" / "eval_results.json").read_text())
  saved = found.get("image_tokens_saved", 0.0)
  print(f"--compress {compress}: {found['accuracy']:.4f}, {saved:.1%} fewer image tokens")
PYTHON
