#!/usr/bin/env bash
# Installs the test extra into a virtual environment, checks style and types and runs all tests.
# Further words go to pytest, e.g. -k resume or -m "not slow".
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source=launch/venv.sh
source launch/venv.sh
use_venv test
# Without the older Orbax that it asks for and does not import; what it does import is in `test`.
"$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps "jax2onnx>=0.17,<0.18"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest -n 2 --dist worksteal "$@"
