#!/usr/bin/env bash
# Starts a tool through srun: _slurm.sh PARTITION JOB_NAME TOOL [arguments]. Called by slurm_train.sh and slurm_test.sh,
# whose headers describe the variables.
set -euo pipefail
tools=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
source "$tools/_checks.sh"

gpus=${GPUS:-4}
cpus=${CPUS_PER_TASK:-5}
check_number GPUS "$gpus" 0
check_number CPUS_PER_TASK "$cpus" 1
if [ "$gpus" = 0 ]; then
  [ -n "${TASKS:-}" ] || die "GPUS=0 needs TASKS: the number of CPU processes"
  [ -z "${GPUS_PER_NODE:-}" ] || die "GPUS=0 and GPUS_PER_NODE=$GPUS_PER_NODE contradict each other"
  check_number TASKS "$TASKS" 1
  resources=(--ntasks="$TASKS")
else
  [ -z "${TASKS:-}" ] || die "TASKS is for jobs on CPUs, with GPUS=0; with GPUS=$gpus there is one process for each GPU"
  per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
  check_number GPUS_PER_NODE "$per_node" 1
  [ $((gpus % per_node)) = 0 ] || die "GPUS must be a multiple of GPUS_PER_NODE, got $gpus and $per_node"
  resources=(--gres="gpu:$per_node" --ntasks="$gpus" --ntasks-per-node="$per_node")
fi
if [ -n "${PORT:-}" ]; then
  check_number PORT "$PORT" 1 65535
  export MASTER_PORT=$PORT
fi
command -v srun >/dev/null || die "srun was not found, so this machine has no Slurm: use tools/dist_*.sh"
source "$tools/_python.sh"
# shellcheck disable=SC2086  # SRUN_ARGS is a list of arguments
exec srun -p "$1" --job-name="$2" "${resources[@]}" --cpus-per-task="$cpus" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
  "$python" -u "$tools/$3" "${@:4}" --launcher slurm
