#!/usr/bin/env bash
# Evaluates a checkpoint under Slurm, one process on each GPU, or on CPUs.
#
#   tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of tools/test.py]
#
# GPUS, GPUS_PER_NODE, TASKS, CPUS_PER_TASK, PORT, SRUN_ARGS, PYTHON: as for tools/slurm_train.sh.
[ $# -ge 4 ] || { echo "usage: $0 PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of tools/test.py]" >&2; exit 2; }
partition=$1 job=$2 config=$3 checkpoint=$4
shift 4
exec bash "$(dirname "$(readlink -f "$0")")/_slurm.sh" "$partition" "$job" test.py "$config" "$checkpoint" "$@"
