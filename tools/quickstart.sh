#!/usr/bin/env bash
# From a bare clone to a trained and tested model: makes the environment, generates a small data set, trains a light
# model with ConvNeur-m1 on it, tests the checkpoint, and leaves figures and pictures in work_dirs/.
#
#   tools/quickstart.sh [--task det|seg|cls|all] [--head cascade|rtmdet]
#       (default: det with Cascade R-CNN, into work_dirs/quickstart/)
set -euo pipefail
unset PYTHONPATH PYTHONHOME  # of another environment
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/tools/setup_env.sh"
exec "$root/.venv/bin/python" "$root/tools/quickstart.py" "$@"
