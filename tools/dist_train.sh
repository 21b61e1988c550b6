#!/usr/bin/env bash
# Trains on several GPUs of one or more machines; without CUDA, on as many CPU processes.
#
#   tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
#
# Several machines: NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 PORT=29500 tools/dist_train.sh … on each, NODE_RANK counting.
# PYTHON=… names the interpreter (default: the active environment's, else .venv's).
[ $# -ge 2 ] || { echo "usage: $0 CONFIG GPUS [arguments of tools/train.py]" >&2; exit 2; }
exec "$(dirname "${BASH_SOURCE[0]}")/_launch.sh" "$2" train.py "$1" "${@:3}"
