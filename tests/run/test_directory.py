"""Run directories after a power failure, with other images, or from another version."""

import dataclasses
import functools
import json
import logging
import pathlib
import shutil
import zipfile

import numpy as np
import pytest

import helpers
from disco_jax import files
from disco_jax.data.arrays import ArraySource
from disco_jax.data.folders import FolderSource
from disco_jax.errors import UserError
from disco_jax.run import lease, upgrades, workdir
from disco_jax.workflows import pretrain

# Written by version 0.1.0: a checkpoint of step 2 and metrics of steps 1 to 4.
OLD = pathlib.Path(__file__).parents[1] / "upgrades" / "run_0.1.0.zip"


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """The tiny backbone; all runs of this module share the step that the first one compiles."""
    runs, real = [], pretrain.prepare

    def prepared(config, source):
        runs.append(real(config, source) if not runs else runs[0])
        experiment = dataclasses.replace(runs[0].experiment, config=config)
        return dataclasses.replace(runs[0], experiment=experiment, source=source)

    with helpers.tiny_backbone(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "prepare", prepared)
        patch.setattr(pretrain.step, "parallel", functools.cache(pretrain.step.parallel))
        yield


@pytest.fixture(autouse=True)
def info_logs(caplog):
    caplog.set_level(logging.INFO, logger="disco_jax")


def source(**changes):
    return ArraySource({**helpers.digits_splits(), **changes})


