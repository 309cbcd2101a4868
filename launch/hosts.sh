#!/usr/bin/env bash
# Starts a run on several machines with GPUs over ssh; each has this checkout at the same path.
#   launch/hosts.sh [--dry-run] HOST,HOST,... TASK FLAG...
# The first host is where the others meet. One machine with several GPUs needs none of this:
# `disco-jax TASK FLAG...` uses all of them.
#   DISCO_JAX_VENV  the virtual environment on each machine (default: .venv in the checkout)
#   PORT            where they meet (default: 8476)
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
# The code of the first that fails: the others fail because of it.
for _ in "${pids[@]}"; do
  ended=0
  wait -n "${pids[@]}" || ended=$?
  [ "$code" != 0 ] || code=$ended
done
exit "$code"
