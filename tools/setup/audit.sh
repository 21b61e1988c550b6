#!/usr/bin/env bash
# Looks the packages of a stack's lock up in PyPI's database of advisories, by pip-audit, which must be installed.
#
#   tools/setup/audit.sh primary|openmmlab [more of pip-audit's arguments]
#
# The advisories in the table of docs/dependencies.md, which says what is done about each, are left out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
stack=${1:-}
if ! [ -f "requirements/$stack.lock" ]; then
  echo "[audit] error: usage: tools/setup/audit.sh primary|openmmlab; got '$stack'" >&2
  exit 2
fi
known=$(grep '^| CVE' docs/dependencies.md | grep -oE '(CVE|GHSA|PYSEC)-[[:alnum:]-]+' | sed 's/^/--ignore-vuln /')
# shellcheck disable=SC2086  # words
exec pip-audit -r "requirements/$stack.lock" --no-deps --disable-pip $known "${@:2}"
