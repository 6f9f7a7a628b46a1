#!/usr/bin/env bash
# Run launch/test.sh by several Pythons, each in a copy of the repository with an environment of its own.
#
#   launch/matrix.sh python3.10 python3.13            all tests by each
#   launch/matrix.sh python3.12 -- --fast             what follows -- goes to launch/test.sh
#   KEEP=/tmp/matrix launch/matrix.sh python3.12      keep the copies there, so that a second time installs nothing
#
# Prints a line for each Python at the end; the exit code is 1 where one failed.
set -euo pipefail

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
pythons=()
while (($#)) && [[ "$1" != -- ]]; do
    pythons+=("$1")
    shift
done
shift $(($# > 0))
if ((!${#pythons[@]})); then
    echo "matrix: error: name one Python or more, e.g. launch/matrix.sh python3.10 python3.13" >&2
    exit 2
fi

place="${KEEP:-$(mktemp -d)}"
[[ -n "${KEEP:-}" ]] || trap 'rm -rf "$place"' EXIT
results=() code=0
for python in "${pythons[@]}"; do
    version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" || version=""
    if [[ -z "$version" ]]; then
        results+=("$python: does not run") code=1
        continue
    fi
    copy="$place/$version"
    mkdir -p "$copy"
    # What git keeps and what is new, as it lies here; never an environment, which may be a link.
    git -C "$repo" ls-files -z --cached --others --exclude-standard --deduplicate -- . ':!.venv' ':!.cache' |
        (cd "$repo" && xargs -0 ls -d 2>/dev/null | tar -cf - -T -) | tar -xf - -C "$copy"
    echo "=== Python $version ($python)"
    if PYTHON="$python" "$copy/launch/test.sh" "$@"; then
        results+=("$version: passed")
    else
        results+=("$version: FAILED") code=1
    fi
done
printf 'matrix: %s\n' "${results[@]}"
exit "$code"
