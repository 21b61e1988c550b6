#!/usr/bin/env bash
# Trains on several GPUs of one or more machines; without CUDA, on as many CPU processes.
#
#   tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
#
# NNODES=2            machines (default 1). The same command runs on each of them, with
# NODE_RANK=0         its number, counting from 0,
# MASTER_ADDR=10.0.0.1  the address of machine 0,
# PORT=29500          and a free port of machine 0 (default 29500; with one machine, any free port)
# MAX_RESTARTS=3      after a process has ended in an error or was killed, start all of them again, at most so often (default
#                     0); they go on from the newest checkpoint that they have saved
# PYTHON=PATH         interpreter (default: the active environment's, then .venv's, then that of the PATH; the first that
#                     has torch and mmengine is taken, and a line says so if that is another than PYTHON's)
# OMP_NUM_THREADS=N   threads of each process on CPUs (default: the cores shared out among the processes)
[ $# -ge 2 ] || { echo "usage: $0 CONFIG GPUS [arguments of tools/train.py]" >&2; exit 2; }
config=$1 gpus=$2
shift 2
exec bash "$(dirname "$(readlink -f "$0")")/_launch.sh" "$gpus" train.py "$config" "$@"
