#!/usr/bin/env bash
# The gate: lint, format, types, docs, tests. Runs from any folder, in an environment of its own (.venv).
#
#   scripts/test.sh                      everything
#   scripts/test.sh tests/test_x.py -x   everything, with these arguments for pytest
#   scripts/test.sh --slow               also the tests that take minutes, after the others
#   scripts/test.sh --parity             with PyTorch to compare with (the extra parity), in an environment of its own;
#                                        fails where tests would be skipped for want of it
#   PYTHON=python3.12 scripts/test.sh    makes the environment with that interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
venv=.venv extras=dev,quickstart
slow=
while [[ "${1:-}" == --parity || "${1:-}" == --slow ]]; do
  if [[ "$1" == --slow ]]; then
    slow=1
  else
    venv=.venv-parity extras=dev,quickstart,parity
    export INTERNVL_JAX_PARITY=1
  fi
  shift
done
wanted="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
# What is installed depends on the interpreter and on pyproject.toml alone: the package itself is installed in place.
stamp="$wanted $(cksum < pyproject.toml)"

if [[ "$(cat "$venv/stamp" 2>/dev/null || true)" != "$stamp" ]]; then
  echo "== installing into $venv (Python $wanted)"
  have="$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true)"
  if [[ "$have" != "$wanted" ]]; then
    "$python" -m venv --clear "$venv"
  fi
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$extras]"
  echo "$stamp" > "$venv/stamp"
fi
# Tools find their environment, and pre-commit its hooks' programs, on the path.
export PATH="$PWD/$venv/bin:$PATH"

echo "== ruff check"
ruff check .
echo "== ruff format"
ruff format --check .
# Each takes one processor for half a minute.
echo "== pyright and docs"
JAX_PLATFORMS=cpu sphinx-build -q -W --keep-going -b html docs docs/_build/html &
docs=$!
pyright --pythonpath "$venv/bin/python"
wait "$docs"
echo "== pytest"
pytest -q "$@"
if [[ -n "$slow" ]]; then
  echo "== pytest, what is slow"
  pytest -q -m "slow and not gpu and not cuda_aot" "$@"
fi
