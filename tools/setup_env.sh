#!/usr/bin/env bash
# Makes .venv with the pinned stack this project runs on. A second run only checks and takes a second.
#
#   tools/setup_env.sh                     the maintained forks (requirements/primary.txt) in .venv, Python 3.10 to 3.13
#   tools/setup_env.sh --stack openmmlab   the upstream packages in .venv-openmmlab, Python 3.10 or 3.11
#   tools/setup_env.sh --stack core        torch, torchvision and mmengine alone in .venv-core: backbone and memory
#
# PYTHON=/path/to/python3.11   the interpreter to make the environment with
# TORCH_INDEX_URL=URL          a package index with another build of torch and torchvision, such as PyTorch's own of CPU
#                              builds, which need no GPU and save some 4 GB
# CONVNEUR_CACHE=DIR           where compiled mmcv wheels are kept (default ~/.cache/convneur_mm)
# FORCE_CUDA=1                 compile mmcv's CUDA operators although no GPU is visible here (a login node), …
# TORCH_CUDA_ARCH_LIST="8.0;9.0"  … for these GPUs (default: those that are visible)
# CXX=g++-12, MAX_JOBS=N       C++ compiler, and how many run at once (default: a core each, 3 GiB of memory each)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

stack=primary newest=13 range='3.10 to 3.13'
case " $* " in
  *' openmmlab '*) stack=openmmlab newest=11 range='3.10 or 3.11' ;;
  *' core '*) stack=core ;;
esac
[ "$stack" = primary ] && venv="$here/../.venv" || venv="$here/../.venv-$stack"

supported() { "$1" -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, $newest))" >/dev/null 2>&1; }
if [ -n "${PYTHON:-}" ]; then
  candidates=("$PYTHON")
  problem="PYTHON=$PYTHON does not run or is not Python $range"
else
  candidates=("$venv/bin/python" python3.11 python3.12 python3.13 python3.10 python3 python)
  problem="no Python $range found"
fi
for candidate in "${candidates[@]}"; do
  # -I: neither PYTHONPATH nor the user's own packages take part.
  if supported "$candidate"; then exec "$candidate" -I "$here/setup/environment.py" "$@"; fi
done
echo "[setup] error: $problem. Install one (Debian, Ubuntu: apt-get install python3.11-full python3.11-dev; conda:" \
  "conda create -n py311 python=3.11; uv: uv python install 3.11) and name it: PYTHON=/path/to/python3.11 $0" >&2
exit 1
