#!/usr/bin/env bash
# A run on Cloud TPU, one slice or several, through a queued resource.
#
#   launch/tpu_pod.sh [OPTIONS] train   NAME ZONE TYPE -- --config=... --workdir=... [...]
#   launch/tpu_pod.sh [OPTIONS] create  NAME ZONE TYPE    queue for the slice, wait until it is there
#   launch/tpu_pod.sh [OPTIONS] install NAME ZONE         this checkout, on every worker
#   launch/tpu_pod.sh [OPTIONS] run     NAME ZONE -- --config=... --workdir=... [...]
#   launch/tpu_pod.sh [OPTIONS] state | logs | stop | delete NAME ZONE
#   launch/tpu_pod.sh [OPTIONS] fetch   NAME ZONE FILE... LOCAL_DIRECTORY
#
#   launch/tpu_pod.sh --dry-run --spot train my-run us-west4-a v5litepod-16 -- \
#     --config=configs/llama2_7b.py --workdir=gs://my-bucket/runs/llama2_7b
#
# train does create, install and run, and then watches: a run that was stopped or lost a process
# starts again; a slice that was preempted is deleted, queued for anew, and the run goes on from its
# checkpoint. It ends when the run is finished (0) or has failed (1, 2). The run itself needs no
# connection: after Ctrl-C here it goes on, and the same command watches it again. logs follows the
# output of worker WORKER (0) of slice NODE (0). --workdir must be a bucket, or storage that all
# workers mount.
#
# Options: --dry-run prints the commands and runs none; --spot; --slices=N; --runtime=VERSION
# (v2-alpha-tpuv5-lite); --restarts=N at most (1000). POLL: seconds between looks (30).
# The slice is kept, and costs money, until: launch/tpu_pod.sh delete NAME ZONE
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

seen="" spot=() slices=1 restarts=1000 runtime=v2-alpha-tpuv5-lite
while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry-run) dry_run=yes ;;
    --spot) spot=(--spot) ;;
    --slices=*) slices=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    *) usage "unknown option $1" ;;
  esac
  shift
done
[[ $slices =~ ^[1-9][0-9]*$ ]] || usage "--slices=$slices is no number of slices"
[[ $restarts =~ ^[0-9]+$ ]] || usage "--restarts=$restarts is no number"
[[ $# -ge 3 ]] || usage "an action, NAME and ZONE are needed; there is '$*'"
action=$1 name=$2 zone=$3
shift 3
type=""
if [[ $action == train || $action == create ]]; then
  [[ ${1:--} != -* ]] || usage "$action needs the TYPE of the slice after ZONE"
  type=$1
  shift
fi
if [[ $action == train || $action == run ]]; then
  [[ ${1:-} == -- ]] || usage "$action needs -- and the program's arguments; there is '${1:-}'"
  shift
  needs_config "$@"
  value_of --workdir "$@" >/dev/null
fi
needs gcloud

queue() { run gcloud compute tpus queued-resources "$@" "--zone=$zone"; }
everywhere() { queue ssh "$name" --node=all --worker=all "--command=$1"; }
on_workers() { everywhere "cd cosup_jax && PYTHON=.venv/bin/python COSUP_CLUSTER=auto bash launch/worker.sh $1"; }

# ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; empty where there is none of this name; "unknown",
# and why, where gcloud cannot tell.
slice_state() {
  local errors
  { errors=$(queue describe "$name" "--format=value(state.state)" 2>&1 >&3) && return; } 3>&1
  errors=${errors#*$'\n'} # the first line is the command
  grep -qiE 'not[_ ]found' <<<"$errors" || echo "unknown: $errors"
}

create() {
  if ((slices == 1)); then
    nodes=("--node-id=$name")
  else
    nodes=("--node-count=$slices" "--node-prefix=$name")
  fi
  queue create "$name" "${nodes[@]}" "--accelerator-type=$type" "--runtime-version=$runtime" \
    ${spot[@]+"${spot[@]}"}
}

delete() { queue delete "$name" --force --quiet; }

# Returns once the slice is there; makes it where it is not, or was taken away. A network that fails
# is waited for, once something has worked: what fails at first is a mistake as a rule.
await_slice() {
  local state last=""
  if [[ $dry_run ]]; then
    slice_state && create
    return
  fi
  while :; do
    state=$(slice_state)
    [[ $state == "$last" ]] || echo "slice $name: ${state:-none}" >&2
    last=$state
    case $state in
      ACTIVE)
        seen=yes
        return
        ;;
      "") create || ((${count:-0})) ;;
      SUSPENDED | FAILED) delete || ((${count:-0})) ;;
      unknown*) [[ $seen ]] || return 1 ;;
    esac
    seen=yes
    sleep "${POLL:-30}"
  done
}

