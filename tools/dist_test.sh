#!/usr/bin/env bash
# Evaluates a checkpoint on several GPUs of one or more machines; without CUDA, on as many CPU processes.
#
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py]
#
# NNODES, NODE_RANK, MASTER_ADDR, PORT and PYTHON: as for tools/dist_train.sh.
[ $# -ge 3 ] || { echo "usage: $0 CONFIG CHECKPOINT GPUS [arguments of tools/test.py]" >&2; exit 2; }
exec "$(dirname "${BASH_SOURCE[0]}")/_launch.sh" "$3" test.py "$1" "$2" "${@:4}"
