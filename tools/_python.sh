# Sourced by the launchers, which set $tools first: sets $python to the first interpreter that has torch and MMEngine, of
#   $PYTHON, the active environment's, this checkout's, that of the environment an installed wheel is in, the path's.
# One line on stderr names those that were passed over before it.

# use_if_fit NAME INTERPRETER: takes the interpreter, unless one is found already or this one lacks something.
use_if_fit() {
  local lacks
  [ -z "$python" ] || return 0
  if ! command -v "$2" >/dev/null; then
    lacks="does not exist"
  elif ! lacks=$("$2" "$tools/_environment.py" 2>/dev/null); then
    lacks="does not run"
  elif [ -n "$lacks" ]; then
    lacks="lacks $lacks"
  else
    python=$2
    return 0
  fi
  passed_over="${passed_over:+$passed_over; }$1 $lacks"
}

python=
passed_over=
root=$(dirname "$tools")
[ -z "${PYTHON:-}" ] || use_if_fit "PYTHON=$PYTHON" "$PYTHON"
for environment in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
  [ -z "$environment" ] || use_if_fit "the active environment $environment" "$environment/bin/python"
done
own=("$root/.venv" "$root/.venv-openmmlab")
# A wheel has the tools in ENVIRONMENT/lib/python3.x/site-packages/convneur_mm/.mim/tools.
[ "$(basename "$root")" != .mim ] || own=("$(readlink -f "$tools/../../../../../..")")
for environment in "${own[@]}"; do
  [ ! -x "$environment/bin/python" ] || use_if_fit "$environment" "$environment/bin/python"
done
for name in python python3; do
  ! command -v "$name" >/dev/null || use_if_fit "$(command -v "$name")" "$(command -v "$name")"
done

if [ -z "$python" ]; then
  echo "error: no Python with torch and mmengine was found${passed_over:+ ($passed_over)}; make an environment with" \
    "$tools/setup_env.sh, or name an interpreter that has them: PYTHON=…" >&2
  exit 2
fi
[ -z "$passed_over" ] || echo "note: $passed_over; using $python" >&2
