#!/usr/bin/env bash
# Lint, types and tests.
#
#   launch/test.sh                     all of it
#   launch/test.sh --fast              the tests that take one process: under two minutes on two cores
#   launch/test.sh tests/test_rng.py   anything else goes to pytest
#
# All of it runs side by side, in a pytest each: the tests that take one process; the worlds of ranks
# (tests/worlds.py); and the tests that start real launchers, which mostly import and wait.
set -euo pipefail

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$repo"
launch/setup.sh
bin="$repo/.venv/bin"
if (($#)) && [[ "$1" != --fast ]]; then
    exec "$bin/python" -m pytest "$@"
fi

logs="$(mktemp -d)" groups=()
# Whatever ends us, nothing of ours goes on.
trap 'for group in "${groups[@]}"; do kill -- "-$group" 2>/dev/null || true; done; rm -rf "$logs"' EXIT
behind() { # NAME COMMAND…: in a process group of its own
    set -m
    "${@:2}" >"$logs/$1" 2>&1 &
    set +m
    groups+=("$!")
}
tests() { "$bin/python" -m pytest --durations 20 "$@" tests; }
lint() { "$bin/ruff" check . && "$bin/ruff" format --check . && "$bin/mypy"; }

names=(lint)
behind lint lint
if [[ "${1:-}" != --fast ]]; then
    names+=(launches worlds)
    behind launches tests -m launches -n 2 --dist loadfile
    behind worlds tests -m world
fi
failed=()
tests -m "not launches and not world" -n 2 --dist loadfile || failed+=("one process")
for i in "${!names[@]}"; do
    wait "${groups[i]}" || failed+=("${names[i]}")
    echo "=== ${names[i]}"
    cat "$logs/${names[i]}"
done
groups=()
((!${#failed[@]})) || { echo "test: failed: ${failed[*]}" >&2 && exit 1; }
