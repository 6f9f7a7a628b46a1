# Sourced by the scripts beside it: what starting, watching and stopping a run is the same for all of them.

program="$(basename "${script:-$0}")"
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bin="${PYTHON_BIN_DIR:-$repo/.venv/bin}"
shown=()  # NAME=VALUE that the scripts chose themselves
told=""   # the signal that this script was sent
dry_run=0 # whether to print only

say() { echo "$program: $*" >&2; }
die() {
    say "error: $*"
    exit 2
}
default() { # NAME VALUE: of a variable that is not set
    [[ -n "${!1+set}" ]] || { export "$1=$2" && shown+=("$1=$2"); }
}
number() { # NAME: of a variable
    [[ "${!1}" =~ ^[0-9]+$ ]] || die "$1 is '${!1}'; set it to a whole number"
}

# Takes the script's arguments: sets `flags`, `output`, `logs` and `dry_run`; --help prints the script's header.
begin() {
    if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
        sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "${script:-$0}" | grep -v '^SBATCH'
        exit 0
    fi
    [[ "${1:-}" == --dry-run ]] && dry_run=1 && shift
    flags=("$@") output=""
    local i
    for ((i = 0; i < $#; i++)); do
        case "${flags[i]}" in
            --output) output="${flags[i + 1]:-}" ;;
            --output=*) output="${flags[i]#*=}" ;;
        esac
    done
    [[ -n "$output" ]] || die "--output is missing; name a folder for the run, e.g. --output runs/first"
    [[ -x "$bin/python" ]] || die "no $bin/python; run launch/setup.sh, or set PYTHON_BIN_DIR"
    # A folder for each start, so that a restart leaves the logs of the one before.
    logs="$output/logs/$(date +%Y%m%d-%H%M%S)-$(hostname -s)-$$"
    default PYTHONUNBUFFERED 1
    default PYTHONWARNINGS ignore::FutureWarning # torch's, about DeepSpeed's calls
}

# Sets `ranks`, those of this machine: "$1", or its GPUs, or 2. Without GPUs, says what a CPU needs.
count_ranks() {
    local gpus=0 cores
    [[ "${DS_ACCELERATOR:-}" == cpu ]] ||
        gpus="$("$bin/python" -c 'import torch; print(torch.accelerator.device_count())')"
    ranks="${1:-$((gpus > 0 ? gpus : 2))}"
    ((gpus == 0)) || return 0
    cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
    default DS_ACCELERATOR cpu
    default OMP_NUM_THREADS "$((cores > ranks ? cores / ranks : 1))"
    # Else glibc hands the pages of each large tensor back to the kernel and faults them in again.
    default MALLOC_MMAP_THRESHOLD_ 4294967296
    default MALLOC_TRIM_THRESHOLD_ 8589934592
}

# What the launcher was told of the run that `command` starts, as a line for a shell.
show() {
    printf '%q ' "${shown[@]}" "${command[@]}"
    echo
}
put() { # FILE LINE...: writes a file that the launcher reads; --dry-run prints how
    local file="$1"
    shift
    if ((dry_run)); then
        printf 'mkdir -p %q && printf %q' "$(dirname "$file")" '%s\n'
        printf ' %q' "$@"
        printf ' >%q\n' "$file"
    else
        mkdir -p "$(dirname "$file")" || die "$output: cannot be written; choose another --output"
        printf '%s\n' "$@" >"$file"
    fi
}

# Signals those ranks on a machine that carry this launch's mark; also run over ssh.
# shellcheck disable=SC2016
to_ranks='ranks="$(grep -lszx "TEZO_LAUNCH=$mark" /proc/[0-9]*/environ | xargs -r grep -lsz "^RANK=" | cut -d/ -f3)"
test -n "$ranks" && kill -s "$signal" $ranks'
signal_ranks() { mark="$TEZO_LAUNCH" signal="$1" bash -c "$to_ranks"; }

# SIGTERM and SIGINT go to the ranks, that finish a step or their files, and so the launchers end by
# themselves; launchers, if asked to end, would pass it on or not, each in its way, and exit with 1.
on_told() { :; } # what a script does before its ranks are told
on_signal() {
    [[ -n "$told" ]] || on_told
    if [[ -n "$told" ]] || ! signal_ranks "$1"; then # a second one, or there are no ranks yet
        kill -TERM -- "-$launcher" 2>/dev/null || true
    fi
    told="$1"
}

# Prints `command` and runs it, in a process group of its own; sets `code`. Arguments: what to run beside it.
run() {
    if ((dry_run)); then
        show
        exit 0
    fi
    mkdir -p "$logs" || die "$output: cannot be written; choose another --output"
    show | tee "$logs/command.sh"
    export TEZO_LAUNCH="${logs##*/}"
    trap 'on_signal TERM' TERM
    trap 'on_signal INT' INT
    set -m # a group of its own; and background jobs would else ignore SIGINT
    (
        trap : TERM INT # outlives the launcher, whom a signal to the group is for
        "${command[@]}" 2>&1 >&3 3>&- </dev/null | (trap '' TERM INT && exec tee "$logs/launcher.log" >&2)
    ) 3>&1 &
    launcher=$!
    set +m
    (($# == 0)) || (trap - TERM INT && "$@") &
    while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" || true; done # a signal ends a wait
    code=0
    wait "$launcher" || code=$?
    wait
    trap - TERM INT
    settle
}

# Shows what is written to the first file in `logs` of that pattern: deepspeed's ranks write there alone.
follow() {
    local file
    until file="$(compgen -G "$logs/$1")" || ! kill -0 "$launcher" 2>/dev/null; do sleep 0.3; done
    [[ -z "$file" ]] || tail -qn +1 -s 0.3 --pid="$launcher" -f "${file%%$'\n'*}"
}

# Launchers change codes: torchrun's is 1 whatever a rank's was, and deepspeed's of a rank that a signal
# killed is 256 less its number. `code` becomes the rank's own, or 128 and the signal.
settle() {
    local rank
    rank="$(sed -n '/^Root Cause/,$s/^ *exitcode *: \(-\{0,1\}[0-9]*\).*/\1/p' "$logs/launcher.log" | tail -n 1)"
    if ((code == 1)) && [[ -n "$rank" ]]; then
        code=$((rank < 0 ? 256 + rank : rank))
    fi
    ((code <= 192)) || code=$((128 + 256 - code))
    # Ctrl-C ends the ranks one after the other, and the last may take the first for dead.
    [[ "$told" != INT || "$code" == 0 ]] || code=130
}

# What ranks said that they ended for: our own errors, and those of typer about flags, which are in a box.
errors() { grep -rhsE '^(\[[^]]*\]:)?(tezo-ds: error|│ )' "$logs" | sed 's/^\[[^]]*\]://' | sort -u; }
complain() {
    ((code != 0)) || return 0
    say "exit code $code; each rank's output is in $logs"
    [[ "$told" == INT ]] || errors >&2 || true
}
