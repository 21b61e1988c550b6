# Sourced by the launchers: sets $python to $PYTHON, the active environment's, this checkout's .venv, or the path's.
if [ -n "${PYTHON:-}" ]; then
  python=$PYTHON
elif [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$tools/../.venv/bin/python" ]; then
  python=$tools/../.venv/bin/python
else
  python=$(command -v python || command -v python3)
fi
