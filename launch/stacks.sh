#!/usr/bin/env bash
# Runs a part of the tests (tests/stacks.txt) with other versions than the main environment's.
# Usage, with launch/venv.sh: source launch/stacks.sh; test_newest or test_lowest, and words for
# pytest. Makes environments beside the main one, e.g. .venv-3.13 and .venv-lowest.

# Those that jax 0.11 and later run on and that TensorFlow has a release for: none for 3.14 yet.
NEWER_PYTHONS="3.13 3.12"
# Those for which every lower bound has a wheel.
LOWEST_PYTHONS="3.11 3.12"

# With the newest packages, on the newest Python of the machine. Returns 3 where none is newer than
# the main environment's.
test_newest() {
  local main version python
  main=$(python_version "$(main_python)")
  for version in $NEWER_PYTHONS; do
    [ "${version#3.}" -gt "${main#3.}" ] || break
    python=$(find_python "$version") || continue
    DISCO_JAX_PYTHON=$python test_part "$version" "$@"
    return
  done
  echo "!!! SKIPPED: the tests with the newest packages. They need a newer Python than $main," >&2
  echo "!!! one of $NEWER_PYTHONS, on PATH or in ~/.pyenv, and found none." >&2
  return 3
}

# With every package at its lower bound in setup.py.
test_lowest() {
  local version python bounds
  for version in $LOWEST_PYTHONS; do
    python=$(find_python "$version") || continue
    bounds=$(mktemp)
    "$(main_python)" launch/lowest.py test onnx >"$bounds" || return
    PIP_CONSTRAINT=$bounds DISCO_JAX_PYTHON=$python test_part lowest "$@"
    return
  done
  echo "The lower bounds need one of Python $LOWEST_PYTHONS, on PATH or in ~/.pyenv." >&2
  return 2
}

# Installs into an environment of its own and runs the part. Usage: test_part NAME WORD...
test_part() {
  local name=$1 tests versions
  shift
  mapfile -t tests < <(grep -v '^#' tests/stacks.txt)
  DISCO_JAX_VENV=${DISCO_JAX_VENV:-$PWD/.venv}-$name use_venv test || return
  install_jax2onnx || return
  # shellcheck disable=SC2153  # launch/venv.sh sets it
  versions=$("$PYTHON" -m pip freeze | grep -E '^(jax|flax|optax|orbax-checkpoint|numpy)==' | tr '\n' ' ')
  echo "Testing with $("$PYTHON" --version): $versions..."
  "$PYTHON" -m pytest -n 3 --dist worksteal "${tests[@]}" "$@"
}

# Prints the path of a Python of a version, e.g. 3.13, with the modules that packages import; a
# Python built where a library was missing lacks some.
find_python() {
  local python
  for python in "python$1" "$HOME/.pyenv/versions/$1".*/bin/python3; do
    "$python" -c '
import bz2, ctypes, lzma, sqlite3, ssl, sys, venv
print(sys.executable)' 2>/dev/null && return
  done
  return 1
}

main_python() {
  local python=${DISCO_JAX_VENV:-.venv}/bin/python
  [ -x "$python" ] || python=${DISCO_JAX_PYTHON:-python3}
  echo "$python"
}

python_version() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'
}
