#!/usr/bin/env bash
# N processes of one run on this machine, joined over loopback, each with CPU devices of its own.
#
#   launch/local_processes.sh [--dry-run] N [DEVICES_PER_PROCESS] -- --config=... --workdir=... [...]
#
# Each line of output carries its process' number. When a process fails, the others get GRACE seconds
# (10) to say why and end, and its exit code is returned. SIGTERM and Ctrl-C stop them all. PYTHON
# names the interpreter; --dry-run prints the commands and runs none.
set -uo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ ${1:-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
[[ $# -ge 2 && $1 =~ ^[1-9][0-9]*$ ]] || usage "a number of processes is needed first; there is '$*'"
processes=$1 devices=1
shift
if [[ $1 =~ ^[1-9][0-9]*$ ]]; then
  devices=$1
  shift
fi
[[ ${1:-} == -- ]] || usage "-- and the program's arguments are needed; there is '${1:-}'"
shift

python=${PYTHON:-python3}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') || exit 1
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:$port
export JAX_NUM_PROCESSES=$processes JAX_NUM_CPU_DEVICES=$devices JAX_PLATFORMS=cpu
export PYTHONUNBUFFERED=1 COSUP_JOIN_SECONDS=${COSUP_JOIN_SECONDS:-60}

if [[ $dry_run ]]; then
  for ((i = 0; i < processes; i++)); do
    run env "JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS" "JAX_NUM_PROCESSES=$processes" \
      "JAX_PROCESS_ID=$i" "JAX_NUM_CPU_DEVICES=$devices" JAX_PLATFORMS=cpu \
      "$python" -m cosup_jax.main "$@"
  done
  exit
fi

# Ctrl-C reaches all of this terminal's programs: not those which print how the run ends.
prefixed() {
  trap '' INT
  exec sed -u "s/^/[$1] /"
}

pids=() stop=""
forward() { ((${#pids[@]} == 0)) || kill -s "$1" "${pids[@]}" 2>/dev/null; }
trap 'stop=yes; forward TERM' TERM INT # what bash starts in the background ignores SIGINT
trap 'forward KILL' EXIT
for ((i = 0; i < processes; i++)); do
  # Process substitution, not a pipe: $! is then Python itself, which must get the signals.
  JAX_PROCESS_ID=$i "$python" -m cosup_jax.main "$@" > >(prefixed "$i") 2> >(prefixed "$i" >&2) &
  pids+=($!)
done
[[ ! $stop ]] || forward TERM # told before all had started

exec 2>/dev/null # bash would announce each process that is killed here
result=0 deadline=""
while ((${#pids[@]})); do
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    code=0
    wait "${pids[i]}" || code=$?
    unset "pids[i]"
    if ((code && !result)); then
      result=$code deadline=$((SECONDS + ${GRACE:-10}))
    fi
  done
  if [[ $deadline ]] && ((SECONDS >= deadline)); then
    forward KILL
  fi
  sleep 0.2
done
wait # for the last prefixed lines
exit "$result"
