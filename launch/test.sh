#!/usr/bin/env bash
# Lint, types and the whole test suite; any argument goes to pytest instead of "tests".
set -euo pipefail

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$repo"
launch/setup.sh
bin="$repo/.venv/bin"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
exec "$bin/python" -m pytest "${@:-tests}"
