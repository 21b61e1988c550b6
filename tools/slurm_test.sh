#!/usr/bin/env bash
# Evaluates a checkpoint under Slurm, one process per GPU.
#
#   [GPUS=4] [GPUS_PER_NODE=4] [CPUS_PER_TASK=5] [SRUN_ARGS=…] tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments]
[ $# -ge 4 ] || { echo "usage: $0 PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of tools/test.py]" >&2; exit 2; }
exec "$(dirname "${BASH_SOURCE[0]}")/_slurm.sh" "$1" "$2" test.py "$3" "$4" "${@:5}"
