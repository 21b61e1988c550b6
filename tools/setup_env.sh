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
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { echo "[setup] $*"; }
fail() { echo "[setup] error: $*" >&2; exit 1; }
minutes() { printf '%d:%02d min' $(($1 / 60)) $(($1 % 60)); }

stack=primary
if [ "${1:-}" = --stack ]; then stack=${2:-}; elif [ $# != 0 ]; then fail "unknown argument $1; $0 takes --stack"; fi
tests=tests_all.txt modules='convneur_mm, mmcv.ops, mmdet.models, mmseg.models, mmpretrain.models'
case $stack in
  primary) venv=$root/.venv ;;
  openmmlab) venv=$root/.venv-openmmlab ;;
  core) venv=$root/.venv-core tests=tests.txt modules=convneur_mm.models ;;
  *) fail "--stack must be primary, openmmlab or core, got '$stack'" ;;
esac
files=("$root/requirements/$stack.txt" "$root/requirements/$tests" "$root/requirements/build.txt")
lock=$root/requirements/versions.lock
stamp=$venv/.convneur_mm.json  # says that the folder is ours and, once all is done, what it was made from
# Settings of another environment would lead pip or Python elsewhere.
unset PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT VIRTUAL_ENV CONDA_PREFIX __PYVENV_LAUNCHER__
export PYTHONNOUSERSITE=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# Prints the version of an interpreter; fails where it does not run or is too old.
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
python='' found=''
for candidate in ${PYTHON:+"$PYTHON"} "$venv/bin/python" python3.{11,12,13,14,10} python3 python; do
  if found=$(version "$candidate"); then python=$candidate; break; fi
  [ -z "${PYTHON:-}" ] || fail "PYTHON=$PYTHON does not run or is older than Python 3.10"
done
[ -n "$python" ] || fail "no Python 3.10 or newer found. Install one (Debian, Ubuntu: apt-get install python3.11-full;" \
  "conda: conda create -n py311 python=3.11; uv: uv python install 3.11) and name it: PYTHON=/path/to/python3.11 $0"

