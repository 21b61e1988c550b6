#!/usr/bin/env bash
# Looks the packages of requirements/versions.lock up in PyPI's database of advisories, by pip-audit, which must be
# installed. Arguments are pip-audit's.
#
# The advisories in the table of docs/dependencies.md, which says what is done about each, are left out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
known=$(grep '^| CVE' docs/dependencies.md | grep -oE '(CVE|GHSA|PYSEC)-[[:alnum:]-]+' | sed 's/^/--ignore-vuln /')
# shellcheck disable=SC2086  # words
exec pip-audit -r requirements/versions.lock --no-deps --disable-pip $known "$@"
