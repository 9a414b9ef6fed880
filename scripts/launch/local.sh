#!/usr/bin/env bash
# Several processes on this machine, as several hosts would run: to try things out, or one process for each GPU.
#
#   scripts/launch/local.sh 2 --config my_recipe.py [--config.leaf.field=value ...]
#
# GPUs that CUDA_VISIBLE_DEVICES names are shared out evenly. On CPUs, JAX_NUM_CPU_DEVICES sets the devices of each
# process. Logs of all but the first go to $LOG_DIR (launch_logs). Ctrl-C and SIGTERM reach all processes. Ends
# with 0 if all did, with 75 if they were told to stop, else with 1.
set -euo pipefail

if [[ $# -lt 2 || ! "$1" =~ ^[1-9][0-9]*$ ]]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
processes="$1"
shift

logs="${LOG_DIR:-launch_logs}"
mkdir -p "$logs"
python="${PYTHON:-python}"
port="${MASTER_PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}"

pids=()
for ((rank = 0; rank < processes; rank++)); do
  export MASTER_ADDR=127.0.0.1 MASTER_PORT="$port" WORLD_SIZE="$processes" RANK="$rank"
  export LOCAL_WORLD_SIZE="$processes" LOCAL_RANK="$rank"
  if ((rank == 0)); then
    "$python" -m internvl_jax.train "$@" &
  else
    "$python" -m internvl_jax.train "$@" > "$logs/process$rank.log" 2>&1 &
  fi
  pids+=("$!")
done

# A signal interrupts `wait`, so it is waited for again, until a process has really ended.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
status=0
for rank in "${!pids[@]}"; do
  pid="${pids[rank]}"
  code=0
  wait "$pid" || code=$?
  while kill -0 "$pid" 2>/dev/null; do
    code=0
    wait "$pid" || code=$?
  done
  if ((code == 75)); then
    status=$((status ? status : 75))
  elif ((code != 0)); then
    echo "process $rank ended with exit code $code; see $logs" >&2
    status=1
  fi
done
exit "$status"
