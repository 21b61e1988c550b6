#!/usr/bin/env bash
# Evaluates a checkpoint on several GPUs of one or more machines; without CUDA, on as many CPU processes.
#
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py]
#
# NNODES, NODE_RANK, MASTER_ADDR, PORT, PYTHON, OMP_NUM_THREADS: as for tools/dist_train.sh.
[ $# -ge 3 ] || { echo "usage: $0 CONFIG CHECKPOINT GPUS [arguments of tools/test.py]" >&2; exit 2; }
config=$1 checkpoint=$2 gpus=$3
shift 3
exec bash "$(dirname "$(readlink -f "$0")")/_launch.sh" "$gpus" test.py "$config" "$checkpoint" "$@"