# A digest of all that decides what is installed: files, Python's version, and where the checkout is.
inputs() { { echo "$root $found"; cat "$root"/requirements/* "$root"/{setup.py,pyproject.toml} "$root/tools/setup_env.sh" \
  "$root"/convneur_mm/ops/neural_memory/csrc/*; } | sha256sum; }
up_to_date() {
  local made='' index=''
  { read -r made; read -r index; } 2>/dev/null < "$stamp" || true
  [ "$made" = "$(inputs)" ] && [ "${TORCH_INDEX_URL:-$index}" = "$index" ]
}

# Runs a command with its output in a log, which is shown where the command fails. All that it has started ends with this.
child='' kernels=''
end_children() {
  local group
  for group in $child $kernels; do kill -- -"$group" 2>/dev/null || true; done
}
trap end_children EXIT
trap "echo '[setup] interrupted; the same command goes on from here' >&2; exit 130" INT TERM HUP
run() {
  local log="$venv/setup/$1.log" begun=$SECONDS shown=$SECONDS
  shift
  mkdir -p "$venv/setup"
  set -m  # in a process group of its own
  "$@" > "$log" 2>&1 < /dev/null & child=$!
  set +m
  while kill -0 "$child" 2>/dev/null; do
    sleep 0.2
    ((SECONDS - shown < 30)) || { shown=$SECONDS; say "    $(minutes $((SECONDS - begun))) elapsed," \
      "$(grep -E '^ *(Collecting|Downloading|Building|Preparing|Installing)' "$log" | tail -n 1 | cut -c 1-100)"; }
  done
  wait "$child" || { tail -n 25 "$log" >&2; fail "the command above failed; its whole output: $log"; }
  child=''
}
install() { run "$1" "$venv/bin/python" -m pip install -c "$lock" "${@:2}"; }
# Runs code in the environment, away from this folder; prints the last line of what went wrong.
try() { (cd / && "$venv/bin/python" -W ignore -c "$1" 2>&1 >/dev/null | tail -n 1; exit "${PIPESTATUS[0]}"); }

up_to_date && { say "environment is up to date: $venv"; exit; }
exec 9> "$venv.lock"
flock -n 9 || { say "another set-up is at work on $venv; waiting for it"; flock 9; }
up_to_date && { say "environment is up to date: $venv"; exit; }

if [ -n "$(ls -A "$venv" 2>/dev/null)" ]; then
  [ -e "$stamp" ] || fail "$venv exists and was not made by this script: move it away"
  made_with=$(version "$venv/bin/python" || true)
  [ "${made_with:-$found}" = "$found" ] || fail "$venv was made with Python $made_with, but PYTHON is $found ($python):" \
    'unset PYTHON to keep the environment, or delete the folder'
else
  "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python has no venv and ensurepip modules; on Debian and" \
    'Ubuntu: apt-get install python3-venv'
  needed=13
  [ -z "${TORCH_INDEX_URL:-}" ] || needed=4  # the builds of the default index carry CUDA's libraries
  free=$(($(df -Pk "$root" | awk 'NR == 2 {print $4}') / 1048576))
  ((free >= needed)) || fail "$needed GB of free disk are needed for the environment, pip's cache (PIP_CACHE_DIR) and" \
    "temporary files (TMPDIR); $root has $free GB"
fi
compiler=$(command -v ${CXX:+"${CXX%% *}"} g++ c++ clang++ | head -n 1 || true)
[ -z "$compiler" ] || export CXX="${CXX:-$compiler}"
say "Python $found: $(command -v "$python"); compiler: ${compiler:-none, so the memory runs in PyTorch}"
say "environment: $venv"

say '1/3 virtual environment'
mkdir -p "$venv"
: > "$stamp"
base=$("$python" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))')
[ -x "$venv/bin/pip" ] || run venv "$base" -m venv "$venv"

say '2/3 PyTorch and the other packages; several GB to download the first time'
if [ -n "${TORCH_INDEX_URL:-}" ]; then
  # From this index alone: beside another one pip would be free to take the other build.
  mapfile -t pins < <(grep -E '^torch(vision)?==' "$lock")
  install torch_index --force-reinstall --no-deps --index-url "$TORCH_INDEX_URL" "${pins[@]}"
fi
install torch torch torchvision -r "$root/requirements/build.txt"
if [ -n "$compiler" ]; then
  # The CPU kernels take a minute or two to compile and need PyTorch alone, so the other packages install meanwhile.
  set -m
  (cd "$root" && exec "$venv/bin/python" setup.py build_ext --inplace --build-temp "$venv/setup/kernels") \
    > "$venv/setup/kernels.log" 2>&1 < /dev/null & kernels=$!
  set +m
fi
# pip's cache may hold an mmcv that was compiled, for another torch.
mmcv=$(grep -oE '^[a-z-]*mmcv[a-z-]*==\S+' "${files[0]}" || true)
[ -z "$mmcv" ] || install mmcv --no-deps --no-cache-dir "$mmcv"
install packages "${files[@]/#/-r}"

say "3/3 convneur_mm, editable${compiler:+, with the CPU kernels}"
[ -z "$kernels" ] || wait "$kernels" || true  # where they fail, a line below says so
kernels=''
install convneur_mm --no-build-isolation --no-deps --editable "$root"
# The kernels are an extra: a compiler that cannot do them (clang without OpenMP, say) must not cost the rest.
[ -z "$compiler" ] || try 'from convneur_mm.ops.neural_memory import cpu; assert cpu.kernels' >/dev/null ||
  say "    WITHOUT the CPU kernels, so the memory is slower on a CPU; why:" \
    "'$venv/bin/python' -m pip install -v --no-build-isolation --no-deps -e '$root'"
# OpenCV's import is what a bare machine most often fails at.
error=$(try 'import cv2') || fail "OpenCV does not import ($error); on Debian and Ubuntu: apt-get install libgl1 libglib2.0-0"
error=$(try "import $modules") || fail "the environment does not import: $error"
if command -v nvidia-smi >/dev/null; then
  error=$(try 'from convneur_mm.engine.launch import why_no_gpu; import torch; torch.cuda.is_available() or exit(why_no_gpu())') ||
    say "this machine has a GPU's driver, but $error"
fi
printf '%s\n' "$(inputs)" "${TORCH_INDEX_URL:-}" > "$stamp"
say "done in $(minutes $SECONDS): $venv"
