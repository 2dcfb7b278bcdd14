#!/usr/bin/env bash
# A run on a GKE cluster of TPUs, through xpk.
#
#   launch/gke.sh [OPTIONS] run    NAME CLUSTER TYPE -- --config=... --workdir=gs://... [...]
#   launch/gke.sh [OPTIONS] state | logs | delete NAME CLUSTER
#
#   launch/gke.sh --dry-run --slices=2 run my-run my-cluster v5p-128 -- \
#     --config=configs/llama2_7b.py --workdir=gs://my-bucket/runs/llama2_7b
#
# This checkout is laid over the image and installed as each container starts. A run that is told to
# stop, as before a node is drained, has five minutes to save and ends with 75; the JobSet then
# starts all of it again, and it goes on from its checkpoint. So it does after a lost node.
#
# Options: --dry-run prints the commands and runs none; --slices=N (1); --image=IMAGE
# (python:3.12-slim); --restarts=N at most (50), for a JobSet starts a mistake (1, 2) again as well.
# What stands in XPK is given to xpk too: XPK="--project=me --zone=us-west4-a --priority=high".
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

slices=1 image=python:3.12-slim restarts=50
while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry-run) dry_run=yes ;;
    --slices=*) slices=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    *) usage "unknown option $1" ;;
  esac
  shift
done
[[ $slices =~ ^[1-9][0-9]*$ ]] || usage "--slices=$slices is no number of slices"
[[ $restarts =~ ^[0-9]+$ ]] || usage "--restarts=$restarts is no number"
[[ $# -ge 3 ]] || usage "an action, NAME and CLUSTER are needed; there is '$*'"
action=$1 name=$2 cluster=$3
shift 3
read -ra more <<<"${XPK:-}"
workload() { run xpk workload "$@" "--cluster=$cluster" ${more[@]+"${more[@]}"}; }

create() {
  [[ ${1:--} != -* && ${2:-} == -- ]] || usage "run needs TYPE -- and the program's arguments; there is '$*'"
  local type=$1 workdir
  shift 2
  value_of --config "$@" >/dev/null
  workdir=$(value_of --workdir "$@")
  [[ $workdir == *://* ]] || die "--workdir=$workdir is gone with its container: name a bucket"
  needs xpk
  workload create "--workload=$name" "--tpu-type=$type" "--num-slices=$slices" \
    "--base-docker-image=$image" "--script-dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" \
    "--max-restarts=$restarts" --restart-on-user-code-failure \
    --termination-grace-period-seconds=300 \
    "--env=COSUP_STOPPED_CODE=$AGAIN" --env=COSUP_CLUSTER=auto --env=PYTHONUNBUFFERED=1 \
    "--command=pip install -q -e '.[tpu,gcs]' && exec python -m cosup_jax.main $(quoted "$@")"
}

case $action in
  run) create "$@" ;;
  state)
    needs xpk
    workload list "--filter-by-job=$name"
    ;;
  logs)
    needs kubectl
    run kubectl logs --follow --prefix --max-log-requests=1000 \
      "--selector=jobset.sigs.k8s.io/jobset-name=$name"
    ;;
  delete)
    needs xpk
    workload delete "--workload=$name" --force
    ;;
  *) usage "unknown action $action" ;;
esac
