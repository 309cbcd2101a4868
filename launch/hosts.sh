#!/usr/bin/env bash
# Starts a run on several machines with GPUs over ssh. Each needs this checkout at the same path.
#   launch/hosts.sh [--dry-run] HOST,HOST,... TASK FLAG...
# The first host is the coordinator. A single machine does not need this script: `disco-jax TASK
# FLAG...` uses all its GPUs.
#   DISCO_JAX_VENV  virtual environment on each machine (default: .venv in the checkout)
#   PORT            port of the coordinator (default: 8476)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry=
[ "${1:-}" != --dry-run ] || { dry=1 && shift; }
if [ $# -lt 2 ]; then
  echo "usage: launch/hosts.sh [--dry-run] HOST,HOST,... TASK FLAG..." >&2
  exit 2
fi
IFS=, read -ra hosts <<<"$1"
shift
pids=()
for i in "${!hosts[@]}"; do
  printf -v line '%q ' "${DISCO_JAX_VENV:-$root/.venv}/bin/disco-jax" "$@" \
    --coordinator="${hosts[0]}:${PORT:-8476}" --processes="${#hosts[@]}" --process="$i"
  words=(ssh -tt -o BatchMode=yes "${hosts[$i]}" "cd $(printf %q "$root") && exec $line")
  if [ -n "$dry" ]; then
    printf '%q ' "${words[@]}"
    echo
    continue
  fi
  "${words[@]}" &
  pids+=($!)
done
trap '[ ${#pids[@]} = 0 ] || kill "${pids[@]}" 2>/dev/null' INT TERM
code=0
# Keeps the exit code of the first process that fails, because it makes the others fail.
for _ in "${pids[@]}"; do
  status=0
  wait -n "${pids[@]}" || status=$?
  [ "$code" != 0 ] || code=$status
done
exit "$code"
