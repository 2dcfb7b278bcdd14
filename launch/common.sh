# shellcheck shell=bash
# What the launch scripts share; sourced, never run.
#
# A scheduler starts a job again only if it fails, and a run that was told to stop (SIGTERM) has not
# failed. So every process is given COSUP_STOPPED_CODE=75: it then ends with that code, the one with
# which it also reports that another process of the run is gone. 75 means: start all of it again.

# shellcheck disable=SC2034 # for those who source this
readonly AGAIN=75
dry_run=""

# Says what is wrong, and prints the header of the calling script, from line 2 to its first line that
# is no comment.
usage() {
  printf 'error: %s\n' "$*" >&2
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0" >&2
  exit 2
}

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Prints a command so that it can be pasted, and runs it unless --dry-run was given.
run() {
  local line
  printf -v line '%q ' "$@"
  if [[ $dry_run ]]; then
    printf '%s\n' "${line% }"
  else
    printf '%s\n' "${line% }" >&2
    "$@"
  fi
}

# One shell word a argument, for commands that another shell will read.
quoted() {
  local words
  printf -v words ' %q' "$@"
  printf '%s' "${words# }"
}

needs() {
  [[ $dry_run ]] || command -v "$1" >/dev/null || die "$1 is not installed here"
}

# The value of --NAME=VALUE among the arguments after it; refuses a call without.
value_of() {
  local name=$1 argument value=""
  shift
  for argument in "$@"; do
    [[ $argument == "$name="?* ]] && value=${argument#"$name="}
  done
  [[ $value ]] || die "the program needs $name=..."
  printf '%s' "$value"
}

# Refuses a config file that the checkout, as the machines are given it, does not have.
needs_config() {
  local file checkout where
  file=$(value_of --config "$@") || exit
  file=${file%%:*}
  checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  [[ $file != /* ]] || return 0
  [[ -f $checkout/$file ]] || die "config file '$file' does not exist (from $checkout)"
  where=$(cd "$checkout/$(dirname "$file")" && pwd)/
  [[ $where == "$checkout"/* && $where != "$checkout"/runs/* ]] ||
    die "config file '$file' is not packed for the machines; copy it to $checkout/configs"
}

# The checkout this script belongs to, packed without what is not code, as runs/.
pack() {
  local checkout
  checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  run tar -czf "$1" --exclude=./.git --exclude=./runs --exclude=./.venv -C "$checkout" .
}
