#!/usr/bin/env bash
# Lint, types and tests.
#
#   launch/test.sh                     all of it
#   launch/test.sh --fast              the tests that take one process and no more than seconds
#   launch/test.sh tests/rng/test_rng.py   anything else goes to pytest
#
# Pytests beside each other, for two cores: the tests that start real launchers, those of them that wait for most of
# their time, and those that take one process, in two parts, or the last would be left over for the end; once two of the
# first three have ended, the worlds of ranks (tests/helpers/worlds.py), whose processes fill the gaps that the last leaves.
# Tests of quantised weights have a process with libraries that the others do without (launch/setup.sh).
set -euo pipefail

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$repo"
launch/setup.sh
bin="$repo/.venv/bin"
if (($#)) && [[ "$1" != --fast ]]; then
    [[ "$*" != *quantised* ]] || export PYTHONPATH="$repo/.venv/quantised"
    exec "$bin/python" -m pytest "$@"
fi

logs="$(mktemp -d)" groups=()
# Whatever ends us, nothing of ours goes on.
trap 'for group in "${groups[@]}"; do kill -- "-$group" 2>/dev/null || true; done; rm -rf "$logs"' EXIT
trap 'exit 130' INT # pytest ends by itself, after which we would go on
behind() { # NAME COMMAND…: in a process group of its own
    set -m
    "${@:2}" >"$logs/$1" 2>&1 &
    set +m
    groups+=("$!")
}
TIMEFORMAT="took %R s, and %U + %S s of processor time"
pytest=("$bin/python" -m pytest --durations 20)
ASIDE=(tests/benchmarks tests/compiling tests/fuzz tests/plan) # a fifth of what takes one process
QUANTISED=(tests/quantised tests/plan/test_quantised_plan.py tests/benchmarks/test_quantised_benchmark.py)
# In shells of their own, or the time would be that of all groups which end meanwhile.
tests() { (time "${pytest[@]}" "$@"); }
lint() { (time { "$bin/ruff" check . && "$bin/ruff" format --check . && "$bin/mypy"; }); }
first() { # COMMAND…: the worlds begin once two of these have ended
    local code=0
    "$@" || code=$?
    mktemp -q "$logs/ended.XXXXXX" >/dev/null
    return "$code"
}
worlds() {
    until (($(find "$logs" -name 'ended.*' | wc -l) >= 2)); do sleep 1; done
    # Behind the other, which is one process: else its ranks, up to eight, would have most of the time, and the
    # other would be left over for the end, alone.
    mapfile -t cases < <(ls tests/*/world_*.py | grep -v ^tests/quantised/)
    time nice -n 7 "${pytest[@]}" "${cases[@]}"
}

names=(lint) failed=()
behind lint lint
if [[ "${1:-}" == --fast ]]; then
    tests -m "not launches and not world and not slow" -n 2 --dist loadfile tests || failed+=("one process")
else
    # Compiles the libraries' modules once, if that was not done yet, instead of in each process.
    PYTHONPATH=tests/helpers "$bin/python" -c "import fault_imports" >"$logs/imports" 2>&1 || cat "$logs/imports"
    names+=(waits launches aside worlds quantised)
    mapfile -t waiting < <(grep -rl mark.waits tests --include='test_*.py') # quicker than to collect all
    mapfile -t launching < <(grep -rl mark.launches tests --include='test_*.py')
    behind waits first tests -m waits "${waiting[@]}"
    behind launches first tests -m "launches and not waits" "${launching[@]}"
    alone=("not launches and not world" "${QUANTISED[@]/#/--ignore=}")
    behind aside tests -m "${alone[@]}" "${ASIDE[@]}"
    behind worlds worlds
    PYTHONPATH="$repo/.venv/quantised" behind quantised tests "${QUANTISED[@]}" tests/docs/test_commands.py -k quantised
    first tests -m "${alone[@]}" tests "${ASIDE[@]/#/--ignore=}" || failed+=("one process")
fi
for i in "${!names[@]}"; do
    wait "${groups[i]}" || failed+=("${names[i]}")
    echo "=== ${names[i]}"
    cat "$logs/${names[i]}"
done
groups=()
((!${#failed[@]})) || { echo "test: failed: ${failed[*]}" >&2 && exit 1; }
