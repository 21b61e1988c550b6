#!/usr/bin/env bash
# Makes the environment if needed, then lints and runs every test.
#
#   tools/run_tests.sh [--stack primary|openmmlab] [arguments of pytest]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
setup=("$root/tools/setup_env.sh")
if [ "${1:-}" = --stack ]; then
  setup+=(--stack "${2:-}")
  [ "${2:-}" = primary ] || venv="$root/.venv-${2:-}"
  shift $(($# < 2 ? $# : 2))
fi
"${setup[@]}"
cd "$root"
"$venv/bin/ruff" check .
"$venv/bin/python" -m pytest "$@"
