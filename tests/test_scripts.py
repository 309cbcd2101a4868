"""The shell scripts: clean for shellcheck, and they say what is wrong."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"  # of the test extra
    subprocess.run([shellcheck, "--external-sources", script], check=True, cwd=ROOT)


def test_an_old_python_is_refused_in_words(tmp_path):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" && exit 0\nexit 1\n')
    fake.chmod(0o755)
    venv = tmp_path / "venv"
    environment = {**os.environ, "DISCO_JAX_PYTHON": str(fake), "DISCO_JAX_VENV": str(venv)}
    done = subprocess.run(
        ["bash", ROOT / "launch" / "quickstart.sh"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and not venv.exists()
    assert "needs Python 3.11 or newer" in done.stderr and "3.9.1" in done.stderr
