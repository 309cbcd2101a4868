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
#   launch/tpu.sh [--dry-run] babysit [FLAG...]  create, set up, run, delete; again after a preemption
#
# babysit ends with the exit code of the run: 0 done, 2 a setting, 3 not finite; 4: given up. It
# starts the run again after any other code. At its end it deletes the slice that it made, whatever
# the code, unless KEEP=1. One that was there before stays, and so does everything if babysit is
# interrupted: it then says how to go on and how to delete.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/settings.sh
source "${SETTINGS:-$root/launch/settings.sh}"
created=${CREATED_DIR:-$root/launch/.created}
dry=
maker=create  # of the next slice, for its note
sleeper=      # process that a pause waits for
found=        # set if babysit met a slice that it did not make
flags=()      # of the run that babysit watches

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
    printf '%s %s %s\n' "$owner" "$PROVISION" "$maker" >"$created/$NAME"
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
    read -r owner provision _ <"$created/$NAME" || return 1
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

check_commit() {
  [ -n "$dry" ] || [ -z "$(git -C "$root" status --porcelain)" ] ||
    die "There are changes that are not committed; what runs must be a commit."
}

setup() {
  need PROJECT ZONE NAME
  check_commit
  local commit archive
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

# The words behind disco-jax on every machine, quoted for a shell.
words_of() {
  printf '%q ' "$TASK" --distributed --workdir="$WORKDIR" "$@"
}

run() {
  need PROJECT ZONE NAME WORKDIR TASK
  local words
  words=$(words_of "$@")
  # A machine starts nothing while its last run is alive. The exit code is left in run.rc.
  everywhere "if [ -e run.pid ] && kill -0 \"\$(cat run.pid)\" 2>/dev/null
    then echo 'A run is under way here.' >&2; exit 1; fi
    rm -f run.rc
    printf %s $(printf %q "$words") >run.words
    export DISCO_JAX_COMMIT=\$(cat disco_jax/COMMIT)
    nohup setsid sh -c 'disco_venv/bin/disco-jax \"\$@\" >>run.log 2>&1; echo \$? >run.rc' run $words \
      >/dev/null 2>&1 </dev/null & echo \$! >run.pid"
}

# Prints or sends the question for the exit code of a run; of one with other words if "$1" is empty.
ask_outcome() {
  # shellcheck disable=SC2016  # what is in quotes is for the machines
  local ask='if [ -e run.rc ] && { [ -z "$words" ] || [ "$(cat run.words 2>&1)" = "$words" ]; }
    then echo "rc=$(cat run.rc)"
    elif [ -e run.pid ] && kill -0 "$(cat run.pid)" 2>/dev/null; then echo rc=running
    else echo rc=none; fi'
  everywhere "words=$(printf %q "$1"); $ask"
}

# Exit code of the run, "running", or "none": of all machines, the one that counts first. A mistake
# (2, 3) is the run's own, unless a machine was lost (it has no code, or the code of a signal that
# ends a process from outside): then it may be what the others made of the loss.
outcome() {
  local said code lost
  said=$(ask_outcome "$1") || return 1
  lost=$(grep -m1 -oxE 'rc=(none|129|137|143)' <<<"$said") || lost=
  for code in ${lost:+running} ${lost#rc=} 2 3 running 1 75; do
    if grep -qx "rc=$code" <<<"$said"; then
      echo "$code"
      return
    fi
  done
  # Done are all or none: 134 on one machine says that another was lost before the end.
  code=$(grep -m1 -o 'rc=[1-9][0-9]*' <<<"$said") || code=$(grep -m1 -o 'rc=0' <<<"$said") ||
    code=none
  echo "${code#rc=}"
}

babysit() {
  need PROJECT ZONE NAME WORKDIR TASK
  maker=babysit
  flags=("$@")
  if [ -n "$dry" ]; then
    [ -e "$created/$NAME" ] || create
    setup && run "$@"
    [ -n "$KEEP" ] || { [ -e "$created/$NAME" ] && ! is_own; } || delete
    return
  fi
  check_commit
  local code=0
  trap 'interrupted 130' INT
  trap 'interrupted 143' TERM
  trap 'interrupted 129' HUP
  trap 'interrupted 141' PIPE
  # Only `die` ends the script inside `watch`.
  trap 'code=$?; [ "$code" = 2 ] || interrupted "$code"; end_of_watch "$code"' EXIT
  watch "$@" || code=$?
  end_of_watch "$code"
}

# Makes the slice and starts the run as often as it takes; returns the exit code of babysit.
watch() {
  local restarts=0 quick=0 unreachable=0 started='' now result words
  words=$(words_of "$@")
  while true; do
    now=$(state) || now=UNKNOWN
    case $now in
      READY)
        is_own || found=1
        result=$(outcome "$words") || result=unreachable
        [ "$result" = unreachable ] || unreachable=0
        case $result in
          running) ;;
          unreachable)
            # While it is being preempted this is usual, and its state will tell.
            if [ "$((++unreachable))" -ge "$MAX_UNREACHABLE" ]; then
              unreachable=0
              if ! is_own; then
                echo "Given up: a machine of $NAME does not answer." >&2
                return 4
              fi
              again lost || return 4
              echo "A machine of $NAME does not answer: making the slice anew." >&2
              delete || echo "It could not be deleted; trying again." >&2
            fi
            ;;
          0)
            echo "The run is finished."
            return 0
            ;;
          2 | 3)
            echo "The run ended with exit code $result; starting again would not help." >&2
            return "$result"
            ;;
          *)
            again "$result" || return 4
            echo "Starting the run (before: $result)."
            { setup && run "$@"; } || echo "It did not start; trying again." >&2
            started=$SECONDS
            ;;
        esac
        ;;
      ABSENT | PREEMPTED | TERMINATED | STOPPED)
        if [ -e "$created/$NAME" ] && ! waiting; then
          echo "The slice is $now: deleting it." >&2
          delete || echo "It could not be deleted; trying again." >&2
        fi
        if [ ! -e "$created/$NAME" ]; then
          again preempted || return 4
          found=
          # No capacity is no reason to give up.
          create || { echo "It could not be created; trying again." >&2 && forget; }
          continue
        fi
        ;;
    esac
    pause
  done
}

