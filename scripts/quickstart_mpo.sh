#!/usr/bin/env bash
# Preference optimisation (MPO) of the quickstart's model: pairs, training, held-out pairs, answers.
#
#   scripts/quickstart_mpo.sh                                   goes on from quickstart/, which it makes if need be
#   scripts/quickstart_mpo.sh --config.preference.beta=0.2      further flags go to the training command
#   OUT=elsewhere PYTHON=python3.12 scripts/quickstart_mpo.sh
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
echo "== pairs"
"$python" scripts/quickstart_data.py --out "$out"
echo "== training"
"$python" -m internvl_jax.train --config "configs/quickstart_mpo.py:$out" "$@"
echo "== results"
"$python" - "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
before, after = (json.loads((out / name / "eval_results.json").read_text()) for name in ("output", "output_mpo"))
pairs = json.loads((out / "output_mpo" / "preference_results.json").read_text())
print(f"held-out pairs: rewards/accuracies {pairs['eval_rewards/accuracies']:.4f} of {pairs['eval_pairs']}")
print(f"held-out answers that match: {before['accuracy']:.4f} before, {after['accuracy']:.4f} after")
PYTHON
