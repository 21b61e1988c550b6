#!/usr/bin/env bash
# Starts a tool through torchrun: _launch.sh PROCESSES TOOL [arguments]. Called by dist_train.sh and dist_test.sh.
set -euo pipefail
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
processes=$1
case "$processes" in *[!0-9]* | '' | 0) echo "error: GPUS must be a positive number, got '$processes'" >&2; exit 2;; esac

source "$tools/_python.sh"
nnodes=${NNODES:-1}
if [ "$nnodes" = 1 ] && [ -z "${PORT:-}" ]; then
  # One machine: any free port does, so two runs beside each other do not collide.
  rendezvous=(--standalone)
else
  rendezvous=(--node_rank="${NODE_RANK:-0}" --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}")
fi
if [ -z "${OMP_NUM_THREADS:-}" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  # On CPUs the processes share the cores; torchrun alone would give each process one.
  cores=$(getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=$((cores > processes ? cores / processes : 1))
fi
exec "$python" -m torch.distributed.run --nnodes="$nnodes" --nproc_per_node="$processes" "${rendezvous[@]}" \
  "$tools/$2" "${@:3}" --launcher pytorch
