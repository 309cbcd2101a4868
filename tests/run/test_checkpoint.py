"""Checkpoints: complete, verified, kept, and replaced by older ones if they are damaged."""

import contextlib
import json
import pathlib
import shutil

import chex
import jax
import numpy as np
import pytest

import helpers
from disco_jax.errors import StorageError, UserError
from disco_jax.run import checkpoint, stored
from disco_jax.run.checkpoint import Checkpoints

# When one read of a damaged checkpoint fails, Orbax closes its event loop. Reads that still run in
# TensorStore's threads then call back into the closed loop, which Python sometimes reports as
# "Exception ignored in: None" (RuntimeError: Event loop is closed). This is harmless.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module")
def state():
    return jax.tree.map(np.asarray, helpers.smoke(helpers.smoke_config("disco"), 1)[1])


def at(state, step):
    """Returns the state with values that depend on the step."""
    scaled = jax.tree.map(lambda x: x + x.dtype.type(step), state)
    return type(state)(**{**vars(scaled), "step": np.int32(step)})


def save(folder, state, steps, losses=None, keep=3, best=""):
    checkpoints = Checkpoints(folder, keep=keep, best_metric=best)
    for i, step in enumerate(steps):
        metrics = {"loss": losses[i] if losses else 0.0}
        checkpoints.save(step, at(state, step), [(0, 8 * step)], metrics)
    checkpoints.close()


