#!/usr/bin/env bash
# Manages a TPU slice and its run. Settings: launch/settings.sh or the environment.
#
#   launch/tpu.sh [--dry-run] create           create the slice, see PROVISION
#   launch/tpu.sh [--dry-run] setup            install this commit on all its machines
#   launch/tpu.sh [--dry-run] run [FLAG...]    start the task on all of them, e.g. --config disco
#   launch/tpu.sh [--dry-run] logs [WORKER]    follow the log of a machine
#   launch/tpu.sh [--dry-run] status           show the state of the slice and the run's exit code
#   launch/tpu.sh [--dry-run] fetch DIRECTORY  download the run's directory
#   launch/tpu.sh [--dry-run] list             list all slices created by this script
#   launch/tpu.sh [--dry-run] delete           delete the slice, if it was created from here
#   launch/tpu.sh [--dry-run] babysit [FLAG...]  create, set up, run, delete; restart if preempted
#
# babysit exits with the exit code of the run: 0 success, 2 invalid setting, 3 non-finite loss; or
# with 4 if it gives up. It restarts the run after any other code. At its end it deletes the slice
# it created, whatever the code, unless KEEP=1. A slice that existed before is not deleted. If
# babysit is interrupted, it deletes nothing and prints commands to resume and to delete.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/settings.sh
source "${SETTINGS:-$root/launch/settings.sh}"
created=${CREATED_DIR:-$root/launch/.created}
dry=
creator=create  # command that creates the next slice, for its record
sleeper=        # process ID of the current pause
preexisting=    # set if babysit encountered a slice that it did not create
flags=()        # flags of the run that babysit supervises

die() {
  echo "launch/tpu.sh: $1" >&2
  exit 2
}

# Runs a command, or prints it with --dry-run, quoted for a shell.
run_or_print() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

require() {
  local name
  for name in "$@"; do
    [ -n "${!name}" ] || die "$name is empty; set it in launch/settings.sh or the environment."
  done
}

vm() {
  local verb=$1
  shift
  run_or_print gcloud compute tpus tpu-vm "$verb" "$@" --project="$PROJECT" --zone="$ZONE"
}

queued() {
  local verb=$1
  shift
  run_or_print gcloud compute tpus queued-resources "$verb" "$@" --project="$PROJECT" --zone="$ZONE"
}

# Runs a shell command on all machines, or on machine "$2".
everywhere() {
  vm ssh "$NAME" --worker="${2:-all}" --command="$1"
}

# Prints the state of the slice, or ABSENT. Fails on any other error (network, permissions), so that
# an existing slice is never considered absent.
state() {
  local output
  if output=$(gcloud compute tpus tpu-vm describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --format='value(state)' 2>&1); then
    echo "${output##*$'\n'}"
  elif [[ $output == *NOT_FOUND* || $output == *"not found"* ]]; then
    echo ABSENT
  else
    echo "$output" >&2
    return 1
  fi
}

