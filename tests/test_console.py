"""Tests of the console script in child processes: environment, streams, exit codes, files.

Parsing of command lines is tested in this process, in `commands/test_cli.py`.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys

import children
import jax
import matplotlib
import numpy as np
import pytest
from PIL import Image

import disco_jax
import helpers
from disco_jax import files, programs
from disco_jax.errors import UserError
from disco_jax.run import hosts, workdir

SCRIPT = pathlib.Path(sys.executable).with_name("disco-jax")
TINY = (
    "--config=seed:student=resnet8,teacher=resnet8,data=digits,smoke=true",
    "--config.data.source=npz", "--config.data.dir=few.npz", "--config.augment.size=16",
    "--config.student.width=4", "--config.teacher.width=4", "--config.augment.jitter_prob=0",
    "--config.augment.grey_prob=0", "--config.augment.blur_prob=0",
)  # fmt: skip


def environment(cwd):
    """Returns the environment variables of a new shell."""
    home = cwd / "home"
    home.mkdir(exist_ok=True)
    path = os.pathsep.join([str(SCRIPT.parent), "/usr/bin", "/bin"])
    return {"PATH": path, "HOME": str(home), "TMPDIR": str(cwd), "LANG": "C.UTF-8"}


def console(*words, cwd, expected=0):
    """Runs `disco-jax WORDS`; returns (stdout, stderr)."""
    process = subprocess.run(
        ["disco-jax", *words], cwd=cwd, env=environment(cwd), capture_output=True, text=True
    )
    assert process.returncode == expected, (
        f"{words}\n{process.stdout[-2000:]}\n{process.stderr[-4000:]}"
    )
    for noise in ("Traceback", "Exception ignored", "Failed to find host bounds"):
        assert noise not in process.stderr, process.stderr
    return process.stdout, process.stderr


def forked(*words, cwd, expected=0):
    """Runs `disco-jax WORDS` in a child that has imported the package; returns its output."""
    variables = {**environment(cwd), "MPLCONFIGDIR": matplotlib.get_configdir(), "XLA_FLAGS": None}
    child = children.start("disco_jax.main:console", *words, cwd=cwd, **variables)
    output, _ = child.communicate(timeout=300)
    assert child.returncode == expected, f"{words}\n{output[-4000:]}"
    assert "Traceback" not in output and "Exception ignored" not in output, output
    return output


def shell(line, cwd):
    """Runs a line in bash; returns (stdout, stderr)."""
    process = subprocess.run(
        ["bash", "-c", line], cwd=cwd, env=environment(cwd), capture_output=True, text=True
    )
    return process.stdout, process.stderr


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory):
    """Skips these tests if the console script belongs to another checkout."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    code = [sys.executable, "-c", "import disco_jax; print(disco_jax.__file__)"]
    process = subprocess.run(code, cwd=cwd, env=environment(cwd), capture_output=True, text=True)
    if not SCRIPT.exists() or process.stdout.strip() != disco_jax.__file__:
        pytest.skip("this checkout is not installed: pip install -e .")


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def test_help_and_version_import_nothing_heavy(tmp_path):
    out, _ = console("--help", cwd=tmp_path)
    assert "pretrain" in out and "75 stopped by SIGTERM" in out
    assert console("--version", cwd=tmp_path)[0].startswith("disco-jax 0.")
    words = f"{sys.executable} -X importtime -m disco_jax --help"
    _, imported = shell(words, tmp_path)
    modules = {line.rpartition("|")[2].strip() for line in imported.splitlines()}
    assert "disco_jax.main" in modules
    assert not {"jax", "flax", "numpy", "tensorflow", "etils"} & modules
    assert contents(tmp_path) == ["home"] and not contents(tmp_path / "home")


def test_a_mistake_is_one_message_and_leaves_nothing(tmp_path):
    for words, says in (
        (("pretrian",), "Did you mean 'pretrain'"),
        (("knn", "--workdir=nowhere"), "nowhere is not a run directory"),
        (("plan", *TINY, "--topology=v5x:2x2"), "v5x"),
    ):
        out, error = console(*words, cwd=tmp_path, expected=2)
        assert not out and error.startswith(f"disco-jax {words[0]}: ") and says in error
    assert contents(tmp_path) == ["home"]


@pytest.mark.parametrize("words", ["--help", "list --settings", "nonsense 2>&1"])
def test_a_reader_that_ends_first_is_no_error(words, tmp_path):
    out, error = shell(f"disco-jax {words} | true; echo ${{PIPESTATUS[0]}}", tmp_path)
    assert (out, error) == ("2\n" if "nonsense" in words else "0\n", "")


def test_a_stream_that_is_closed_or_full_changes_no_file_and_is_told(tmp_path):
    """Closes standard streams, whose descriptors the next opened files would get."""
    np.savez(tmp_path / "images.npz", **{k: v[:20] for k, v in helpers.digits().items()})
    words = "disco-jax data images.npz --seconds 0 --output found.json"
    assert shell(f"{words} <&- >&- 2>&-; echo $?", tmp_path) == ("0\n", "")
    assert json.loads((tmp_path / "found.json").read_text())["classes"] == 10
    out, error = shell("disco-jax --help > /dev/full; echo $?", tmp_path)
    assert out == "1\n" and error == "disco-jax: standard output: No space left on device\n"


