#!/usr/bin/env bash
# Makes .venv with the pinned stack this project runs on. A second run only checks and takes a second.
#
#   tools/setup_env.sh                     the maintained forks (requirements/primary.txt) in .venv
#   tools/setup_env.sh --stack openmmlab   the upstream packages, on the same PyTorch, in .venv-openmmlab
#   tools/setup_env.sh --stack core        torch, torchvision and mmengine alone in .venv-core: backbone and memory
#
# PYTHON=/path/to/python3.11   the interpreter to make the environment with, 3.10 or newer
# TORCH_INDEX_URL=URL          a package index with another build of torch and torchvision, such as PyTorch's own of CPU
#                              builds, which need no GPU and save some 4 GB
# CXX=g++-12                   the C++ compiler for the memory's CPU kernels; without one the memory runs in PyTorch
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

case " $* " in
  *' openmmlab '*) venv="$here/../.venv-openmmlab" ;;
  *' core '*) venv="$here/../.venv-core" ;;
  *) venv="$here/../.venv" ;;
esac

supported() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }
if [ -n "${PYTHON:-}" ]; then
  candidates=("$PYTHON")
  problem="PYTHON=$PYTHON does not run or is older than Python 3.10"
else
  candidates=("$venv/bin/python" python3.11 python3.12 python3.13 python3.14 python3.10 python3 python)
  problem="no Python 3.10 or newer found"
fi
for candidate in "${candidates[@]}"; do
  # -I: neither PYTHONPATH nor the user's own packages take part.
  if supported "$candidate"; then exec "$candidate" -I "$here/setup/environment.py" "$@"; fi
done
echo "[setup] error: $problem. Install one (Debian, Ubuntu: apt-get install python3.11-full; conda:" \
  "conda create -n py311 python=3.11; uv: uv python install 3.11) and name it: PYTHON=/path/to/python3.11 $0" >&2
exit 1
