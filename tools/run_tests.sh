#!/usr/bin/env bash
# Makes the environment if needed, then lints and runs every test.
#
#   tools/run_tests.sh [--stack primary|openmmlab|core] [arguments of pytest]
#
# The stacks are those of tools/setup_env.sh; core runs the tests that need torch, torchvision and mmengine alone.
# With --cov as the only argument of pytest the run fails where less than 95 % of the package is covered. It takes half
# as long again, as Python up to 3.11 then runs all code, and PyTorch's too, by its slow path. tests/README.md has more.
set -euo pipefail
unset PYTHONPATH PYTHONHOME  # of another environment
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
setup=("$root/tools/setup_env.sh")
if [ "${1:-}" = --stack ]; then
  setup+=(--stack "${2:-}")
  [ "${2:-}" = primary ] || venv="$root/.venv-${2:-}"
  shift $(($# < 2 ? $# : 2))
fi
"${setup[@]}"
# The tests start the project's launchers, which must not take the interpreter of another environment.
export PYTHON="$venv/bin/python"
cd "$root"
"$venv/bin/ruff" check .
if [ "$venv" = "$root/.venv-core" ]; then
  set -- tests/test_models tests/test_ops tests/test_stack.py "$@"
elif [ "$*" = --cov ]; then
  set -- --cov --cov-fail-under=95
fi
# One process more than there are cores, up to four: tests use one thread each, and often wait for processes of theirs.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
workers=$("$venv/bin/python" -c 'import os; print(min(os.cpu_count() + 1, 4))')
"$venv/bin/python" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
