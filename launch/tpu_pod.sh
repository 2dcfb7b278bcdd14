#!/usr/bin/env bash
# Trains on a Cloud TPU slice: creates it, copies this checkout to every worker, installs, runs.
#
#   launch/tpu_pod.sh [--dry-run] [--spot] NAME ZONE TYPE -- --config=... --workdir=... [...]
#   launch/tpu_pod.sh --dry-run my-run us-west4-a v5litepod-16 -- --config=configs/llama2_7b.py \
#     --workdir=/mnt/shared/runs/llama2_7b
#
# --dry-run prints the commands and runs none. --workdir must lie on storage that all workers mount.
# RUNTIME names the VM image (v2-alpha-tpuv5-lite). A run that was told to stop (SIGTERM) saves,
# leaves status.json at "stopped" and is started again here; after a lost slice call this again.
# The slice is kept and costs money until: gcloud compute tpus tpu-vm delete NAME --zone=ZONE
set -euo pipefail

usage() {
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

dry_run="" spot=()
while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry-run) dry_run=yes ;;
    --spot) spot=(--spot) ;;
    *) usage ;;
  esac
  shift
done
[[ $# -ge 5 && $4 == -- ]] || usage
name=$1 zone=$2 type=$3
shift 4
workdir=""
for argument in "$@"; do
  [[ $argument == --workdir=?* ]] && workdir=${argument#--workdir=}
done
[[ $workdir ]] || usage

run() {
  printf '%q ' "$@"
  printf '\n'
  [[ $dry_run ]] || "$@"
}
tpu() { run gcloud compute tpus tpu-vm "$@" "--zone=$zone"; }
everywhere() { tpu ssh "$name" --worker=all "--command=$1"; }

if [[ $dry_run ]] || ! tpu describe "$name" &>/dev/null; then
  tpu create "$name" "--accelerator-type=$type" "--version=${RUNTIME:-v2-alpha-tpuv5-lite}" \
    "${spot[@]}"
fi

checkout=$(cd "$(dirname "$0")/.." && pwd)
archive=$(mktemp -d)/cosup_jax.tar.gz
trap 'rm -rf "$(dirname "$archive")"' EXIT
run tar -czf "$archive" --exclude=./.git --exclude=./runs --exclude=./.venv -C "$checkout" .
tpu scp "$archive" "$name:" --worker=all

# The image's own Python may be older than 3.11.
# shellcheck disable=SC2016 # expands on the workers
everywhere 'set -e
mkdir -p cosup_jax && tar -xzf cosup_jax.tar.gz -C cosup_jax && cd cosup_jax
python=$(command -v python3.13 || command -v python3.12 || command -v python3.11) || {
  sudo apt-get update -q && sudo apt-get install -qy python3.11-venv
  python=python3.11
}
"$python" -m venv .venv && .venv/bin/pip install -q -e ".[tpu]"'

# The pause lets the first worker write status.json before the others read it.
everywhere "cd cosup_jax
while :; do
  COSUP_CLUSTER=auto .venv/bin/python -m cosup_jax.main$(printf ' %q' "$@") || exit \$?
  sleep ${PAUSE:-10}
  grep -Eqs '\"state\": *\"stopped\"' $(printf %q "$workdir")/status.json || exit 0
done"
