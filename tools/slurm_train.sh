#!/usr/bin/env bash
# Trains under Slurm, one process per GPU.
#
#   [GPUS=4] [GPUS_PER_NODE=4] [CPUS_PER_TASK=5] [SRUN_ARGS=…] tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments]
[ $# -ge 4 ] || { echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [arguments of tools/train.py]" >&2; exit 2; }
exec "$(dirname "${BASH_SOURCE[0]}")/_slurm.sh" "$1" "$2" train.py "$3" --work-dir "$4" "${@:5}"