install() {
  local archive=${TMPDIR:-/tmp}/$name-$$/cosup_jax.tar.gz
  trap 'rm -rf "${TMPDIR:-/tmp}/$name-$$"' EXIT
  [[ $dry_run ]] || mkdir -p "${archive%/*}"
  pack "$archive" || return
  queue scp "$archive" "$name:" --node=all --worker=all || return
  # The image's own Python may be older than 3.11.
  # shellcheck disable=SC2016 # expands on the workers
  everywhere 'set -e
mkdir -p cosup_jax && tar -xzf cosup_jax.tar.gz -C cosup_jax && cd cosup_jax
python=$(command -v python3.13 || command -v python3.12 || command -v python3.11) || {
  sudo apt-get update -q && sudo apt-get install -qy python3.11-venv
  python=python3.11
}
"$python" -m venv .venv && .venv/bin/pip install -q -e ".[tpu,gcs]"'
}

# Looks until every worker has ended; returns the code that says what to do next.
watch_run() {
  local states codes
  while :; do
    states=$(on_workers state 2>/dev/null) || return "$AGAIN"
    if ! grep -q running <<<"$states"; then
      codes=$(sed -n 's/^.*ended \([0-9]*\).*$/\1/p' <<<"$states" | sort -nu)
      echo "ended: ${codes//$'\n'/ }" >&2
      [[ $codes != 0 ]] || return 0
      for code in 2 1; do # our fault or the user's: not again
        ! grep -qx "$code" <<<"$codes" || return "$code"
      done
      return "$AGAIN"
    fi
    sleep "${POLL:-30}"
  done
}

train() {
  local code count
  for ((count = 0; count <= restarts; count++)); do
    await_slice
    code=0
    if [[ ! $dry_run ]] && grep -q running <<<"$(on_workers state 2>/dev/null)"; then
      echo "it runs already: watching it" >&2
    elif ! { install && on_workers "start $(quoted "$@")"; }; then
      code=$AGAIN # as a rule the slice has gone meanwhile
    fi
    [[ ! $dry_run ]] || return 0
    ((code)) || watch_run || code=$?
    ((code == AGAIN)) || exit "$code"
    echo "starting again" >&2
    sleep "${POLL:-30}"
  done
  die "started again $restarts times; see: launch/tpu_pod.sh logs $name $zone"
}

case $action in
  train) train "$@" ;;
  create) await_slice ;;
  install) install ;;
  run) on_workers "start $(quoted "$@")" ;;
  state | stop) on_workers "$action" ;;
  logs)
    queue ssh "$name" "--node=${NODE:-0}" "--worker=${WORKER:-0}" \
      "--command=bash cosup_jax/launch/worker.sh log"
    ;;
  fetch)
    (($# >= 2)) || usage "fetch needs a FILE and LOCAL_DIRECTORY"
    files=("${@:1:$#-1}")
    queue scp --recurse "${files[@]/#/"$name:"}" "${*: -1}" --node=0 --worker=0
    ;;
  delete) delete ;;
  *) usage "unknown action $action" ;;
esac
