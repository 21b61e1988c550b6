#!/usr/bin/env bash
# From a bare clone to a trained and tested detector: makes the environment, generates a small data set, trains a light
# Cascade Mask R-CNN with ConvNeur-m1 on it, tests the checkpoint, and leaves figures and pictures in
# work_dirs/quickstart/.
#
#   tools/quickstart.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/tools/setup_env.sh"
exec "$root/.venv/bin/python" "$root/tools/quickstart.py" "$@"
