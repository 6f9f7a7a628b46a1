#!/usr/bin/env bash
# Train on hosts that may come and go, by torchrun: start this on each of them, with the same variables. Needs an
# OUTPUT that all of them see, as which host has rank 0 is torchrun's choice.
#
#   NNODES=1:4 MASTER_ADDR=host-1 launch/elastic.sh --fsdp --model MODEL --task sst2 --output /shared/runs/sst2
#   NNODES=1:4 MASTER_ADDR=host-1 launch/elastic.sh --dry-run …     print the command, run nothing
#
# NNODES=MIN:MAX hosts make a world (1:1); MASTER_ADDR is the one that keeps the rendezvous (127.0.0.1),
# MASTER_PORT its port (29500). When a rank or a host is gone, torchrun starts the other ranks again, 3 times; and
# when it ends itself, this starts it again after RESTART_PAUSE seconds (15), MAX_RESTARTS times (100). What a
# restart cannot mend, such as a wrong flag, ends it. Also reads NPROC_PER_NODE, NCCL_SOCKET_IFNAME,
# GLOO_SOCKET_IFNAME, RDZV_CONF (last_call_timeout=30,join_timeout=600), OMP_NUM_THREADS, DS_ACCELERATOR,
# PYTHON_BIN_DIR. Give `--timeout SECONDS` after which a host that is silent counts as gone. Logs and
# exit codes are as of single_node.sh, a folder of logs for each start. SIGTERM finishes the step and ends this
# host's part; the others go on without it where MIN allows.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

begin "$@" && started="$logs"
nodes="${NNODES:-1:1}" MAX_RESTARTS="${MAX_RESTARTS:-100}" RESTART_PAUSE="${RESTART_PAUSE:-15}"
[[ "$nodes" =~ ^[1-9][0-9]*:[1-9][0-9]*$ ]] && ((${nodes%:*} <= ${nodes#*:})) ||
    die "NNODES is '$nodes'; set it to MIN:MAX hosts, e.g. 1:4"
number MAX_RESTARTS && number RESTART_PAUSE
count_ranks "${NPROC_PER_NODE:-}"
default TORCH_DISABLE_SHARE_RDZV_TCP_STORE 1 # a new store for each world: in an old one are those that are gone
master="${MASTER_ADDR:-127.0.0.1}"
# This host's address on the way to the master; the one that its name has may be another, or nobody's.
address="$("$bin/python" -c 'import socket, sys
way = socket.socket(type=socket.SOCK_DGRAM)
print(way.connect((socket.gethostbyname(sys.argv[1]), 1)) or way.getsockname()[0])' "$master" 2>/dev/null)" || address=""
[[ "$address" != 127.* || "$master" == 127.* || "$master" == localhost ]] || address="" # of no use to others

status() { # of the run that this start has ended, where this host sees it
    find "$output/summary.json" -newer "$logs/command.sh" -exec sed -n 's/.*"status": "\([a-z]*\)".*/\1/p' {} + 2>/dev/null
}
hopeless() { errors | grep -qvE 'then start the same command to go on|trains in it; wait'; }
attempts() { find "$logs" -maxdepth 2 -name "attempt_*" | wc -l; } # torchrun starts ranks again whatever their error
on_told() { attempts >"$logs/told"; }
again() { [[ -f "$logs/told" ]] && (($(attempts) > $(<"$logs/told"))); } # though told to stop: one broke as it ended
give_up() {
    until { hopeless || again; } && kill -TERM -- "-$launcher" 2>/dev/null; do
        sleep 2
        kill -0 "$launcher" 2>/dev/null || break
    done
}

for ((start = 0; ; start++)); do
    logs="$started.$start"
    command=("$bin/torchrun" --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts 3)
    command+=(--rdzv-backend c10d --rdzv-id tezo --rdzv-endpoint "$master:${MASTER_PORT:-29500}")
    command+=(${address:+--local-addr "$address"} ${RDZV_CONF:+--rdzv-conf "$RDZV_CONF"} --log-dir "$logs")
    command+=(--redirects 3 --tee 3 --local-ranks-filter 0 -m -- tezo_ds train "${flags[@]}")
    run give_up
    hopeless && code=2 MAX_RESTARTS=0
    complain
    case "$told/$code/$(status)" in
        [A-Z]*/stopped | /*/finished | /0/) exit 0 ;;
        [A-Z]*) exit "$code" ;;
        /0/stopped) say "stopped by another host; going on without it" ;;
    esac
    ((start < MAX_RESTARTS)) || exit "$code"
    say "starting again in $RESTART_PAUSE s (restart $((start + 1)) of $MAX_RESTARTS)"
    sleep "$RESTART_PAUSE"
done
