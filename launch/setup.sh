#!/usr/bin/env bash
# Make or update the repository's virtual environment (.venv). Safe to run again: does nothing when
# pyproject.toml and constraints.txt are what was installed last.
#
#   launch/setup.sh                       first of python3.12, 3.11, 3.10, python3 that will do
#   PYTHON=/opt/py/bin/python launch/setup.sh
#
# No package index is named here, so that torch is whatever build of the pinned version your pip is set
# up for: CUDA by default, ROCm or CPU through pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL).
set -euo pipefail

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$repo/.venv"
stamp="$venv/.installed"

say() { echo "setup: $*"; }
die() {
    echo "setup: error: $*" >&2
    exit 1
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        new_enough "$PYTHON" || die "PYTHON=$PYTHON does not run or is older than 3.10"
        echo "$PYTHON"
        return
    fi
    for candidate in python3.12 python3.11 python3.10 python3; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "no Python >= 3.10 on PATH; install one, or name it with PYTHON=/path/to/python"
}

# A venv whose pip does not run is half-made, or its interpreter is gone.
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python="$(find_python)"
    "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
        die "$python has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)"
    say "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install -qq --upgrade pip || # newer ones install in half the time
        say "going on with pip as it is, as it could not be upgraded"
elif ! new_enough "$venv/bin/python"; then
    die "$venv has a Python older than 3.10; remove that folder and run again"
fi

wanted="$("$venv/bin/python" - "$repo/pyproject.toml" "$repo/constraints.txt" <<'PY'
import hashlib, pathlib, sys
print(hashlib.sha256(b"\0".join(pathlib.Path(p).read_bytes() for p in sys.argv[1:])).hexdigest())
PY
)"
if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
    say "$venv is up to date"
    exit 0
fi

say "installing into $venv (the first time takes minutes)"
rm -f "$stamp" # an install that breaks off is then run again
cd "$repo"
"$venv/bin/python" -m pip install -qq -c constraints.txt -e '.[dev]' ||
    die "pip could not install the package; its message is above"
# Beside the others, for the tests that ask for them alone: transformers imports what it finds of these in
# every process, and they print of kernels that they lack.
"$venv/bin/python" -m pip install -qq -c constraints.txt --upgrade --no-deps --target "$venv/quantised" \
    bitsandbytes compressed-tensors loguru torchao ||
    die "pip could not install the libraries of quantised weights; its message is above"
echo "$wanted" >"$stamp"
say "done; activate it with: source $venv/bin/activate"
