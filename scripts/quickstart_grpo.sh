#!/usr/bin/env bash
# Reinforcement (GRPO) of the quickstart's model, stopped early: training to about 80 %, rewards, picture.
#
#   scripts/quickstart_grpo.sh                                       goes on from quickstart/, which it makes if need be
#   scripts/quickstart_grpo.sh --config.grpo.num_generations=16      further flags go to the training command
#   OUT=elsewhere PYTHON=python3.12 scripts/quickstart_grpo.sh
#
# Run it again to go on where it was stopped, or to draw the picture of a finished run anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out="${OUT:-quickstart}"
python=.venv-quickstart/bin/python

if [[ ! -x "$python" || ! -f "$out/data/meta.json" ]]; then
  scripts/quickstart.sh
fi

export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
if [[ ! -f "$out/output_early/eval_results.json" ]]; then
  echo "== training, stopped early"
  "$python" -m internvl_jax.train --config "configs/quickstart.py:$out" \
    --config.training.max_steps=700 --config.training.output_dir="$out/output_early"
fi
echo "== reinforcement"
"$python" -m internvl_jax.train --config "configs/quickstart_grpo.py:$out" "$@"
echo "== picture"
"$python" scripts/quickstart_grpo_picture.py \
  --runs "$out/output_grpo" --before "$out/output_early" --picture "$out/output_grpo/grpo.png"
