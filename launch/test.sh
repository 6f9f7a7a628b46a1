#!/usr/bin/env bash
# Lint, types and the whole test suite, or of the tests what pytest's arguments name:
#
#   launch/test.sh
#   launch/test.sh tests/test_plan.py -k dry_run
#
# The suite goes in two parts. Tests marked "launches" start real launchers and mostly wait for one process to
# start another, so two files of them run at a time; the others leave no core idle, as worlds of ranks run
# behind them.
set -euo pipefail

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$repo"
launch/setup.sh
bin="$repo/.venv/bin"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
if (($#)); then
    exec "$bin/python" -m pytest "$@"
fi
status=0
"$bin/python" -m pytest -m "not launches" tests || status=$?
((status < 2)) || exit "$status" # interrupted, or no tests
"$bin/python" -m pytest -m launches --numprocesses 2 --dist loadfile tests || status=$?
exit "$status"