create() {
  require PROJECT ZONE NAME ACCELERATOR RUNTIME
  local owner now spot=()
  [[ $PROVISION == *spot ]] && spot=(--spot)
  [[ $PROVISION =~ ^(on-demand|spot|queued|queued-spot)$ ]] ||
    die "PROVISION=$PROVISION is not one of on-demand, spot, queued, queued-spot."
  if [ -z "$dry" ]; then
    [ ! -e "$created/$NAME" ] || die "$NAME was already created from here: delete it first."
    now=$(state) || return 1
    [ "$now" = ABSENT ] || die "A slice $NAME already exists and was not created from here."
    mkdir -p "$created"
    owner=$(od -An -N8 -tx1 /dev/urandom | tr -d ' \n')
    # Recorded first, so that an interrupted creation can still be deleted.
    printf '%s %s %s\n' "$owner" "$PROVISION" "$creator" >"$created/$NAME"
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

# Every step needs `|| return`, because `set -e` has no effect in a function called before `||`.
delete() {
  require PROJECT ZONE NAME
  local owner=OWNER provision=$PROVISION now=READY label=OWNER
  if [ -z "$dry" ]; then
    [ -e "$created/$NAME" ] || die "$NAME was not created from here; delete it manually."
    read -r owner provision _ <"$created/$NAME" || return 1
    now=$(state) || return 1
    if [ "$now" != ABSENT ]; then
      label=$(gcloud compute tpus tpu-vm describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
        --format='value(labels.disco-jax)') || return 1
      [ "$label" = "$owner" ] || die "The slice $NAME is not the one created from here."
    fi
  fi
  if [[ $provision == queued* ]]; then
    queued delete "$NAME" --force --quiet || return 1  # deletes its slice, too
  elif [ "$now" != ABSENT ]; then
    vm delete "$NAME" --quiet || return 1
  fi
  [ -n "$dry" ] || rm -f "$created/$NAME"
}

check_commit() {
  [ -n "$dry" ] || [ -z "$(git -C "$root" status --porcelain)" ] ||
    die "There are uncommitted changes; only a commit can be installed."
}

setup() {
  require PROJECT ZONE NAME
  check_commit
  local commit archive
  commit=$(git -C "$root" rev-parse HEAD) || return 1
  archive=${TMPDIR:-/tmp}/disco_jax-$commit.tar.gz
  run_or_print git -C "$root" archive --format=tar.gz --prefix=disco_jax/ -o "$archive" "$commit" ||
    return 1
  vm scp "$archive" "$NAME:disco_jax.tar.gz" --worker=all || return 1
  # The extra's jax[tpu] installs the matching libtpu. The final --version makes the setup fail if
  # the installation is broken.
  everywhere "set -e; rm -rf disco_jax; tar xzf disco_jax.tar.gz; echo $commit >disco_jax/COMMIT
    python3 -m venv disco_venv; disco_venv/bin/pip install --quiet --upgrade pip
    disco_venv/bin/pip install --quiet './disco_jax[tpu]'
    disco_venv/bin/disco-jax --version"
}

# Prints the arguments of disco-jax on every machine, quoted for a shell.
task_arguments() {
  printf '%q ' "$TASK" --distributed --workdir="$WORKDIR" "$@"
}

run() {
  require PROJECT ZONE NAME WORKDIR TASK
  local words
  words=$(task_arguments "$@")
  # A machine does not start a run while its last one is alive. The exit code is stored in run.rc.
  everywhere "if [ -e run.pid ] && kill -0 \"\$(cat run.pid)\" 2>/dev/null
    then echo 'A run is already in progress.' >&2; exit 1; fi
    rm -f run.rc
    printf %s $(printf %q "$words") >run.words
    export DISCO_JAX_COMMIT=\$(cat disco_jax/COMMIT)
    nohup setsid sh -c 'disco_venv/bin/disco-jax \"\$@\" >>run.log 2>&1; echo \$? >run.rc' run $words \
      >/dev/null 2>&1 </dev/null & echo \$! >run.pid"
}

# Queries the exit code of the run with the arguments "$1", or of any run if "$1" is empty.
query_outcome() {
  # shellcheck disable=SC2016  # the machines expand the quoted part
  local query='if [ -e run.rc ] && { [ -z "$words" ] || [ "$(cat run.words 2>&1)" = "$words" ]; }
    then echo "rc=$(cat run.rc)"
    elif [ -e run.pid ] && kill -0 "$(cat run.pid)" 2>/dev/null; then echo rc=running
    else echo rc=none; fi'
  everywhere "words=$(printf %q "$1"); $query"
}

# Prints the exit code of the run, "running", or "none": the one with the highest priority over all
# machines. An error of the run (2, 3) has priority unless a machine was lost, i.e. has no exit code
# or that of an external signal, because the loss of a machine may cause errors on the others.
outcome() {
  local output code lost
  output=$(query_outcome "$1") || return 1
  lost=$(grep -m1 -oxE 'rc=(none|129|137|143)' <<<"$output") || lost=
  for code in ${lost:+running} ${lost#rc=} 2 3 running 1 75; do
    if grep -qx "rc=$code" <<<"$output"; then
      echo "$code"
      return
    fi
  done
  # 0 counts only if all machines have it: 134 on one means that another was lost before the end.
  code=$(grep -m1 -o 'rc=[1-9][0-9]*' <<<"$output") || code=$(grep -m1 -o 'rc=0' <<<"$output") ||
    code=none
  echo "${code#rc=}"
}

babysit() {
  require PROJECT ZONE NAME WORKDIR TASK
  creator=babysit
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
  # Inside `watch`, only `die` exits the script.
  trap 'code=$?; [ "$code" = 2 ] || interrupted "$code"; end_of_watch "$code"' EXIT
  watch "$@" || code=$?
  end_of_watch "$code"
}

# Creates the slice and starts the run as often as necessary; returns the exit code of babysit.
watch() {
  local restarts=0 quick=0 unreachable=0 started='' now result words
  words=$(task_arguments "$@")
  while true; do
    now=$(state) || now=UNKNOWN
    case $now in
      READY)
        is_own || preexisting=1
        result=$(outcome "$words") || result=unreachable
        [ "$result" = unreachable ] || unreachable=0
        case $result in
          running) ;;
          unreachable)
            # This is normal during a preemption, which the state of the slice shows later.
            if [ "$((++unreachable))" -ge "$MAX_UNREACHABLE" ]; then
              unreachable=0
              if ! is_own; then
                echo "Giving up: a machine of $NAME does not respond." >&2
                return 4
              fi
              may_restart lost || return 4
              echo "A machine of $NAME does not respond: recreating the slice." >&2
              delete || echo "The deletion failed; trying again." >&2
            fi
            ;;
          0)
            echo "The run is finished."
            return 0
            ;;
          2 | 3)
            echo "The run exited with code $result; a restart would not help." >&2
            return "$result"
            ;;
          *)
            may_restart "$result" || return 4
            echo "Starting the run (previous result: $result)."
            { setup && run "$@"; } || echo "The start failed; trying again." >&2
            started=$SECONDS
            ;;
        esac
        ;;
      ABSENT | PREEMPTED | TERMINATED | STOPPED)
        if [ -e "$created/$NAME" ] && ! request_pending; then
          echo "The slice is $now: deleting it." >&2
          delete || echo "The deletion failed; trying again." >&2
        fi
        if [ ! -e "$created/$NAME" ]; then
          may_restart preempted || return 4
          preexisting=
          # Keep trying while there is no capacity.
          create || { echo "The creation failed; trying again." >&2 && remove_record; }
          continue
        fi
        ;;
    esac
    pause
  done
}

