#!/usr/bin/env bash
# Distributes a sweep over several TPU slices; each runs a share of the cells under its own
# babysitter. Settings: launch/settings.sh or the environment; the slices are named NAME-0,
# NAME-1, ...
#
#   launch/sweep.sh [--dry-run] SLICES [FLAG...]   e.g. 4 --config sweeps/hidden_width
#
# A sweep that trains its own teachers must train them first:
#   TASK=sweep launch/tpu.sh babysit --teachers-only --config ...
# Logs: launch/.logs/NAME-0.log, ... Exits with 0 if every share succeeds, otherwise with the first
# nonzero exit code of a share; see launch/tpu.sh. Each babysitter deletes the slice it created at
# the end of its share, unless KEEP=1. If this script is interrupted, the slices keep running.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/settings.sh
source "${SETTINGS:-$root/launch/settings.sh}"
dry=()
if [ "${1:-}" = --dry-run ]; then
  dry=(--dry-run)
  shift
fi
if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/sweep.sh [--dry-run] SLICES [FLAG...], with SLICES >= 1." >&2
  exit 2
fi
slices=$1
shift

settings=(PROJECT="$PROJECT" ZONE="$ZONE" ACCELERATOR="$ACCELERATOR" RUNTIME="$RUNTIME"
  PROVISION="$PROVISION" WORKDIR="$WORKDIR" ${SETTINGS:+SETTINGS="$SETTINGS"}
  ${CREATED_DIR:+CREATED_DIR="$CREATED_DIR"})

# Replaces this process by the babysitter of a share, so that signals reach the babysitter.
share() {
  exec env NAME="$NAME-$1" TASK=sweep "$root/launch/tpu.sh" "${dry[@]}" babysit \
    "${@:2}" --worker="$1" --workers="$slices"
}

if [ ${#dry[@]} -gt 0 ]; then
  for ((i = 0; i < slices; i++)); do
    (share "$i" "$@")
  done
  exit 0
fi
logs=${LOGS_DIR:-$root/launch/.logs}
mkdir -p "$logs"
babysitters=()
words=("$@")

# Stops the babysitters but not their runs; prints commands to delete the slices and to resume.
# shellcheck disable=SC2329  # called by the traps
interrupted() {
  trap '' INT TERM HUP PIPE
  kill -TERM "${babysitters[@]}" 2>/dev/null || true
  wait || true
  {
    echo "Interrupted. The slices keep running, and billing continues. To delete them:"
    for ((i = 0; i < slices; i++)); do
      printf '%q ' "${settings[@]}" NAME="$NAME-$i" "$root/launch/tpu.sh" delete
      echo
    done
    echo "To resume:"
    printf '%q ' "${settings[@]}" NAME="$NAME" "$root/launch/sweep.sh" "$slices" "${words[@]}"
    echo
  } >&2 || true
  exit "$1"
}
trap 'interrupted 130' INT
trap 'interrupted 143' TERM
trap 'interrupted 129' HUP
trap 'interrupted 141' PIPE
for ((i = 0; i < slices; i++)); do
  share "$i" "$@" >"$logs/$NAME-$i.log" 2>&1 &
  babysitters+=($!)
  echo "share $i of $slices: $logs/$NAME-$i.log"
done
result=0
for ((i = 0; i < slices; i++)); do
  code=0
  wait "${babysitters[i]}" || code=$?
  [ "$code" = 0 ] || echo "share $i exited with code $code." >&2
  [ "$result" != 0 ] || result=$code
done
exit "$result"
