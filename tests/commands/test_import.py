"""`disco-jax import`: turns a PyTorch file into a run directory."""

import contextlib
import io
import json
import os
import pathlib
import pickle

import numpy as np
import pytest

import helpers
from disco_jax import main, models
from disco_jax.commands import importing
from disco_jax.convert import pickles, save
from disco_jax.errors import UserError
from disco_jax.evaluate import features
from disco_jax.run.workdir import read_config
from disco_jax.train import teacher


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A MoCo ResNet-18 checkpoint with a short queue, as torch.save writes it."""
    state = dict(helpers.recorded_state("moco_resnet18")[2])
    state["module.queue"] = state["module.queue"][:, :256]
    path = tmp_path_factory.mktemp("files") / "moco.pth.tar"
    pickles.write(path, state, {"epoch": 200, "arch": "resnet18"})
    return path


@pytest.fixture(scope="module")
def imported(file, tmp_path_factory):
    """The run directory of an import, and its printed output."""
    workdir = tmp_path_factory.mktemp("runs") / "moco"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main.main(["import", str(file), "--workdir", str(workdir)]) == 0
    return workdir, printed.getvalue()


@pytest.fixture(scope="module")
def run(imported):
    return imported[0]


def test_the_manifest_says_what_came_from_where(run, file):
    manifest = json.loads((run / importing.MANIFEST).read_text())
    assert manifest["file"] == str(file) and manifest["bytes"] == file.stat().st_size
    assert (manifest["family"], manifest["container"]) == ("moco_v2", "state_dict")
    assert manifest["network"]["backbone"] == "resnet18"
    assert manifest["parameters"]["backbone"] == pytest.approx(10.66 * 2**20, rel=1e-3)
    assert manifest["preprocessing"]["std"] == [0.229, 0.224, 0.225]
    assert manifest["queue"] == [256, 128]
    assert manifest["keys"]["module.encoder_q.fc.2.bias"] == "params/head/out/bias"
    assert "module.encoder_k.conv1.weight" in manifest["not_taken"]
    assert len(manifest["sha256"]) == 64


def test_the_directory_is_a_teacher_with_the_files_weights(run, file):
    loaded = []
    for weights in (run, file):
        spec = helpers.teacher_spec("resnet18", hidden=512, weights=str(weights))
        loaded.append(teacher.load(spec, models.build_encoder(spec), 32))
    np.testing.assert_array_equal(loaded[0].queue.vectors, loaded[1].queue.vectors)
    for a, b in zip(*(helpers.jax.tree.leaves(x.variables) for x in loaded), strict=True):
        np.testing.assert_array_equal(a, b)
    assert teacher.describe(str(run)).head == "mlp"


def test_the_directory_can_be_evaluated(run):
    trained = features.load(run)
    assert trained.step == 0 and trained.settings.student.hidden == 512
    assert trained.settings.name == "moco_v2"


def test_swavs_normalisation_goes_into_the_config(tmp_path):
    state = helpers.recorded_state("swav_resnet50")[2]
    path = tmp_path / "swav.pth"
    pickles.write(path, state)
    manifest = importing.run(str(path), str(tmp_path / "swav"))
    assert manifest["network"]["prototypes"] == [3000]
    config = read_config(tmp_path / "swav")
    assert config.augment.std == [0.228, 0.224, 0.225]
    assert not config.objectives.contrast.weight  # the file holds no queue
    weights = str(tmp_path / "swav")
    spec = teacher.fill(helpers.teacher_spec("resnet50", head="auto", weights=weights))
    assert (spec.head, spec.prototypes) == ("swav", (3000,))
    assert spec.std == (0.228, 0.224, 0.225)
    assert teacher.load(spec, models.build_encoder(spec), 32).queue is None
    assert teacher.normalisation(str(path)) == (spec.mean, spec.std)


def test_counts_are_printed_as_the_papers_count(imported):
    _, out = imported
    assert "10.66 M parameters without the head" in out and "queue of 256 keys" in out


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def bad_files(tmp_path, file):
    """Writes bad files; returns name -> text that the error message must contain."""
    whole = file.read_bytes()
    (tmp_path / "cut.pth.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("this is no checkpoint\n" * 9)
    hostile = {"state_dict": Hostile(f"touch {tmp_path / 'trap'}")}
    (tmp_path / "hostile.pth").write_bytes(pickle.dumps(hostile))
    (tmp_path / "vgg.pkl").write_bytes(
        pickle.dumps({f"features.{i}.weight": np.zeros((4, 3, 3, 3)) for i in range(9)})
    )
    return {
        "cut.pth.tar": "cut.pth.tar",
        "text.pth": "text.pth",
        "hostile.pth": "posix.system",
        "vgg.pkl": "does not hold a known network",
        "absent.pth": "does not exist",
    }


def test_a_bad_file_is_one_clear_message_and_nothing_is_left(tmp_path, file, capsys):
    for name, message in bad_files(tmp_path, file).items():
        before = sorted(p.name for p in tmp_path.iterdir())
        code = main.main(["import", str(tmp_path / name), "--workdir", str(tmp_path / "run")])
        err = capsys.readouterr().err
        assert code == 2, name
        assert message in err and "Traceback" not in err, (name, err)
        assert sorted(p.name for p in tmp_path.iterdir()) == before, name
    assert not (tmp_path / "trap").exists()


def test_an_import_that_fails_half_way_leaves_nothing(tmp_path, file, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(importing.checkpoint.Checkpoints, "save", full)
    with pytest.raises(OSError, match="No space"):
        importing.run(str(file), str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="No space"):
        importing.run(str(file), str(tmp_path / "empty"))
    assert list((tmp_path / "empty").iterdir()) == []


class Killed(BaseException):
    """A process killed at this point."""


@pytest.mark.parametrize(
    "at, place", [("claim", "there"), ("save", "new"), ("wait", "there"), ("describe", "new")]
)
def test_an_import_that_was_killed_can_be_repeated(tmp_path, at, place, monkeypatch):
    workdir, file = tmp_path / "run", tmp_path / "small.pth"
    encoder = models.build_encoder(helpers.encoder_spec("resnet8", width=4, hidden=8, dim=16))
    state = save.state_dict("resnet8", encoder, encoder.create(0, 32), "moco", with_head=True)
    save.write(file, state, "moco")
    if place == "there":
        workdir.mkdir()

    def kill(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(importing, "_remove", kill)  # a killed process removes nothing
        if at == "claim":
            patch.setattr(importing, "claim", kill)
        elif at == "describe":
            patch.setattr(importing.json, "dumps", killed_at(2, importing.json.dumps))
        else:
            patch.setattr(importing.checkpoint.Checkpoints, at, kill)
        with pytest.raises(Killed):
            importing.run(str(file), str(workdir))
    assert list(workdir.iterdir())
    importing.run(str(file), str(workdir))
    assert features.load(str(workdir)).step == 0
    assert not (workdir / importing.IMPORTING).exists()


def killed_at(call, real):
    calls = []

    def counted(*args, **rest):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return real(*args, **rest)

    return counted


def test_a_directory_in_use_is_refused(tmp_path, file, run):
    (tmp_path / "notes.txt").write_text("mine")
    for workdir in (tmp_path, run, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match=r"is not empty|is a file"):
            importing.run(str(file), str(workdir))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_mistaken_words_are_told(capsys, file):
    assert main.main(["import", str(file)]) == 2
    assert "--workdir" in capsys.readouterr().err
    assert main.main(["import", str(file), "--workdir=w", "--famly=moco_v2"]) == 2
    assert "Did you mean '--family'" in capsys.readouterr().err
    assert not pathlib.Path("w").exists()
    assert main.main(["import", "--help"]) == 0
    assert "--prefix" in capsys.readouterr().out
