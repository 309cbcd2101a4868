#!/usr/bin/env bash
# Installs the test extra into a virtual environment, checks the style and runs the whole suite,
# then a part of it with the newest packages where the machine has a newer Python for them.
# Further words go to pytest, e.g. -k resume or -m "not slow", and leave that part out.
#   --newest  first of the words: that part alone
#   --lowest  the same part with every package at its lower bound in setup.py
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

case ${1:-} in
  --newest | --lowest)
    "test_${1#--}" "${@:2}" || exit $?
    exit
    ;;
esac
use_venv test
install_jax2onnx
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m pytest -n 2 --dist worksteal "$@"
# shellcheck disable=SC2119  # of pytest's words there are none here
[ $# -gt 0 ] || test_newest || [ $? -eq 3 ]
