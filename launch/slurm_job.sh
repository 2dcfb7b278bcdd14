#!/usr/bin/env bash
# The job that launch/slurm.sh submits: one process a task, and again if they ended with 75.
#
#   sbatch [...] launch/slurm_job.sh --config=... --workdir=... [...]
set -uo pipefail
# sbatch runs a copy of this file; the checkout is where it was submitted.
# shellcheck source=launch/common.sh
source "${SLURM_SUBMIT_DIR:?is set by sbatch}/launch/common.sh"
cd "$SLURM_SUBMIT_DIR" || exit 1

export COSUP_STOPPED_CODE=$AGAIN PYTHONUNBUFFERED=1
trap ':' TERM # a preempted job gets it as well; its tasks decide how it ends
code=0
# The first that fails has told the others why: they get a minute to end by themselves.
srun --kill-on-bad-exit=0 --wait=60 --label "${PYTHON:-python3}" -m cosup_jax.main "$@" || code=$?

case $code in
  0 | 1 | 2) exit "$code" ;;
esac
# 75, or killed: by a lost node, for memory, ...
if ((${SLURM_RESTART_COUNT:-0} >= ${RESTARTS:-1000})); then
  die "queued again ${SLURM_RESTART_COUNT} times; the last code was $code"
fi
echo "ended with $code: queued again" >&2
scontrol requeue "$SLURM_JOB_ID" || exit "$code"