def config(**changes):
    settings = {
        "batch_size": 64,
        "total_steps": 4,
        "checkpoint.every_steps": 2,
        "log.every_steps": 1,
        "objectives.contrast.queue_size": 128,
    }
    return helpers.tiny_config("moco_v2", **{**settings, **changes})


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The old run, resumed by the current code, and its metrics before that."""
    path = tmp_path_factory.mktemp("old") / "run"
    with zipfile.ZipFile(OLD) as archive:
        archive.extractall(path)
    before = (path / "metrics.jsonl").read_text()
    pretrain.run(config(), str(path), source())
    return path, before


@pytest.fixture
def run(resumed, tmp_path):
    """A copy of the resumed run without its newest checkpoint."""
    path = pathlib.Path(shutil.copytree(resumed[0], tmp_path / "run"))
    shutil.rmtree(path / "checkpoints" / "4")
    return path


def losses(text):
    return [json.loads(line)["loss"] for line in text.splitlines()]


def test_a_run_of_the_first_version_goes_on(resumed):
    path, before = resumed
    np.testing.assert_allclose(losses((path / "metrics.jsonl").read_text()), losses(before), 1e-4)
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["2", "4"]
    assert json.loads((path / "data.json").read_text())["images"] == 1437


def test_fields_that_came_or_went_do_not_strand_a_run(run, monkeypatch, caplog):
    monkeypatch.setitem(upgrades.ADDED, "data.shadow", "none")
    new = config()
    with new.unlocked(), new.data.unlocked():
        new.data.shadow = "none"
    file = run / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "gone": {"by": 1}}))
    assert workdir.read_config(str(run)).data.shadow == "none"
    with workdir.claim(str(run), new):
        pass
    assert "config.data.shadow='none'" in caplog.text and "config.gone.by=1" in caplog.text
    with new.data.unlocked():
        new.data.shadow = "long"
    with (
        pytest.raises(UserError, match=r"config\.data\.shadow: 'none' -> 'long'"),
        workdir.claim(str(run), new),
    ):
        pass
    with workdir.claim(str(run), new, ["data.shadow"]):
        pass


FILES = "config.json", "environment.json", "goodput.json", "metrics.jsonl", "saved.json"


@pytest.mark.parametrize("name", [*FILES, "data.json"])
@pytest.mark.parametrize("how", ["empty", "half", "zeros", "not UTF-8", "another kind"])
def test_small_files_that_are_damaged_are_set_aside(run, name, how, caplog):
    raw = (run / name).read_bytes()
    (run / name).write_bytes(
        {
            "empty": b"",
            "half": raw[: len(raw) // 2],
            "zeros": bytes(len(raw)),
            "not UTF-8": b"\xff\xfe\x80" + raw,
            "another kind": b"7\n",
        }[how]
    )
    pretrain.run(config(), str(run), source())
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4
    # An incomplete last line is normal after a kill; saved.json is read only without checkpoints.
    quiet = name == "saved.json" or (name == "metrics.jsonl" and how in ("empty", "half"))
    if not quiet:
        assert "damaged" in caplog.text and list(run.glob(f"{name}.damaged*"))


def test_metrics_of_an_old_checkpoint_may_be_empty(run):
    (run / "checkpoints" / "2" / "metrics" / "metrics").write_bytes(b"")
    pretrain.run(config(**{"checkpoint.best_metric": "loss"}), str(run), source())


def test_other_images_are_refused_unless_they_are_allowed(run, caplog):
    images, labels = helpers.digits_splits()["train"]
    others = source(train=(255 - images, labels))
    fewer = source(train=(images[:200], labels[:200]))
    for changed, words in ((others, "pixels and labels"), (fewer, "images: 1437 -> 200")):
        with pytest.raises(UserError, match=f"other images(.|\n)*{words}(.|\n)*-change=data"):
            pretrain.run(config(), str(run), changed)
    pretrain.run(config(), str(run), fewer, allow_change="data")
    assert "images: 1437 -> 200" in caplog.text
    pretrain.run(config(), str(run), fewer)  # the new fingerprint was recorded


def test_fingerprints_of_a_folder_are_of_names_and_sizes(tmp_path):
    def fingerprint(name, *contents):
        for i, content in enumerate(contents):
            file = tmp_path / name / "cats" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        return FolderSource(tmp_path / name).fingerprint("train")

    first = fingerprint("a", b"x", b"yy")
    assert first["pictures"] == 2 and fingerprint("elsewhere", b"x", b"yy") == first
    assert fingerprint("b", b"x", b"y") != first and fingerprint("c", b"x", b"yy", b"") != first


def test_other_versions_are_told(run, caplog):
    file = run / "environment.json"
    starts = json.loads(file.read_text())
    starts[-1]["packages"]["jax"], starts[-1]["disco_jax"] = "0.4.1", "0.0.1"
    file.write_text(json.dumps(starts))
    with workdir.claim(str(run), config()):
        pass
    assert "disco_jax 0.0.1 -> " in caplog.text and "jax 0.4.1 -> " in caplog.text


def test_a_run_without_its_checkpoints_begins_anew_only_if_told_to(run):
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="--allow-change=checkpoints"):
        pretrain.run(config(), str(run), source())
    assert (run / "metrics.jsonl").read_text() == before
    pretrain.run(config(), str(run), source(), allow_change="checkpoints")
    assert (run / "metrics.jsonl.before").read_text() == before
    assert len(losses((run / "metrics.jsonl").read_text())) == 4


def test_files_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        files, "sync", lambda path: calls.append(("sync", files.os.path.basename(path)))
    )
    real = files.os.replace
    monkeypatch.setattr(
        files.os, "replace", lambda a, b: (calls.append(("replace", b.name)), real(a, b))
    )
    with files.whole(tmp_path / "x.json") as file:
        file.write_text("1")
    assert calls == [("sync", file.name), ("replace", "x.json"), ("sync", tmp_path.name)]
    files.sync_tree(tmp_path)


def test_what_killed_starts_did_not_finish_is_removed(run):
    (run / ".config.json.4711").write_text("{")
    (run / ".mine.12").write_text("kept")
    with workdir.claim(str(run), config()):
        pass
    assert not (run / ".config.json.4711").exists() and (run / ".mine.12").exists()


@pytest.fixture
def no_locks(monkeypatch):
    def flock(*_):
        raise OSError(lease.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lease.fcntl, "flock", flock)
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    monkeypatch.setattr(lease, "SETTLE_S", 0.05)


def test_where_there_are_no_locks_a_lease_tells_two_starts_apart(tmp_path, no_locks, caplog):
    with lease.held(tmp_path):
        assert "does not support locks" in caplog.text
        with pytest.raises(UserError, match="Another run is writing"), lease.held(tmp_path):
            pass
    with lease.held(tmp_path):  # the first holder released it
        pass
    assert files.is_free(tmp_path)


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_a_lease_whose_holder_is_gone_is_taken_over(tmp_path, no_locks, host):
    name = lease.socket.gethostname() if host == "here" else "another"
    expired = {"owner": "x", "host": name, "pid": 2**22 + 1, "beat": 3}
    (tmp_path / files.LEASE).write_text(json.dumps(expired))
    with lease.held(tmp_path):
        pass


def test_a_process_whose_lease_was_taken_over_ends(tmp_path, no_locks, monkeypatch):
    ended = []
    monkeypatch.setattr(lease.os, "_exit", ended.append)
    with lease.held(tmp_path):
        other = {"owner": "y", "host": "another", "pid": 1, "beat": 0}
        (tmp_path / files.LEASE).write_text(json.dumps(other))
        for _ in range(100):
            if ended:
                break
            lease.time.sleep(0.05)
    assert ended[0] == 1
