#!/usr/bin/env bash
# Makes .venv with the pinned stack this project runs on. A second run only checks and takes a second.
#
#   tools/setup_env.sh                     the maintained forks (requirements/primary.txt) in .venv
#   tools/setup_env.sh --stack openmmlab   the upstream packages (requirements/openmmlab.txt) in .venv-openmmlab
#
# PYTHON=/path/to/python3.11   the interpreter to use (3.10, 3.11 or 3.12)
# CONVNEUR_CACHE=DIR           where compiled mmcv wheels are kept (default ~/.cache/convneur_mm)
# FORCE_CUDA=1                 compile mmcv's CUDA operators although no GPU is visible here
# MAX_JOBS=N                   parallel compiler processes (default: cores, at most one for each 2 GiB of memory)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache="${CONVNEUR_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/convneur_mm}"

say() { printf '[setup] %s\n' "$*"; }
die() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }
minutes() { printf '%d:%02d min' $(($1 / 60)) $(($1 % 60)); }

stack=primary
if [ "${1:-}" = --stack ]; then
  stack=${2:-}
  shift $(($# < 2 ? $# : 2))
fi
[ $# -eq 0 ] || die "unknown argument '$1': expected nothing, or --stack primary|openmmlab"
case "$stack" in
  primary) venv="$root/.venv" ;;
  openmmlab) venv="$root/.venv-openmmlab" ;;
  *) die "--stack must be primary or openmmlab, got '$stack'" ;;
esac
requirements="$root/requirements/$stack.txt"

# Whatever changes what is installed is part of the stamp: the requirement files, this script, setup.py, what it compiles.
stamp="$venv/.convneur_mm-$(cat "$root"/requirements/{build,tests}.txt "$requirements" "$root/setup.py" \
  "$root"/convneur_mm/ops/neural_memory/csrc/* "${BASH_SOURCE[0]}" | cksum | cut -d' ' -f1)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$root" ]; then
  say "environment is up to date: $venv"
  exit 0
fi

# ---- what is needed, checked before anything is downloaded
supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; }
python=
if [ -n "${PYTHON:-}" ]; then
  supported "$PYTHON" || die "PYTHON=$PYTHON does not run, or is not Python 3.10, 3.11 or 3.12"
  python=$PYTHON
else
  for candidate in python3.11 python3.12 python3.10 python3; do
    if supported "$candidate"; then python=$candidate; break; fi
  done
  [ -n "$python" ] || die "no Python 3.10, 3.11 or 3.12 found; install one or name it: PYTHON=/path/to/python3.11 $0"
fi
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  die "$python has no venv/ensurepip module; on Debian and Ubuntu: apt-get install python3-venv"
"$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
  die "$python has no header files (Python.h), which compiling mmcv needs; on Debian and Ubuntu: apt-get install python3-dev"
compiler="${CXX:-}"
if [ -z "$compiler" ]; then
  for candidate in g++ c++ clang++; do
    if command -v "$candidate" >/dev/null; then compiler=$candidate; break; fi
  done
fi
command -v "$compiler" >/dev/null || die "no C++ compiler found (g++, c++ or clang++), which compiling mmcv needs; on Debian and Ubuntu: apt-get install g++"
free_gb=$(($(df -Pk "$root" | awk 'NR==2 {print $4}') / 1048576))
[ "$free_gb" -ge 10 ] || die "10 GB of free disk are needed in $root, found $free_gb GB"

started=$SECONDS
say "Python: $("$python" -c 'import platform, sys; print(platform.python_version(), sys.executable)')"
say "compiler: $compiler; free disk: $free_gb GB; environment: $venv"

