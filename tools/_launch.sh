#!/usr/bin/env bash
# Starts a tool through torchrun: _launch.sh PROCESSES TOOL [arguments]. Called by dist_train.sh and dist_test.sh, whose
# headers describe the variables.
set -euo pipefail
tools=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
source "$tools/_checks.sh"

processes=$1
nodes=${NNODES:-1}
check_number GPUS "$processes" 1
check_number NNODES "$nodes" 1
check_number MAX_RESTARTS "${MAX_RESTARTS:-0}" 0
[ -z "${PORT:-}" ] || check_number PORT "$PORT" 1 65535
if [ "$nodes" -gt 1 ]; then
  # With defaults each machine would take itself for the first one and wait for the others.
  [ -n "${NODE_RANK:-}" ] || die "NNODES=$nodes needs NODE_RANK: 0 on the first machine, then counting"
  [ -n "${MASTER_ADDR:-}" ] || die "NNODES=$nodes needs MASTER_ADDR: the address of the machine of NODE_RANK 0"
fi
check_number NODE_RANK "${NODE_RANK:-0}" 0 $((nodes - 1))

if [ "$nodes" = 1 ] && [ -z "${PORT:-}" ]; then
  # One machine: any free port does, so two runs beside each other do not collide. By default the processes would look
  # for each other under the host's full name, which may not resolve.
  rendezvous=(--standalone --local-addr=127.0.0.1)
else
  rendezvous=(--node-rank="${NODE_RANK:-0}" --master-addr="${MASTER_ADDR:-127.0.0.1}" --master-port="${PORT:-29500}")
fi
source "$tools/_python.sh"
exec "$python" "$tools/_torchrun.py" --nnodes="$nodes" --nproc-per-node="$processes" "${rendezvous[@]}" \
  --max-restarts="${MAX_RESTARTS:-0}" --monitor-interval=0.1 "$tools/$2" "${@:3}" --launcher pytorch
