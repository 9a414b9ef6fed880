#!/usr/bin/env bash
# Installs the wheel in an environment that has nothing else, and trains the quickstart's first steps in an empty folder.
#
#   scripts/test_wheel.sh                      takes a few minutes, most of them to install
#   PYTHON=python3.12 scripts/test_wheel.sh    with that interpreter
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
version="$("$python" -c 'import sys; print("%d%d" % sys.version_info[:2])')"
constraints="$root/constraints/py$version.txt"

"$python" -m venv "$folder/alone"
alone="$folder/alone/bin/python"
"$alone" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$folder" "$root"
wheel="$(echo "$folder"/*.whl)"
"$alone" -m pip install --quiet --disable-pip-version-check -c "$constraints" "$wheel[quickstart]"

# Data of the quickstart: the script alone comes from the checkout.
cp "$root/scripts/quickstart_data.py" "$folder"
cd "$folder"
unset PYTHONPATH
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
"$alone" quickstart_data.py --out quickstart
"$alone" -c 'import internvl_jax, sys; sys.exit(not internvl_jax.__file__.startswith(sys.prefix))'
"$alone" -m internvl_jax.train --config internvl2_5/finetune:8b,lora --print_config | grep -F "* model.use_llm_lora = 16"
"$alone" -m internvl_jax.train --config quickstart --config.training.max_steps=3 --config.eval.limit=8 \
  --config.training.report_to=none
test -f quickstart/output/model.safetensors
echo "the wheel stands alone"
