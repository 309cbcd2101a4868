#!/usr/bin/env bash
# A sweep over several TPU slices, each with its share of the cells and a babysitter of its own.
# Settings: launch/settings.sh or the environment; the slices are called NAME-0, NAME-1, ...
#
#   launch/sweep.sh [--dry-run] SLICES [FLAG...]   e.g. 4 --config sweeps/hidden_width
#
# A sweep that trains its own teachers needs them first:
#   TASK=sweep launch/tpu.sh babysit --teachers-only --config ...
# Logs: launch/.logs/NAME-0.log, ... Ends with 0 when every share is done, else with the first
# other exit code; see launch/tpu.sh. Each babysitter deletes the slice that it made at the end of
# its share, unless KEEP=1. If this is interrupted, the slices stay and their shares go on.
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
  echo "usage: launch/sweep.sh [--dry-run] SLICES [FLAG...], SLICES being 1 or more." >&2
  exit 2
fi
slices=$1
shift

settings=(PROJECT="$PROJECT" ZONE="$ZONE" ACCELERATOR="$ACCELERATOR" RUNTIME="$RUNTIME"
  PROVISION="$PROVISION" WORKDIR="$WORKDIR" ${SETTINGS:+SETTINGS="$SETTINGS"}
  ${CREATED_DIR:+CREATED_DIR="$CREATED_DIR"})

# Becomes the babysitter of a share, so that a signal to this process reaches it.
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

# Ends the babysitters, not what they watch; says how to delete the slices and how to go on.
# shellcheck disable=SC2329  # the traps call it
interrupted() {
  trap '' INT TERM HUP PIPE
  kill -TERM "${babysitters[@]}" 2>/dev/null || true
  wait || true
  {
    echo "Interrupted. What the shares made stays, and so does billing. To delete it:"
    for ((i = 0; i < slices; i++)); do
      printf '%q ' "${settings[@]}" NAME="$NAME-$i" "$root/launch/tpu.sh" delete
      echo
    done
    echo "To go on:"
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
  [ "$code" = 0 ] || echo "share $i ended with exit code $code." >&2
  [ "$result" != 0 ] || result=$code
done
exit "$result"
