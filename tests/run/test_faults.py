"""Faults around a run: changed settings, and storage that is full or cannot be written."""

import errno
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import chex
import pytest

import helpers
from disco_jax import files, main
from disco_jax.data.arrays import ArraySource
from disco_jax.errors import UserError
from disco_jax.evaluate import features
from disco_jax.run import goodput, metrics
from disco_jax.workflows import pretrain

# When a write fails, Orbax's threads report it a second time, as an unhandled exception.
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning",
        "ignore::pytest.PytestUnhandledThreadExceptionWarning",
    ),
    pytest.mark.wiring,  # compares files, messages, and states of equal programs
]


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with helpers.tiny_backbone():
        yield


def source():
    return ArraySource(helpers.digits_splits())


def config(steps=4, **changes):
    # A queue of random vectors does not compress, so each checkpoint has 1 MiB.
    return helpers.tiny_config(
        "moco_v2",
        **{
            "batch_size": 64,
            "total_steps": steps,
            "checkpoint.every_steps": 2,
            "log.every_steps": 1,
            "objectives.contrast.queue_size": 16_384,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a run of four steps; tests must not change it."""
    path = tmp_path_factory.mktemp("finished") / "run"
    pretrain.run(config(), str(path), source(), profile="2:3")
    return path


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return pathlib.Path(shutil.copytree(finished, tmp_path / "run"))


def saved(run):
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir())


def test_a_change_is_refused_with_what_it_is_unless_it_is_allowed(run):
    longer = config(6, **{"optimizer.weight_decay": 1e-3})
    with pytest.raises(UserError, match=r"config.optimizer.weight_decay: 0.0001 -> 0.001") as error:
        pretrain.run(longer, str(run), source(), allow_change="total_steps")
    assert "total_steps" not in str(error.value) and "--allow-change" in str(error.value)
    with pytest.raises(UserError, match=r"--allow-change=optimiser.* Did you mean 'optimizer"):
        pretrain.run(longer, str(run), source(), allow_change="optimiser.weight_decay")
    allowed = "total_steps,config.optimizer.weight_decay"
    pretrain.run(longer, str(run), source(), allow_change=allowed)
    assert saved(run) == [2, 4, 6]
    pretrain.run(longer, str(run), source())  # the new config was recorded


def test_an_allowed_change_of_shapes_is_no_damage(run):
    with pytest.raises(UserError, match="has other shapes"):
        changed = config(6, **{"student.hidden": 64})
        pretrain.run(changed, str(run), source(), allow_change="student.,total_steps")
    assert saved(run) == [2, 4] and not (run / "checkpoints_damaged").exists()


def test_another_batch_size_still_replaces_the_oldest_keys(tmp_path):
    """Three batches of 16 end at a row where no batch of 32 begins; four of 32 fill the queue."""

    def queue_after(steps, batch_size):
        small = {"objectives.contrast.queue_size": 128, "student.width": 4}
        settings = config(steps, batch_size=batch_size, **small)
        pretrain.run(settings, str(tmp_path), source(), allow_change="batch_size,total_steps")
        state = helpers.restore(tmp_path, helpers.smoke(settings, 1)[1])[0]
        return state.memory["contrast"]["view_1"]

    first = queue_after(3, 16)
    assert first.pointer == 48
    other = queue_after(7, 32)
    both = {row.tobytes() for row in first.vectors} & {row.tobytes() for row in other.vectors}
    assert other.pointer == 0 and not both


def test_a_directory_that_cannot_be_written_is_told():
    with pytest.raises(UserError, match=r"--workdir=/proc/disco_jax/run cannot be written"):
        pretrain.run(config(), "/proc/disco_jax/run", source())


@pytest.fixture
def ends(monkeypatch, capsys):
    """A function that calls another as the command line calls a task -> (exit code, stderr)."""

    def end(call):
        monkeypatch.setattr(main, "_start", lambda *_: call())
        code = main.main(["pretrain"])
        return code, capsys.readouterr().err

    return end


def test_a_full_disk_costs_the_steps_since_the_last_checkpoint(run, tmp_path, ends, monkeypatch):
    """Uses a limit on file sizes, which fails in the middle of a write as a full disk does."""
    helpers.compile_once(monkeypatch)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        code, message = ends(
            lambda: pretrain.run(config(8), str(run), source(), allow_change="total_steps")
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1 and "Nothing more can be written: a checkpoint: File too large" in message
    assert features.load(str(run)).step == 4
    pretrain.run(config(8), str(run), source())
    whole = tmp_path / "whole"
    pretrain.run(config(8), str(whole), source())
    chex.assert_trees_all_equal(
        features.load(str(run)).variables, features.load(str(whole)).variables
    )


def test_a_disk_that_takes_no_metrics_keeps_those_that_it_has(run, ends):
    """Replaces the new file by /dev/full, which behaves like a file on a full disk."""
    before = (run / "metrics.jsonl").read_text()
    (run / f".metrics.jsonl.{os.getpid()}").symlink_to("/dev/full")
    code, message = ends(lambda: metrics.Logger(str(run), tensorboard=False, step=2))
    assert code == 1 and "No space left on device. Files saved before are complete" in message
    assert (run / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_storage_that_refuses_is_told_and_other_errors_are_not_hidden(number, ends):
    def refused():
        raise OSError(number, "x", "RUN/metrics.jsonl")

    code, message = ends(refused)
    assert code == 1 and f"RUN/metrics.jsonl: {os.strerror(number)}. Files saved" in message
    for other in (OSError(errno.EPIPE, "x"), ValueError("RESOURCE_EXHAUSTED: of the device")):
        assert not files.refusal(other)


def test_a_bucket_that_cannot_be_used_is_named_in_one_message(ends):
    errors_impl = pytest.importorskip("tensorflow").errors
    reason = "Could not resolve host: x\n\t when reading metadata of gs://bucket/run"

    def fails():
        raise errors_impl.FailedPreconditionError(None, None, reason)

    code, message = ends(fails)
    assert code == 1 and "Traceback" not in message
    assert "Could not resolve host: x when reading metadata of gs://bucket/run. Check" in message
    assert not files.bucket_error(errors_impl.ResourceExhaustedError(None, None, "no memory"))


def test_a_trace_is_written_of_the_steps_asked_for(finished):
    assert list((finished / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("words", ["10", "3:2", "0:4", "a:b"])
def test_wrong_steps_to_trace_are_refused(words, tmp_path):
    with pytest.raises(UserError, match=r"must be FIRST:LAST"):
        pretrain.run(config(), str(tmp_path), source(), profile=words)
    assert not list(tmp_path.iterdir())


def test_time_is_booked_and_written_with_the_metrics(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    last = lines[-1]
    assert last["goodput/init_s"] > 0 and last["goodput/step_s"] > 0
    assert 0 < last["goodput/share"] < 1
    account = json.loads((finished / "goodput.json").read_text())
    assert account["starts"] == 1 and account["unsaved_s"] == 0
    assert account["seconds"]["save"] > 0


class Clock:
    """A clock that the test sets."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(goodput.time, "monotonic", lambda: self.now)


def test_time_adds_up_over_starts_and_unsaved_steps_are_lost(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    first = goodput.Goodput(tmp_path, 0.0)
    clock.now = 10.0
    first._listen(goodput._COMPILATION, 4.0)
    first.begin()
    clock.now = 30.0
    first.step(waited_s=5.0)
    clock.now = 32.0
    first.save()
    clock.now = 35.0
    first.evaluate()
    clock.now = 40.0
    first.step(waited_s=6.0)
    first.write()
    first.close()  # as if killed here, after four seconds of unsaved steps
    expected = {"init": 6, "compile": 4, "data": 6, "step": 19, "eval": 3, "save": 2, "lost": 0}
    assert json.loads((tmp_path / "goodput.json").read_text())["seconds"] == expected
    clock.now = 100.0
    second = goodput.Goodput(tmp_path, 100.0)
    second.begin()
    clock.now = 110.0
    second.step(waited_s=0.0)
    second.close()
    report = second.report()
    assert report["goodput/step_s"] == 15 + 10 and report["goodput/lost_s"] == 4
    assert report["goodput/share"] == pytest.approx(25 / 50)
    assert second.starts == 2


def test_the_watchdog_ends_a_process_that_does_nothing():
    code = (
        "import time; from disco_jax.run.hosts import Watchdog; dog = Watchdog(0.5); "
        "[(dog.alive(i), time.sleep(0.1)) for i in range(8)]; time.sleep(60)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 1
    assert "no progress for 0 s after step 7" in process.stderr.replace("for 1 s", "for 0 s")
    assert "Current thread" in process.stderr or "Thread 0x" in process.stderr


def test_a_closed_watchdog_ends_nothing():
    code = (
        "import time; from disco_jax.run.hosts import Watchdog; dog = Watchdog(0.2); "
        "dog.alive(1); dog.close(); time.sleep(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
