#!/usr/bin/env bash
# Trains under Slurm, one process on each GPU, or on CPUs.
#
#   tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments of tools/train.py]
#
# GPUS=4            GPUs, and so processes, of all nodes (default 4); 0 for CPUs
# GPUS_PER_NODE=4   GPUs of a node (default: GPUS, at most 8); GPUS must be a multiple of it
# TASKS=4           processes of a job on CPUs: GPUS=0 TASKS=4 tools/slurm_train.sh …
# CPUS_PER_TASK=5   cores of a process (default 5)
# PORT=29500        port of the first node (default: one that depends on the job's number)
# SRUN_ARGS='…'     more arguments of srun
# PYTHON=PATH       interpreter, as for tools/dist_train.sh
[ $# -ge 4 ] || { echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [arguments of tools/train.py]" >&2; exit 2; }
partition=$1 job=$2 config=$3 work_dir=$4
shift 4
exec bash "$(dirname "$(readlink -f "$0")")/_slurm.sh" "$partition" "$job" train.py "$config" --work-dir "$work_dir" "$@"