@pytest.mark.slow
def test_a_run_from_the_teachers_outputs_to_the_report(tmp_path):
    """Takes one small run through most commands, each in a separate process.

    Takes over a minute: fourteen processes, of which three are started as a user does.
    """
    digits = helpers.digits()
    few = {key: x[: 128 if key.startswith("train") else 60] for key, x in digits.items()}
    np.savez(tmp_path / "few.npz", **few)
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.fromarray(few["train_images"][i].squeeze()).save(tmp_path / "photos" / f"{i}.png")

    def call(*words):
        return forked(*words, cwd=tmp_path)

    # A cache in a new folder, and one in a folder of the user, which must stay unchanged.
    assert "2 epochs, 32 steps" in call("cache", *TINY, "--workdir=kept", "--epochs=2")
    assert {"host_00000_of_00001", "targets.json"} <= set(contents(tmp_path / "kept"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("mine")
    output = forked("cache", *TINY, "--workdir=thesis", cwd=tmp_path, expected=2)
    assert "--workdir=thesis is not empty" in output
    assert contents(tmp_path / "thesis") == ["thesis.tex"]
    words = "pretrain", *TINY, "--config.teacher.cache=none", "--workdir=new"
    output = forked(*words, cwd=tmp_path, expected=2)
    assert "has no targets.json" in output and not (tmp_path / "new").exists()

    # A training whose output is closed after the first line.
    train = "pretrain", *TINY, "--config.teacher.cache=kept", "--workdir=run"
    train = *train, "--config.log.report=false"
    pipe = "2>&1 | head -1; echo ${PIPESTATUS[0]}"
    out, error = shell(f"disco-jax {' '.join(train)} {pipe}", tmp_path)
    assert out.splitlines()[-1] == "0" and not error, out + error
    run = tmp_path / "run"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    # The next start finds its compiled programs.
    first_s = json.loads((run / "goodput.json").read_text())["seconds"]["compile"]
    (run / "checkpoints").rename(tmp_path / "checkpoints")
    out, _ = console(*train, "--allow-change=checkpoints", cwd=tmp_path)
    assert "2 forward passes a step: student [0], teacher [0]" in out
    assert "step 2/2" in out and "images/s" in out and "eta" in out
    second_s = json.loads((run / "goodput.json").read_text())["seconds"]["compile"] - first_s
    assert first_s > 1 and second_s < 0.5 * first_s

    score = "--workdir=run", "--config.report=false"
    assert "kNN (weighted, k = 20" in console("knn", *score, cwd=tmp_path)[0]
    printed = call("linear", *score, "--config.total_epochs=2")
    assert "Linear probe on cached features: top-1" in printed
    assert "Report: run/report.html" in call("report", "--workdir=run")
    assert set(contents(run)) >= {
        "config.json", "environment.json", "metrics.jsonl", "checkpoints",
        "knn.json", "linear.json", "linear.npz", "report.html", "figures", "xla_cache",
    }  # fmt: skip
    export = "export", "run", "--format=safetensors", "--output=a.safetensors"
    assert "model card" in call(*export)
    assert "45 arrays imported" in call("import", "a.safetensors", "--workdir=imported")
    assert "3 images" in call("embed", "imported", "--images=photos", "--output=e.npz")
    assert "photos: no labels" in call("data", "photos", "--seconds=0")
    one = "--config.axes=(('student', ('resnet8',)), ('config.student.hidden', (8,)))"
    sweep = "--config=sweeps/hidden_width:smoke=true", one, "--config.recipe=seed", "--dry-run"
    sweep = *sweep, "--costs"
    assert "GFLOP an image" in call("sweep", *sweep, "--config.joint=1", "--workdir=sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_closed_terminal_stops_a_training_as_sigterm_does_unless_it_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup` may have started the tests
    with hosts.stop_on_signals() as must_stop:
        assert not must_stop(1)
        os.kill(os.getpid(), signal.SIGHUP)
        assert must_stop(2)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under `nohup`
        with hosts.stop_on_signals() as must_stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not must_stop(1)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def cache_dir(tmp_path, monkeypatch):
    """A function that returns JAX's cache directory, without any setting by the user."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = jax.config.jax_compilation_cache_dir
    yield lambda: jax.config.jax_compilation_cache_dir
    programs.begin()
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_in_a_directory_once_it_is_the_runs(cache_dir, tmp_path, monkeypatch):
    users = str(tmp_path / "cache" / "disco_jax" / "xla")
    run = tmp_path / "run"
    programs.begin(f"{run}/")
    assert cache_dir() == users
    programs.settle(run / "cells" / "a")  # runs of a sweep share the cache of the sweep
    assert cache_dir() == users
    with workdir.claim(str(run), helpers.smoke_config("moco_v2")):
        assert cache_dir() == str(run / "xla_cache")
    programs.begin()
    assert cache_dir() == users
    (run / "xla_cache").mkdir()
    programs.begin(str(run))
    assert cache_dir() == str(run / "xla_cache")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    programs.begin(str(tmp_path / "other"))
    programs.settle(tmp_path / "other")
    assert cache_dir() == str(run / "xla_cache")  # JAX has read the variable itself


def test_a_directory_is_free_with_what_a_killed_start_left_there(tmp_path):
    assert files.is_free(tmp_path / "new") and files.is_free(tmp_path)
    (tmp_path / "xla_cache").mkdir()
    for name in ("lock", ".config.json.123", ".targets.json.7"):
        (tmp_path / name).write_text("")
    assert files.is_free(tmp_path)
    (tmp_path / ".bashrc").write_text("")
    assert not files.is_free(tmp_path) and not files.is_free(tmp_path / ".bashrc")
    with pytest.raises(UserError, match="is not empty"):
        workdir.check_free(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        workdir.check_free(tmp_path / "lock")
