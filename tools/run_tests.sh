#!/usr/bin/env bash
# Makes the environment if needed, then lints and runs every test. Arguments go to pytest.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/tools/setup_env.sh"
cd "$root"
.venv/bin/ruff check .
.venv/bin/python -m pytest "$@"