# ---- the environment and torch
rm -f "$venv"/.convneur_mm-*
[ -x "$venv/bin/python" ] && supported "$venv/bin/python" || { rm -rf "$venv"; "$python" -m venv "$venv"; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
say "1/4 torch and the build tools (several GB to download the first time; a few minutes)"
pip install --quiet -r "$root/requirements/build.txt" $(grep -E '^(torch|torchvision|numpy|setuptools)[=<>]' "$requirements")

# ---- mmcv, compiled once for this Python, this torch and this kind of device
# pip's own wheel cache does not know the torch version, so the wheel goes to a folder keyed by it.
mmcv=$(grep -E '^(onedl-)?mmcv==' "$requirements")
key=$("$venv/bin/python" - <<'PY'
import os, sys, sysconfig, torch
cuda = torch.version.cuda and (torch.cuda.is_available() or os.environ.get('FORCE_CUDA') == '1')
device = 'cu' + torch.version.cuda if cuda else 'cpu'
print(f'cp{sys.version_info[0]}{sys.version_info[1]}-torch{torch.__version__.split("+")[0]}-{device}-{sysconfig.get_platform()}')
PY
)
wheels="$cache/wheels/$key"
wheel() { ls "$wheels/$(tr - _ <<<"${mmcv%%==*}")-${mmcv##*==}"-*.whl 2>/dev/null | head -n 1; }
if [ -n "$(wheel)" ]; then
  say "2/4 mmcv: reusing $(wheel)"
else
  case "$key" in *-cu*) command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] ||
    die "a CUDA GPU is visible but no CUDA compiler (nvcc) was found, which mmcv's operators need: install the CUDA toolkit or set CUDA_HOME";; esac
  mkdir -p "$wheels"
  build=$(mktemp -d "$wheels/build.XXXXXX")
  trap 'rm -rf "$build"' EXIT
  log="$wheels/mmcv-build.log"
  cores=$(getconf _NPROCESSORS_ONLN)
  memory_gb=$(awk '/MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo 2>/dev/null || echo 8)
  jobs=${MAX_JOBS:-$((cores < memory_gb / 2 ? cores : (memory_gb > 3 ? memory_gb / 2 : 1)))}
  say "2/4 mmcv: compiling $mmcv for $key, $jobs job(s); ten to fifteen minutes on two cores, once; log: $log"
  begun=$SECONDS
  MMCV_WITH_OPS=1 MAX_JOBS=$jobs PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 PATH="$venv/bin:$PATH" \
    "$venv/bin/python" -m pip wheel --verbose --no-cache-dir --no-build-isolation --no-deps --no-binary "${mmcv%%==*}" \
    --wheel-dir "$build" "$mmcv" >"$log" 2>&1 &
  job=$!
  while kill -0 $job 2>/dev/null; do
    sleep 1
    elapsed=$((SECONDS - begun))
    [ $((elapsed % 30)) -eq 0 ] || continue
    step=$(grep -aoE '\[[0-9]+/[0-9]+\]' "$log" | tail -n 1 | tr -d '[]' || true)
    if [ -n "$step" ] && [ "${step%/*}" -gt 0 ]; then
      eta=$((elapsed * (${step#*/} - ${step%/*}) / ${step%/*}))
      say "    $(minutes $elapsed) elapsed, file $step, about $(minutes $eta) left"
    else
      say "    $(minutes $elapsed) elapsed"
    fi
  done
  wait $job || { tail -n 25 "$log" >&2; die "compiling mmcv failed; the whole log: $log"; }
  mv "$build"/*.whl "$wheels/"
  [ -n "$(wheel)" ] || die "the build left no $mmcv wheel in $wheels; log: $log"
  say "    compiled in $(minutes $((SECONDS - begun)))"
fi
pip install --quiet --force-reinstall --no-deps "$(wheel)"

say "3/4 mmengine, mmdet, mmseg, mmpretrain and the test tools (a minute or two)"
pip install --quiet --no-build-isolation -r "$requirements" -r "$root/requirements/tests.txt"

say "4/4 convneur_mm, editable; its CPU kernels take a minute to compile"
CXX=$compiler pip install --quiet --no-build-isolation --no-deps -e "$root"
# They are an extra: a compiler that cannot do them (clang without OpenMP, say) must not cost the environment.
"$venv/bin/python" -W ignore -c 'import sys; from convneur_mm.ops.neural_memory import cpu; sys.exit(cpu.kernels is None)' ||
  say "    they did not compile, so the memory is slower on a CPU; why: CXX=$compiler $venv/bin/python -m pip install -v --no-build-isolation --no-deps -e $root"
# OpenCV's import is what a bare machine most often fails at (libGL), so look before anything long starts.
"$venv/bin/python" -c 'import cv2' 2>"$venv/import.log" || {
  tail -n 1 "$venv/import.log" >&2
  die "OpenCV does not import; on Debian and Ubuntu: apt-get install libgl1 libglib2.0-0"
}
(cd / && "$venv/bin/python" -W ignore -c 'import convneur_mm, mmcv.ops, mmdet.models, mmseg.models, mmpretrain.models') ||
  die "the environment does not import; see the message above"
printf '%s' "$root" >"$stamp"
say "done in $(minutes $((SECONDS - started))): $venv"
