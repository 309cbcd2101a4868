"""Shell scripts: no shellcheck findings, and clear error messages."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"  # installed by the extra `test`
    subprocess.run([shellcheck, "--external-sources", script], check=True, cwd=ROOT)


def test_an_old_python_is_refused_in_words(tmp_path):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" && exit 0\nexit 1\n')
    fake.chmod(0o755)
    venv = tmp_path / "venv"
    environment = {**os.environ, "DISCO_JAX_PYTHON": str(fake), "DISCO_JAX_VENV": str(venv)}
    process = subprocess.run(
        ["bash", ROOT / "launch" / "quickstart.sh"], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 2 and not venv.exists()
    assert "needs Python 3.11 or newer" in process.stderr and "3.9.1" in process.stderr


FAKE = """#!/bin/sh
# A fake Python: answers the scripts' queries and records the commands.
case "$*" in
  *version_info\\[:2\\]*) echo {version} ;;
  *sys.executable*) [ {whole} = yes ] && echo "$0" ;;
  *"-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *"pip freeze"*) echo jax==0.99 ;;
  *"pip install"*) cat "${{PIP_CONSTRAINT:-/dev/null}}" >"{folder}/bounds" ;;
  *pytest*) echo "$0" "$@" >"{folder}/tests"; exit 1 ;;
esac
"""


@pytest.fixture
def pythons(tmp_path):
    """Runs launch/test.sh with a default Python 3.11 and other versions added on demand."""

    def add(name, version, whole="yes"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FAKE.format(version=version, whole=whole, folder=tmp_path))
        path.chmod(0o755)

    def call(*words):
        environment = {
            "PATH": f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin",
            "HOME": str(tmp_path),
            "DISCO_JAX_PYTHON": str(tmp_path / "bin" / "python"),
            "DISCO_JAX_VENV": str(tmp_path / "venv"),
        }
        command = ["bash", ROOT / "launch" / "test.sh", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    add("bin/python", "3.11")
    for version in ("3.12", "3.13"):  # hides those of this machine
        add(f"bin/python{version}", version, whole="no")
    call.add = add
    return call


def test_a_part_runs_with_the_newest_packages_beside_the_main_environment(pythons, tmp_path):
    pythons.add(".pyenv/versions/3.12.9/bin/python3", "3.12")
    pythons.add(".pyenv/versions/3.13.1/bin/python3", "3.13")
    process = pythons("--newest", "-k", "resume")
    assert process.returncode == 1 and "jax==0.99" in process.stdout  # exit code of pytest
    ran = (tmp_path / "tests").read_text().split()
    assert ran[0] == f"{tmp_path}/venv-3.13/bin/python" and ran[-2:] == ["-k", "resume"]
    assert set(stack_tests()) < set(ran) and not (tmp_path / "venv").exists()
    assert (tmp_path / "bounds").read_text() == ""


def test_without_a_newer_python_the_tests_say_loudly_that_a_part_was_left_out(pythons, tmp_path):
    process = pythons("--newest")
    assert (
        process.returncode == 3
        and "!!! SKIPPED" in process.stderr
        and "than 3.11" in process.stderr
    )
    assert not (tmp_path / "tests").exists()


def test_the_lower_bounds_of_setup_are_what_is_installed(pythons, tmp_path):
    pythons.add("bin/python3.11", "3.11")
    # launch/lowest.py needs a real Python to read setup.py.
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    assert pythons("--lowest").returncode == 1
    bounds = (tmp_path / "bounds").read_text().splitlines()
    assert {"jax", "etils", "jax2onnx", "pytest"} <= {line.partition("==")[0] for line in bounds}
    assert all(line.count("==") >= 1 and ">=" not in line and "[" not in line for line in bounds)
    assert (tmp_path / "tests").read_text().startswith(f"{tmp_path}/venv-lowest/bin/python")


def stack_tests():
    """Returns the tests that also run with other package versions."""
    lines = (ROOT / "tests" / "stacks.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_tests_to_run_with_other_versions_are_there_and_of_every_room():
    for name in stack_tests():
        file, _, function = name.partition("[")[0].partition("::")
        assert f"def {function}" in (ROOT / file).read_text(), name
    rooms = {path.parent.name for path in ROOT.glob("tests/*/test_*.py")}
    assert {name.split("/")[1] for name in stack_tests()} >= rooms
