#!/usr/bin/env bash
# Makes or reuses a virtual environment and installs this checkout into it, with an extra.
# Usage: source launch/venv.sh; use_venv EXTRA. Sets PYTHON to the environment's interpreter.
#   DISCO_JAX_VENV  where the environment lives (default: .venv in the checkout)
#   DISCO_JAX_PYTHON  the Python (3.11 or newer) that makes it (default: python3)

use_venv() {
  local extra=$1 root venv base
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  venv=${DISCO_JAX_VENV:-$root/.venv}
  base=${DISCO_JAX_PYTHON:-python3}
  if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "disco_jax needs Python 3.11 or newer; $base is $("$base" --version 2>&1)." >&2
    echo "Set DISCO_JAX_PYTHON to one that is." >&2
    return 2
  fi
  [ -x "$venv/bin/python" ] || "$base" -m venv "$venv"
  PYTHON=$venv/bin/python
  echo "Installing disco_jax[$extra] into $venv ..."
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable "${root}[$extra]"
}
