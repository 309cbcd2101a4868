#!/usr/bin/env bash
# A TPU slice from its creation to its end. Settings: launch/settings.sh or the environment.
#
#   launch/tpu.sh [--dry-run] create           make the slice, as PROVISION says
#   launch/tpu.sh [--dry-run] setup            install this commit on all its machines
#   launch/tpu.sh [--dry-run] run [FLAG...]    start the task on all of them, e.g. --config disco
#   launch/tpu.sh [--dry-run] logs [WORKER]    follow the log of a machine
#   launch/tpu.sh [--dry-run] status           state of the slice, exit code of the run
#   launch/tpu.sh [--dry-run] fetch DIRECTORY  copy the run's directory here
#   launch/tpu.sh [--dry-run] list             all slices made by this script
#   launch/tpu.sh [--dry-run] delete           end the slice; only one that `create` made here
#   launch/tpu.sh [--dry-run] babysit [FLAG...]  create, set up, run; again after a preemption
#
# babysit ends with the exit code of the run: 0 done, 2 a setting, 3 not finite; 4: given up.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/settings.sh
source "${SETTINGS:-$root/launch/settings.sh}"
created=${CREATED_DIR:-$root/launch/.created}
dry=

die() {
  echo "launch/tpu.sh: $1" >&2
  exit 2
}

# Runs a command, or prints it, quoted so that it could be pasted.
do_or_say() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

need() {
  local name
  for name in "$@"; do
    [ -n "${!name}" ] || die "$name is empty; set it in launch/settings.sh or the environment."
  done
}

vm() {
  local verb=$1
  shift
  do_or_say gcloud compute tpus tpu-vm "$verb" "$@" --project="$PROJECT" --zone="$ZONE"
}

queued() {
  local verb=$1
  shift
  do_or_say gcloud compute tpus queued-resources "$verb" "$@" --project="$PROJECT" --zone="$ZONE"
}

# Runs a line of shell on all machines, or on one.
everywhere() {
  vm ssh "$NAME" --worker="${2:-all}" --command="$1"
}

# The state of the slice, or ABSENT. Any other failure (no network, no right) ends the script, so
# that nothing is taken for gone that may be there.
state() {
  local said
  if said=$(gcloud compute tpus tpu-vm describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --format='value(state)' 2>&1); then
    echo "${said##*$'\n'}"
  elif [[ $said == *NOT_FOUND* || $said == *"not found"* ]]; then
    echo ABSENT
  else
    echo "$said" >&2
    return 1
  fi
}

create() {
  need PROJECT ZONE NAME ACCELERATOR RUNTIME
  local owner now spot=()
  [[ $PROVISION == *spot ]] && spot=(--spot)
  [[ $PROVISION =~ ^(on-demand|spot|queued|queued-spot)$ ]] ||
    die "PROVISION=$PROVISION is not one of on-demand, spot, queued, queued-spot."
  if [ -z "$dry" ]; then
    [ ! -e "$created/$NAME" ] || die "$NAME was created from here before: delete it first."
    now=$(state) || return 1
    [ "$now" = ABSENT ] || die "A slice $NAME exists already, and not from here."
    mkdir -p "$created"
    owner=$(od -An -N8 -tx1 /dev/urandom | tr -d ' \n')
    # Noted first: a creation that is cut off can still be deleted.
    printf '%s %s\n' "$owner" "$PROVISION" >"$created/$NAME"
  else
    owner=OWNER
  fi
  if [[ $PROVISION == queued* ]]; then
    queued create "$NAME" --node-id="$NAME" --accelerator-type="$ACCELERATOR" \
      --runtime-version="$RUNTIME" --labels="disco-jax=$owner" "${spot[@]}"
  else
    vm create "$NAME" --accelerator-type="$ACCELERATOR" --version="$RUNTIME" \
      --labels="disco-jax=$owner" "${spot[@]}"
  fi
}

# Every step is followed by `|| return`, as a function that is called before `||` has no `set -e`.
delete() {
  need PROJECT ZONE NAME
  local owner=OWNER provision=$PROVISION now=READY label=OWNER
  if [ -z "$dry" ]; then
    [ -e "$created/$NAME" ] || die "$NAME was not created from here; delete it by hand."
    read -r owner provision <"$created/$NAME" || return 1
    now=$(state) || return 1
    if [ "$now" != ABSENT ]; then
      label=$(gcloud compute tpus tpu-vm describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
        --format='value(labels.disco-jax)') || return 1
      [ "$label" = "$owner" ] || die "The slice $NAME is another than the one created from here."
    fi
  fi
  if [[ $provision == queued* ]]; then
    queued delete "$NAME" --force --quiet || return 1  # ends its slice too
  elif [ "$now" != ABSENT ]; then
    vm delete "$NAME" --quiet || return 1
  fi
  [ -n "$dry" ] || rm -f "$created/$NAME"
}