# Succeeds if a restart after "$1" is allowed: at most MAX_RESTARTS times, and not after MAX_QUICK
# consecutive runs that failed within QUICK_S seconds.
may_restart() {
  if [ "$((restarts++))" -ge "$MAX_RESTARTS" ]; then
    echo "Giving up after $MAX_RESTARTS restarts (last result: $1)." >&2
    return 1
  fi
  if [[ -z $started || $1 == 75 || $1 == preempted ]] || ((SECONDS - started >= QUICK_S)); then
    quick=0
  elif [ "$((++quick))" -ge "$MAX_QUICK" ]; then
    echo "Giving up: $quick consecutive runs failed within $QUICK_S s (last result: $1)." >&2
    return 1
  fi
}

# Succeeds if babysit created the recorded slice, not a separate `create`.
is_own() {
  local recorded_creator=
  [ -e "$created/$NAME" ] && read -r _ _ recorded_creator <"$created/$NAME" &&
    [ "$recorded_creator" = babysit ]
}

# Waits POLL_S seconds; a signal interrupts the wait.
pause() {
  sleep "$POLL_S" >/dev/null 2>&1 &
  sleeper=$!
  wait "$sleeper"
  sleeper=
}

# Exits babysit with code "$1", after deleting the slice it created.
end_of_watch() {
  trap - EXIT
  if [ "$1" != 0 ] && { [ -e "$created/$NAME" ] || [ -n "$preexisting" ]; }; then
    echo "Last lines of the machines' logs:" >&2
    everywhere 'tail -n 40 run.log' >&2 || true
  fi
  local why=
  if [ -n "$preexisting" ]; then
    why="it existed before"
  elif is_own && [ -n "$KEEP" ]; then
    why="KEEP=$KEEP"
  elif is_own && ! end_slice; then
    why="its deletion failed"
  fi
  if [ -n "$why" ]; then
    echo "The slice $NAME is not deleted ($why), and billing continues. To delete it:"
    print_command delete
  fi
  exit "$1"
}

