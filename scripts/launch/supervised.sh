#!/usr/bin/env bash
# One process of a run under a scheduler that starts again what fails: ends as the run does, with 0 only once the model is
# there, and with 75 where the run was told to stop.
#
#   scripts/launch/supervised.sh --config my_recipe.py [--config.leaf.field=value ...]
#
# As a container's first process it passes SIGTERM on, which a plain shell does not.
set -uo pipefail

python="${PYTHON:-python}"
"$python" -m internvl_jax.train "$@" &
pid="$!"
trap 'kill -TERM "$pid" 2>/dev/null || true' TERM INT

# A signal interrupts `wait`, so it is waited for again, until the process has really ended.
code=0
wait "$pid" || code="$?"
while kill -0 "$pid" 2>/dev/null; do
  code=0
  wait "$pid" || code="$?"
done
exit "$code"