setup() {
  need PROJECT ZONE NAME
  local commit archive
  [ -n "$dry" ] || [ -z "$(git -C "$root" status --porcelain)" ] ||
    die "There are changes that are not committed; what runs must be a commit."
  commit=$(git -C "$root" rev-parse HEAD) || return 1
  archive=${TMPDIR:-/tmp}/disco_jax-$commit.tar.gz
  do_or_say git -C "$root" archive --format=tar.gz --prefix=disco_jax/ -o "$archive" "$commit" ||
    return 1
  vm scp "$archive" "$NAME:disco_jax.tar.gz" --worker=all || return 1
  # jax[tpu] of the extra brings the libtpu that matches it. The version is asked at the end, so
  # that a failed installation fails here.
  everywhere "set -e; rm -rf disco_jax; tar xzf disco_jax.tar.gz; echo $commit >disco_jax/COMMIT
    python3 -m venv disco_venv; disco_venv/bin/pip install --quiet --upgrade pip
    disco_venv/bin/pip install --quiet './disco_jax[tpu]'
    disco_venv/bin/disco-jax --version"
}

run() {
  need PROJECT ZONE NAME WORKDIR TASK
  local words
  printf -v words '%q ' "$TASK" --distributed --workdir="$WORKDIR" "$@"
  # A machine starts nothing while its last run is alive. The exit code is left in run.rc.
  everywhere "if [ -e run.pid ] && kill -0 \"\$(cat run.pid)\" 2>/dev/null
    then echo 'A run is under way here.' >&2; exit 1; fi
    rm -f run.rc
    export DISCO_JAX_COMMIT=\$(cat disco_jax/COMMIT)
    nohup setsid sh -c 'disco_venv/bin/disco-jax \"\$@\" >>run.log 2>&1; echo \$? >run.rc' run $words \
      >/dev/null 2>&1 </dev/null & echo \$! >run.pid"
}

# Exit code of the run, "running", or "none": of all machines, the one that counts first. A mistake
# (2, 3) is the run's own; another code may follow from a machine that was lost.
outcome() {
  # shellcheck disable=SC2016  # what is in quotes is for the machines
  local ask='if [ -e run.rc ]; then echo "rc=$(cat run.rc)"
    elif [ -e run.pid ] && kill -0 "$(cat run.pid)" 2>/dev/null; then echo rc=running
    else echo rc=none; fi'
  local said code found=none
  said=$(gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker=all \
    --command="$ask") || return 1
  for code in 2 3 1 75 running none; do
    if grep -qx "rc=$code" <<<"$said"; then
      echo "$code"
      return
    fi
  done
  # Done are all or none: 134 on one machine says that another was lost before the end.
  found=$(grep -m1 -o 'rc=[1-9][0-9]*' <<<"$said") || found=$(grep -m1 -o 'rc=0' <<<"$said") || true
  echo "${found#rc=}"
}

babysit() {
  need PROJECT ZONE NAME WORKDIR TASK
  local restarts=0 now result
  if [ -n "$dry" ]; then
    create && setup && run "$@" && delete
    return
  fi
  while true; do
    now=$(state) || now=UNKNOWN
    case $now in
      READY)
        result=$(outcome) || result=unreachable
        case $result in
          running | unreachable) ;;
          0)
            echo "The run is finished."
            return 0
            ;;
          2 | 3)
            echo "The run ended with exit code $result; starting again would not help." >&2
            return "$result"
            ;;
          *)
            [ "$((restarts++))" -lt "$MAX_RESTARTS" ] || return 4
            echo "Starting the run (before: $result)."
            # Fails on a machine whose process has not ended yet: looked at again next time.
            { setup && run "$@"; } || echo "It did not start; trying again." >&2
            ;;
        esac
        ;;
      ABSENT | PREEMPTED | TERMINATED | STOPPED)
        if [ -e "$created/$NAME" ] && ! waiting; then
          echo "The slice is $now: deleting it." >&2
          delete || echo "It could not be deleted; trying again." >&2
        fi
        if [ ! -e "$created/$NAME" ]; then
          [ "$((restarts++))" -lt "$MAX_RESTARTS" ] || return 4
          # No capacity is no reason to give up.
          create || { echo "It could not be created; trying again." >&2 && forget; }
          continue
        fi
        ;;
    esac
    sleep "$POLL_S"
  done
}

# Whether a queued request is still to be granted.
waiting() {
  [[ $PROVISION == queued* && $now == ABSENT ]] || return 1
  local request
  request=$(gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" \
    --zone="$ZONE" --format='value(state.state)') || return 0
  [[ $request != FAILED && $request != SUSPENDED ]]
}

# Drops the note of a slice that never came to be.
forget() {
  [ "$(state)" != ABSENT ] || rm -f "$created/$NAME"
  sleep "$POLL_S"
}

[ "${1:-}" != --dry-run ] || { dry=1 && shift; }
command=${1:-}
[ -z "$command" ] || shift
case $command in
  create | setup | delete) [ $# = 0 ] || die "$command takes no further words: $*" && "$command" ;;
  run | babysit) "$command" "$@" ;;
  logs)
    need PROJECT ZONE NAME
    everywhere 'tail -n 100 -F run.log' "${1:-0}"
    ;;
  status)
    need PROJECT ZONE NAME
    now=$(state)
    echo "slice: $now"
    [ "$now" != READY ] || echo "run: $(outcome)"
    ;;
  fetch)
    need WORKDIR
    [ $# = 1 ] || die "fetch takes a directory."
    do_or_say mkdir -p "$1"
    do_or_say gcloud storage rsync --recursive --exclude='^xla_cache/' "$WORKDIR" "$1"
    ;;
  list)
    need PROJECT ZONE
    vm list --filter=labels.disco-jax:*
    queued list
    ;;
  *)
    sed -n '2,/^set /{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
