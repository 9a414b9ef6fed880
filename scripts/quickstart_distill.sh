#!/usr/bin/env bash
# Distills the quickstart's model into one of half its size, and trains that one on the labels alone to compare.
#
#   scripts/quickstart_distill.sh                              goes on from quickstart/, which it makes if need be
#   scripts/quickstart_distill.sh --config.training.seed=1     further flags go to both training commands
#   OUT=elsewhere PYTHON=python3.12 scripts/quickstart_distill.sh
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
echo "== the student's config"
"$python" scripts/quickstart_data.py --out "$out"
echo "== from the teacher"
"$python" -m internvl_jax.train --config "configs/quickstart_distill.py:$out" "$@"
echo "== from the labels alone"
"$python" -m internvl_jax.train --config "configs/quickstart_distill.py:$out" --config.distillation.weight=0 \
  --config.training.output_dir="$out/output_labels" "$@"
echo "== results"
"$python" - "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
for name, what in {"output": "the teacher", "output_distill": "distilled", "output_labels": "labels alone"}.items():
  print(f"held-out answers that match: {json.loads((out / name / 'eval_results.json').read_text())['accuracy']:.4f}, {what}")
PYTHON