# Deletes the slice, with several attempts, because an idle slice is expensive.
end_slice() {
  local try code
  for ((try = 1; try <= 5; try++)); do
    code=0
    (delete) || code=$?
    if [ "$code" = 0 ]; then
      echo "The slice $NAME is deleted."
      return 0
    fi
    [ "$code" != 2 ] || return 1  # refused: a retry cannot succeed
    pause
  done
  return 1
}

# Handles a signal: deletes nothing, because the run continues without babysit.
interrupted() {
  trap '' INT TERM HUP PIPE
  trap - EXIT
  {
    [ -z "$sleeper" ] || kill "$sleeper" 2>/dev/null
    if [ -e "$created/$NAME" ] || [ -n "$preexisting" ]; then
      echo "Interrupted. The slice $NAME and its run continue, and so does billing. To delete it:"
      print_command delete
    else
      echo "Interrupted. No slice was created."
    fi
    echo "To resume:"
    print_command babysit "${flags[@]}"
  } >&2 || true
  exit "$1"
}

# Prints a command of this script with its settings, quoted for a shell.
print_command() {
  local name
  for name in SETTINGS CREATED_DIR PROJECT ZONE NAME ACCELERATOR RUNTIME PROVISION WORKDIR TASK; do
    [ -z "${!name:-}" ] || printf '%s=%q ' "$name" "${!name}"
  done
  printf '%q ' "$root/launch/tpu.sh" "$@"
  echo
}

# Succeeds while a queued request is pending.
request_pending() {
  [[ $PROVISION == queued* && $now == ABSENT ]] || return 1
  local request
  request=$(gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" \
    --zone="$ZONE" --format='value(state.state)') || return 0
  [[ $request != FAILED && $request != SUSPENDED ]]
}

# Removes the record of a slice that was never created.
remove_record() {
  [ "$(state)" != ABSENT ] || rm -f "$created/$NAME"
  pause
}

[ "${1:-}" != --dry-run ] || { dry=1 && shift; }
command=${1:-}
[ -z "$command" ] || shift
case $command in
  create | setup | delete) [ $# = 0 ] || die "$command takes no arguments: $*" && "$command" ;;
  run | babysit) "$command" "$@" ;;
  logs)
    require PROJECT ZONE NAME
    everywhere 'tail -n 100 -F run.log' "${1:-0}"
    ;;
  status)
    require PROJECT ZONE NAME
    if [ -n "$dry" ]; then
      vm describe "$NAME" --format='value(state)'
      query_outcome ''
      exit 0
    fi
    now=$(state)
    echo "slice: $now"
    [ "$now" != READY ] || echo "run: $(outcome '')"
    ;;
  fetch)
    require WORKDIR
    [ $# = 1 ] || die "fetch takes one directory."
    run_or_print mkdir -p "$1"
    run_or_print gcloud storage rsync --recursive --exclude='^xla_cache/' "$WORKDIR" "$1"
    ;;
  list)
    require PROJECT ZONE
    vm list --filter=labels.disco-jax:*
    queued list
    ;;
  *)
    sed -n '2,/^set /{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
