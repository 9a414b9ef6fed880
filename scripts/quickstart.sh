#!/usr/bin/env bash
# Trains a small InternVL from scratch on easy-VQA and scores it: data, training, answers, picture.
#
#   scripts/quickstart.sh                                  writes below quickstart/
#   scripts/quickstart.sh --config.training.seed=1         further flags go to the training command
#   OUT=elsewhere PYTHON=python3.12 scripts/quickstart.sh
#
# Run it again to go on where it was stopped, or to draw the picture of a finished run anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
venv=.venv-quickstart
out="${OUT:-quickstart}"
stamp="$("$python" -V) $(cksum < pyproject.toml)"

if [[ "$(cat "$venv/stamp" 2>/dev/null || true)" != "$stamp" ]]; then
  echo "== installing into $venv"
  "$python" -m venv --clear "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[quickstart]'
  echo "$stamp" > "$venv/stamp"
fi

# Small matrices on a CPU: an accelerator would be idle, and its start-up is slower than the run.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
echo "== data"
"$venv/bin/python" scripts/quickstart_data.py --out "$out"
echo "== training"
"$venv/bin/python" -m internvl_jax.train --config "configs/quickstart.py:$out" "$@"
echo "== picture"
"$venv/bin/python" scripts/quickstart_picture.py --out "$out"
