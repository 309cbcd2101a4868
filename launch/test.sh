#!/usr/bin/env bash
# Installs the test extra into a virtual environment, checks style and types and runs the tests.
# Usage: launch/test.sh [--learning | --newest | --lowest] [words for pytest, e.g. -k resume]
#   --learning  only the tests that train networks to a score
#   --newest    a part of the tests with the newest packages, for which the machine needs a newer
#               Python; exit code 3 and a loud line where it has none
#   --lowest    the same part with every package at its lower bound in setup.py
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source=launch/venv.sh
source launch/venv.sh
# shellcheck source=launch/stacks.sh
source launch/stacks.sh

# Without the older Orbax that it asks for and does not import; what it does import is in `test`.
install_jax2onnx() {
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps "jax2onnx>=0.17,<0.18"
}

# Runs pytest, for two cores in three processes: on its own each waits a fifth of its time for other
# processes, the compiler's last thread or the disk. A group in which the caller's words select no
# test is no failure.
tests() {
  local code=0
  "$PYTHON" -m pytest -n 3 --dist worksteal "$@" || code=$?
  [ "$code" -eq 5 ] || return "$code"
}

case ${1:-} in
  --newest | --lowest)
    "test_${1#--}" "${@:2}" || exit $?
    exit
    ;;
  --learning)
    use_venv test
    tests -m learning "${@:2}"
    exit
    ;;
esac
use_venv test
install_jax2onnx
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
tests -m "not wiring and not learning" "$@"
tests -m "wiring and not learning" --quick-compiler "$@"
