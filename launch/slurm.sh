#!/usr/bin/env bash
# A run on a SLURM cluster of GPUs, one process a GPU.
#
#   launch/slurm.sh [OPTIONS] run NAME -- --config=... --workdir=... [...]
#   launch/slurm.sh [OPTIONS] logs | stop NAME
#
#   launch/slurm.sh --dry-run --nodes=2 --gpus=8 run my-run -- --config=configs/llama2_7b.py \
#     --workdir=/shared/runs/llama2_7b
#
# Three minutes before its time is over, or when it is preempted, the run saves and ends with 75;
# the job then puts itself back into the queue and goes on from its checkpoint. So it does where a
# node is lost. stop saves too and cancels the job. --workdir must be storage that all nodes share.
#
# Options: --dry-run prints the commands and runs none; --nodes=N (1); --gpus=N a node (8);
# --time=LIMIT (24:00:00); --restarts=N at most (1000). What stands in SBATCH is given to sbatch
# too: SBATCH="--partition=gpu --account=me". PYTHON names the interpreter on the nodes.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

nodes=1 gpus=8 limit=24:00:00 restarts=1000
while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry-run) dry_run=yes ;;
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --time=*) limit=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    *) usage "unknown option $1" ;;
  esac
  shift
done
[[ $nodes =~ ^[1-9][0-9]*$ ]] || usage "--nodes=$nodes is no number of nodes"
[[ $gpus =~ ^[1-9][0-9]*$ ]] || usage "--gpus=$gpus is no number of GPUs"
[[ $restarts =~ ^[0-9]+$ ]] || usage "--restarts=$restarts is no number"
[[ $# -ge 2 ]] || usage "an action and NAME are needed; there is '$*'"
action=$1 name=$2
shift 2
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
log=$checkout/slurm-$name.log

submit() {
  [[ ${1:-} == -- ]] || usage "run needs -- and the program's arguments; there is '${1:-}'"
  shift
  value_of --config "$@" >/dev/null
  value_of --workdir "$@" >/dev/null
  needs sbatch
  cd "$checkout"
  local more
  read -ra more <<<"${SBATCH:-}"
  run sbatch "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$gpus" \
    "--gpus-per-node=$gpus" "--time=$limit" --signal=TERM@180 --requeue --open-mode=append \
    "--output=$log" "--export=ALL,RESTARTS=$restarts" ${more[@]+"${more[@]}"} \
    launch/slurm_job.sh "$@"
}

case $action in
  run) submit "$@" ;;
  logs) run tail -n 100 -F "$log" ;;
  stop)
    needs scancel
    run scancel --signal=TERM "--name=$name" # the processes save ...
    [[ $dry_run ]] || sleep "${PAUSE:-180}"
    run scancel "--name=$name" # ... and are not queued again
    ;;
  *) usage "unknown action $action" ;;
esac
