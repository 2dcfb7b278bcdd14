#!/usr/bin/env bash
# One machine's part of a run, in the background, so that it outlives the connection that started it.
#
#   launch/worker.sh start --config=... --workdir=... [...]
#   launch/worker.sh state | stop | log
#
# start: does nothing where it runs already. state: "running", "ended CODE" or "none". stop: SIGTERM,
# upon which a run saves and ends. log: follows its output. PYTHON names the interpreter; RUN is
# where the output and the state are kept (~/cosup_run).
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

here=${RUN:-$HOME/cosup_run}
action=${1:-}
[[ $action ]] || usage "an action is needed"
shift

# Whether the process whose number is in this file lives and is still ours: numbers are used again.
lives() {
  local pid
  pid=$(cat "$here/$1" 2>/dev/null) && tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qE "$2"
}

# Whether it lives is asked before its code, which is there once it does not. A moment long it is
# still a copy of `start`.
state() {
  if lives pid 'launch/worker.sh (start|supervise)'; then
    echo running
  elif [[ -f $here/code ]]; then
    echo "ended $(<"$here/code")"
  elif [[ -f $here/pid ]]; then
    echo "ended 137" # killed together with its shell, or the machine started anew
  else
    echo none
  fi
}

# Runs in a session of its own; the signals of `stop` go to the program alone.
supervise() {
  "${PYTHON:-python3}" -m cosup_jax.main "$@" &
  echo $! >"$here/program"
  local code=0
  wait $! || code=$?
  echo "$code" >"$here/code.part"
  mv "$here/code.part" "$here/code" # `state` sees none of it or all
}

case $action in
  start)
    [[ $(state) != running ]] || exit 0
    mkdir -p "$here"
    rm -f "$here/code" "$here/pid" "$here/program"
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    export COSUP_STOPPED_CODE=$AGAIN PYTHONUNBUFFERED=1
    setsid nohup "$BASH" launch/worker.sh supervise "$@" >>"$here/log" 2>&1 </dev/null &
    echo $! >"$here/pid"
    ;;
  supervise) supervise "$@" ;;
  state) state ;;
  stop) ! lives program cosup_jax.main || kill -TERM "$(<"$here/program")" ;;
  log) exec tail -n 100 -F "$here/log" ;;
  *) usage "unknown action $action" ;;
esac
