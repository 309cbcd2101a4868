#!/usr/bin/env bash
# Installs the test extra into a virtual environment, checks style and types and runs the tests.
# Usage: launch/test.sh [--learning] [words for pytest, e.g. -k resume]
#   --learning  only the tests that train networks to a score
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source=launch/venv.sh
source launch/venv.sh

# Runs pytest on two cores. A group in which the caller's words select no test is no failure.
tests() {
  local code=0
  "$PYTHON" -m pytest -n 2 --dist worksteal "$@" || code=$?
  [ "$code" -eq 5 ] || return "$code"
}

use_venv test
# Without the older Orbax that it asks for and does not import; what it does import is in `test`.
"$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps "jax2onnx>=0.17,<0.18"
if [ "${1:-}" = --learning ]; then
  shift
  tests -m learning "$@"
  exit
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
tests -m "not wiring and not learning" "$@"
tests -m "wiring and not learning" --quick-compiler "$@"
