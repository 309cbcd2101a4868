#!/usr/bin/env bash
# A sweep over several TPU slices, each with its share of the cells and a babysitter of its own.
# Settings: launch/settings.sh or the environment; the slices are called NAME-0, NAME-1, ...
#
#   launch/sweep.sh [--dry-run] SLICES [FLAG...]   e.g. 4 --config sweeps/hidden_width
#
# A sweep that trains its own teachers needs them first:
#   TASK=sweep launch/tpu.sh babysit --teachers-only --config ...
# Logs: launch/.logs/NAME-0.log, ... Ends with 0 when every share is done, else with the first
# other exit code; see launch/tpu.sh. The slices stay until `NAME=NAME-0 launch/tpu.sh delete`.
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

share() {
  NAME="$NAME-$1" TASK=sweep "$root/launch/tpu.sh" "${dry[@]}" babysit \
    "${@:2}" --worker="$1" --workers="$slices"
}

if [ ${#dry[@]} -gt 0 ]; then
  for ((i = 0; i < slices; i++)); do
    share "$i" "$@"
  done
  exit 0
fi
logs=${LOGS_DIR:-$root/launch/.logs}
mkdir -p "$logs"
babysitters=()
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
