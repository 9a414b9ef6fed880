#!/usr/bin/env bash
# A Cloud TPU slice made with `gcloud compute tpus tpu-vm create` (or a queued resource): one process on each of its
# hosts, which find each other by themselves.
#
#   export TPU=my-slice ZONE=us-central2-b
#   scripts/launch/tpu_pod.sh setup                     installs this checkout on all hosts
#   scripts/launch/tpu_pod.sh start --config R.py --config.training.output_dir=gs://my-bucket/run1 ...
#                                                       starts training in the background, on all hosts
#   scripts/launch/tpu_pod.sh log                       follows the first host's log; `log N` host N's
#   scripts/launch/tpu_pod.sh stop                      asks the run to save and end
#
# PROJECT names another project than gcloud's own. The hosts share no disk: training.output_dir is in a bucket, and so may
# data and model be; the recipe is part of the checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

usage() {
  sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

: "${TPU:?set it to the name of the TPU}" "${ZONE:?set it to the zone of the TPU}"
place=("$TPU" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})

on() {  # on WORKER COMMAND
  gcloud compute tpus tpu-vm ssh "${place[@]}" --worker="$1" --command="$2"
}

case "${1:-}" in
  setup)
    archive="$(mktemp --suffix=.tar.gz)"
    trap 'rm -f "$archive"' EXIT
    git archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "${place[0]}:internvl_jax.tar.gz" "${place[@]:1}" --worker=all
    # venv is a package of its own on Ubuntu's images.
    on all 'set -e
      mkdir -p internvl_jax && tar -xzf internvl_jax.tar.gz -C internvl_jax
      python3 -m venv internvl_jax/.venv || { sudo apt-get install -y python3-venv && python3 -m venv internvl_jax/.venv; }
      internvl_jax/.venv/bin/pip install --quiet -e "internvl_jax[tpu,remote]"'
    ;;
  start)
    shift
    (($#)) || usage
    command="$(printf ' %q' "$@")"
    # A process that runs already holds the chips, and the new one would wait for them.
    on all "if [ -e internvl_jax/run.pid ] && kill -0 \$(cat internvl_jax/run.pid) 2>/dev/null; then
        echo 'a run is going on here: stop it first' >&2; exit 1
      fi
      cd internvl_jax
      nohup .venv/bin/python -m internvl_jax.train$command > run.log 2>&1 < /dev/null &
      echo \$! > run.pid"
    ;;
  log)
    on "${2:-0}" 'tail -n 50 -F internvl_jax/run.log'
    ;;
  stop)
    # One process that is told is enough for all; the others may have ended already.
    # shellcheck disable=SC2016  # Expanded on the hosts.
    on all 'kill -TERM $(cat internvl_jax/run.pid) 2>/dev/null || true'
    ;;
  *)
    usage
    ;;
esac