# Whether to go on after "$1": at most MAX_RESTARTS times, and not after MAX_QUICK runs in a row
# that failed within QUICK_S seconds, as another would too.
again() {
  if [ "$((restarts++))" -ge "$MAX_RESTARTS" ]; then
    echo "Given up after $MAX_RESTARTS restarts (last: $1)." >&2
    return 1
  fi
  if [[ -z $started || $1 == 75 || $1 == preempted ]] || ((SECONDS - started >= QUICK_S)); then
    quick=0
  elif [ "$((++quick))" -ge "$MAX_QUICK" ]; then
    echo "Given up: $quick runs in a row failed within $QUICK_S s (last: $1)." >&2
    return 1
  fi
}

# Whether the slice that is noted here was made by babysit, not by a `create` of its own.
is_own() {
  local by=
  [ -e "$created/$NAME" ] && read -r _ _ by <"$created/$NAME" && [ "$by" = babysit ]
}

# Waits such that a signal ends the wait.
pause() {
  sleep "$POLL_S" >/dev/null 2>&1 &
  sleeper=$!
  wait "$sleeper"
  sleeper=
}

# Ends babysit with the exit code "$1", and deletes what it made, whatever the code.
end_of_watch() {
  trap - EXIT
  if [ "$1" != 0 ] && { [ -e "$created/$NAME" ] || [ -n "$found" ]; }; then
    echo "The ends of the machines' logs:" >&2
    everywhere 'tail -n 40 run.log' >&2 || true
  fi
  local why=
  if [ -n "$found" ]; then
    why="it was there before"
  elif is_own && [ -n "$KEEP" ]; then
    why="KEEP=$KEEP"
  elif is_own && ! end_slice; then
    why="it could not be deleted"
  fi
  if [ -n "$why" ]; then
    echo "The slice $NAME stays ($why), and billing goes on. To delete it:"
    advise delete
  fi
  exit "$1"
}

# Deletes the slice; tries again, as an hour of it costs more than a minute of this.
end_slice() {
  local try code
  for ((try = 1; try <= 5; try++)); do
    code=0
    (delete) || code=$?
    if [ "$code" = 0 ]; then
      echo "The slice $NAME is deleted."
      return 0
    fi
    [ "$code" != 2 ] || return 1  # refused, for good
    pause
  done
  return 1
}

# After a signal: nothing is deleted, as the run goes on without its babysitter.
interrupted() {
  trap '' INT TERM HUP PIPE
  trap - EXIT
  {
    [ -z "$sleeper" ] || kill "$sleeper" 2>/dev/null
    if [ -e "$created/$NAME" ] || [ -n "$found" ]; then
      echo "Interrupted. The slice $NAME stays, its run goes on, and so does billing. To delete it:"
      advise delete
    else
      echo "Interrupted. No slice was made."
    fi
    echo "To go on:"
    advise babysit "${flags[@]}"
  } >&2 || true
  exit "$1"
}

# Prints a command of this script with the settings that it needs, to be pasted.
advise() {
  local name
  for name in SETTINGS CREATED_DIR PROJECT ZONE NAME ACCELERATOR RUNTIME PROVISION WORKDIR TASK; do
    [ -z "${!name:-}" ] || printf '%s=%q ' "$name" "${!name}"
  done
  printf '%q ' "$root/launch/tpu.sh" "$@"
  echo
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
  pause
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
    if [ -n "$dry" ]; then
      vm describe "$NAME" --format='value(state)'
      ask_outcome ''
      exit 0
    fi
    now=$(state)
    echo "slice: $now"
    [ "$now" != READY ] || echo "run: $(outcome '')"
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