def damage(folder, step, part=""):
    """Overwrites the middle of the largest file of a checkpoint, or a part, with other bytes."""
    root = pathlib.Path(folder, "checkpoints", str(step), part)
    files = [f for f in root.rglob("*") if f.is_file()]
    largest = max(files, key=lambda f: f.stat().st_size)
    content = bytearray(largest.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(255 - b for b in content[middle : middle + 64])
    largest.write_bytes(content)


def test_everything_comes_back_bit_for_bit(tmp_path, state):
    save(tmp_path, state, [4, 9])
    restored, meta = helpers.restore(tmp_path, state)
    chex.assert_trees_all_equal(restored, at(state, 9))
    chex.assert_trees_all_equal_dtypes(restored, at(state, 9))
    assert meta["step"] == 9 and meta["position"] == [[0, 72]]


def test_a_queue_in_bfloat16_comes_back_too(tmp_path):
    state = helpers.smoke(helpers.smoke_config("disco", **{"fast.half_queue": True}), 1)[1]
    state = jax.tree.map(np.asarray, state)
    assert state.memory["contrast"]["view_1"].vectors.dtype == jax.numpy.bfloat16
    save(tmp_path, state, [3])
    restored, _ = helpers.restore(tmp_path, state)
    chex.assert_trees_all_equal(restored, at(state, 3))
    chex.assert_trees_all_equal_dtypes(restored, at(state, 3))


def test_nothing_there_is_none(tmp_path, state):
    assert helpers.restore(tmp_path, state) is None


def test_keeps_the_newest_and_the_best_also_after_a_restart(tmp_path, state):
    save(tmp_path, state, [1, 2, 3], losses=[3.0, 1.0, 2.0], keep=2, best="loss")
    save(tmp_path, state, [4, 5, 6], losses=[4.0, 5.0, 6.0], keep=2, best="loss")
    steps = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert steps == {2, 5, 6}


@pytest.mark.parametrize("how", ["flipped bytes", "truncated", "missing file", "empty folder"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(tmp_path, state, how, caplog):
    save(tmp_path, state, [1, 2])
    newest = tmp_path / "checkpoints" / "2"
    if how == "flipped bytes":
        damage(tmp_path, 2)
    for file in [f for f in newest.rglob("*") if f.is_file()]:
        if how == "truncated":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        elif how == "empty folder" or (how == "missing file" and file.parent.name == "d"):
            file.unlink()
    restored, meta = helpers.restore(tmp_path, state)
    assert meta["step"] == 1
    chex.assert_trees_all_equal(restored, at(state, 1))
    assert "Checkpoint 2 is damaged" in caplog.text
    assert (tmp_path / "checkpoints_damaged" / "2").exists()
    save(tmp_path, state, [2])  # the step is free again
    assert helpers.restore(tmp_path, state)[1]["step"] == 2


def test_no_good_checkpoint_is_an_error_that_moves_nothing(tmp_path, state):
    save(tmp_path, state, [1, 2])
    damage(tmp_path, 1)
    damage(tmp_path, 2)
    for _ in range(2):  # the next start raises the same error
        with pytest.raises(UserError, match=r"All checkpoints in .* are damaged: 2: .*; 1: "):
            helpers.restore(tmp_path, state)
    assert kept(tmp_path) == ["1", "2"] and not (tmp_path / "checkpoints_damaged").exists()


def kept(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "position",
    [[[0, 3841]], [[0, -16]], [[7, 16]], [], [[0, "a"]], [[0]], None, "step", "not json"],
)
def test_a_changed_place_in_the_data_is_damage(tmp_path, state, position):
    save(tmp_path, state, [1, 2])
    file = tmp_path / "checkpoints" / "2" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    if position == "step":
        meta["step"] = 3
    else:
        meta["position"] = position
    file.write_text(json.dumps(meta) if position != "not json" else "{")
    _, meta = helpers.restore(tmp_path, state)
    assert meta["step"] == 1 and meta["position"] == [[0, 8]]
    assert (tmp_path / "checkpoints_damaged" / "2").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(24, "Too many open files"),
        PermissionError(13, "Permission denied"),
        MemoryError(),
        ValueError("RESOURCE_EXHAUSTED: out of memory"),
        ValueError("Error opening: [os_error_code='24']"),
        jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"),
    ],
)
def test_what_does_not_prove_damage_sets_nothing_aside(tmp_path, state, error, monkeypatch):
    save(tmp_path, state, [1, 2])

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(stored.ocp.Checkpointer, "restore", fail)
        with pytest.raises(StorageError, match=r"Checkpoint 2 in .* could not be read"):
            helpers.restore(tmp_path, state)
    assert kept(tmp_path) == ["1", "2"]
    assert helpers.restore(tmp_path, state)[1]["step"] == 2


def test_what_is_no_checkpoint_is_told(tmp_path, state, caplog):
    save(tmp_path, state, [1])
    folder = tmp_path / "checkpoints"
    (folder / "2").write_text("x")
    for name in ("003", "old", "4.orbax-checkpoint-tmp"):
        (folder / name).mkdir()
    assert helpers.restore(tmp_path, state)[1]["step"] == 1
    assert (tmp_path / "checkpoints_damaged" / "2").read_text() == "x"
    messages = " ".join(r.getMessage() for r in caplog.records if r.name.startswith("disco_jax"))
    words = "Checkpoint 2 is damaged", "003 is ignored", "old is ignored", "4.orbax"
    logged = [word for word in words if word in messages]
    assert logged == ["Checkpoint 2 is damaged", "003 is ignored", "old is ignored"]
    shutil.rmtree(folder)
    folder.write_text("x")
    with pytest.raises(UserError, match="checkpoints is a file"):
        helpers.restore(tmp_path, state)


def test_an_error_that_passes_is_no_damage(tmp_path, state, monkeypatch):
    """An error may be transient, for example if the file is being moved during the read."""
    save(tmp_path, state, [1])
    real, errors = stored.ocp.Checkpointer.restore, [ValueError("NOT_FOUND: student/d/0")]

    def once(*args, **kwargs):
        if errors:
            raise errors.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(stored.ocp.Checkpointer, "restore", once)
    assert helpers.restore(tmp_path, state)[1]["step"] == 1


@pytest.mark.parametrize("second", ["good", "damaged", "gone"])
def test_processes_set_aside_what_all_of_them_find_damaged(tmp_path, state, second, monkeypatch):
    """Simulates a second process whose verdict on checkpoint 2 is `second`."""
    save(tmp_path, state, [1, 2])
    damage(tmp_path, 2)

    def all_gather(value):
        if second == "gone":
            raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset")
        return [value, 0 if value == 1 and second == "good" else value]

    monkeypatch.setattr(checkpoint.hosts, "all_gather", all_gather)
    if second == "damaged":
        assert helpers.restore(tmp_path, state)[1]["step"] == 1
        assert kept(tmp_path) == ["1"]
        return
    expected = {
        "good": (StorageError, "process 0: damaged, process 1: good"),
        "gone": (jax.errors.JaxRuntimeError, "Gloo"),
    }
    with pytest.raises(expected[second][0], match=expected[second][1]):
        helpers.restore(tmp_path, state)
    assert kept(tmp_path) == ["1", "2"]


def test_processes_that_see_other_checkpoints_are_told(tmp_path, state, monkeypatch):
    save(tmp_path, state, [1])
    monkeypatch.setattr(checkpoint.hosts, "all_gather", lambda value: [value, value + 1])
    with pytest.raises(UserError, match=r"see different checkpoints in .* all processes share"):
        helpers.restore(tmp_path, state)


def test_a_start_notices_that_all_checkpoints_are_gone(tmp_path, state):
    def check():
        with contextlib.closing(Checkpoints(tmp_path)) as opened:
            opened.check_none_lost()

    check()  # no checkpoint was ever saved
    save(tmp_path, state, [1, 2])
    check()
    shutil.rmtree(tmp_path / "checkpoints")
    for _ in range(2):
        with pytest.raises(UserError, match=r"had checkpoints \(the newest was step 2\), but"):
            check()
    (tmp_path / "saved.json").unlink()
    check()
    (tmp_path / "checkpoints_damaged" / "1").mkdir(parents=True)  # by an earlier version
    with pytest.raises(UserError, match=r"--allow-change=checkpoints"):
        check()


def test_the_best_stays_best_whatever_happens_to_its_metric(tmp_path, state):
    save(tmp_path, state, [1, 2, 3], losses=[1.0, 2.0, 3.0], keep=1, best="loss")
    assert kept(tmp_path) == ["1", "3"]
    meta = tmp_path / "checkpoints" / "1" / "meta" / "metadata"
    meta.write_text("")  # loses the metric of a damaged checkpoint, which must not end the run
    save(tmp_path, state, [4], losses=[4.0], keep=1, best="loss")
    assert kept(tmp_path) == ["3", "4"]


def test_one_part_is_read_without_touching_the_disk(tmp_path, state):
    save(tmp_path, state, [1, 2])
    assert checkpoint.load(tmp_path, "student", state.student)[1] == 2
    damage(tmp_path, 2, "student")
    student, step = checkpoint.load(tmp_path, "student", state.student)
    assert step == 1
    chex.assert_trees_all_equal(student, at(state, 1).student)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
    with pytest.raises(UserError, match="no readable checkpoint"):
        checkpoint.load(tmp_path / "nowhere", "student", state.student)
