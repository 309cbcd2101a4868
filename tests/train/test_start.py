"""Students that start from the weights of a run, an import or a file, with or without the head."""

import shutil

import jax
import numpy as np
import pytest

import helpers
from disco_jax import models
from disco_jax.commands import importing
from disco_jax.convert import save
from disco_jax.data.arrays import ArraySource
from disco_jax.errors import UserError
from disco_jax.evaluate import features, open_model
from disco_jax.run import checkpoint
from disco_jax.train import session, start
from disco_jax.train.experiment import parse
from disco_jax.workflows import joint_runs, pretrain


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with helpers.tiny_backbone():
        yield


@pytest.fixture(scope="module")
def source():
    return ArraySource(helpers.digits_splits())


def config_of(**changes):
    fields = {"batch_size": 64, "total_steps": 2, "momentum.ema_rate": 1, **changes}
    return helpers.tiny_config("moco_v2", **fields)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run whose weights differ from those of a fresh student."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    changes = {"student.backbone": "tiny", "student.hidden": 24}
    return helpers.network_run(folder, "none.npz", seed=7, **changes)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Path of a PyTorch file with a ResNet-8 and a head."""
    encoder = models.build_encoder(helpers.encoder_spec("resnet8", width=4, hidden=24, dim=16))
    state = save.state_dict("resnet8", encoder, encoder.create(7, 32), "moco", with_head=True)
    path = tmp_path_factory.mktemp("files") / "small.pth"
    save.write(path, state, "moco")
    return path


def prepared(config, source, workdir):
    return session.fresh(pretrain.starting(pretrain.prepare(config, source), str(workdir)))


def equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, dict(actual), dict(expected))


def differ(first, second):
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return any(not np.array_equal(a, b) for a, b in pairs)


def test_a_student_and_its_ema_copy_start_from_a_runs_backbone(run, source, tmp_path):
    config = config_of(**{"student.weights": run, "student.hidden": 16})
    begin = prepared(config, source, tmp_path)
    expected = features.load(run).variables
    for network in (begin.student, begin.momentum):
        for collection in ("params", "batch_stats"):
            equal(network[collection]["backbone"], expected[collection]["backbone"])
    fresh = prepared(config_of(**{"student.hidden": 16}), source, tmp_path)
    equal(begin.student["params"]["head"], fresh.student["params"]["head"])
    assert differ(begin.student["params"]["backbone"], fresh.student["params"]["backbone"])


def test_a_student_starts_with_its_head_too(run, source, tmp_path):
    fields = {"student.weights": run, "student.hidden": 24, "student.start": "all"}
    begin = prepared(config_of(**fields), source, tmp_path)
    equal(begin.student, features.load(run).variables)
    equal(begin.momentum, begin.student)


@pytest.mark.parametrize("imported", [False, True])
@pytest.mark.parametrize("part", start.PARTS)
def test_a_student_starts_from_a_file_and_from_its_import(imported, part, file, source, tmp_path):
    weights = str(file)
    if imported:
        weights = str(tmp_path / "import")
        importing.run(str(file), weights)
    config = helpers.smoke_config(
        "moco_v2", **{"student.weights": weights, "student.start": part, "student.hidden": 24}
    )
    config.student.dim = 16
    begin = prepared(config, source, tmp_path / "run")
    expected = open_model.open_model(str(file)).variables
    equal(begin.student["params"]["backbone"], expected["params"]["backbone"])
    assert differ(begin.student["params"]["head"], expected["params"]["head"]) == (part != "all")


def test_a_distilled_student_starts_from_weights_beside_its_teacher(run, source, tmp_path):
    config = helpers.tiny_config("disco", batch_size=64, **{"student.weights": run})
    begin = prepared(config, source, tmp_path)
    equal(begin.student["params"]["backbone"], features.load(run).variables["params"]["backbone"])


@pytest.mark.wiring  # compares arrays that must not change
def test_a_run_goes_on_without_the_weights_that_it_started_from(
    run, source, tmp_path, monkeypatch, capsys
):
    weights, workdir = str(shutil.copytree(run, tmp_path / "given")), str(tmp_path / "run")
    config = config_of(**{"student.weights": weights, "student.hidden": 16})
    helpers.compile_once(monkeypatch)
    pretrain.run(config, workdir, source)
    assert f"student initialized from {weights}" in capsys.readouterr().out
    momentum, _ = checkpoint.load(workdir, "momentum", _like(config))
    equal(momentum["params"]["backbone"], features.load(run).variables["params"]["backbone"])
    shutil.rmtree(weights)
    assert pretrain.run(config, workdir, source)["step"] == 2
    with pytest.raises(UserError, match=r"config\.student\.weights='.*given' does not exist"):
        pretrain.run(config, str(tmp_path / "other"), source)
    assert not (tmp_path / "other").exists()


def _like(config):
    encoder = models.build_encoder(parse(config).student)
    return jax.eval_shape(lambda: encoder.create(0, config.augment.size))


def test_students_that_train_together_start_each_from_its_own_weights(
    run, source, tmp_path, monkeypatch
):
    begun = {}

    def stop(checkpoints, fresh):
        begun.update(fresh)
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "resume", stop)
    configs = {name: config_of(**{"student.hidden": 16}) for name in ("left", "right")}
    configs["left"].student.weights = run
    with pytest.raises(KeyboardInterrupt):
        joint_runs.run(configs, {name: str(tmp_path / name) for name in configs}, source)
    expected = features.load(run).variables["params"]["backbone"]
    equal(begun["left"].student["params"]["backbone"], expected)
    assert differ(begun["right"].student["params"]["backbone"], expected)


def test_weights_of_another_network_are_refused_with_the_fields_to_set(run, file, source, tmp_path):
    for fields, message in (
        ({"student.width": 8}, r"do not fit: config\.student\.width=8, but the weights have 4\."),
        ({"student.backbone": "resnet14"}, "backbone='resnet14', but the weights have 'tiny'"),
        (
            {"student.start": "all", "student.hidden": 32},
            r"hidden=32, but the weights have 24 \(config\.student\.start=backbone loads no head",
        ),
        (
            {"student.start": "all", "student.head": "none"},
            "head='none', but the weights have 'mlp'",
        ),
    ):
        config = config_of(**{"student.weights": run, **fields})
        with pytest.raises(UserError, match=message) as error:
            prepared(config, source, tmp_path)
        assert "\n" not in str(error.value)
    config = config_of(**{"student.weights": str(file)})
    with pytest.raises(UserError, match="backbone='tiny', but the weights have 'resnet8'"):
        prepared(config, source, tmp_path)


@pytest.mark.parametrize(
    "recipe, fields, message",
    [
        ("moco_v2", {"student.start": "all"}, r"student\.weights, which is empty"),
        ("moco_v2", {"student.weights": "random"}, "Leave it empty"),
        ("moco_v2", {"student.weights": "w", "student.start": "al"}, "Did you mean 'all'"),
        ("moco_v2", {"student.weights": "w", "student.network": "teacher"}, "student.network="),
        ("retro", {"student.weights": "w", "student.start": "all"}, "both set the head"),
    ],
)
def test_fields_that_contradict_one_another_are_refused(recipe, fields, message, source):
    with pytest.raises(UserError, match=message):
        pretrain.prepare(helpers.tiny_config(recipe, batch_size=64, **fields), source)


def test_weights_for_images_normalised_otherwise_are_told(run, source, tmp_path, caplog):
    config = config_of(**{"student.weights": run})
    config.augment.mean = (0.5, 0.5, 0.5)
    prepared(config, source, tmp_path)
    assert "weights trained on images normalised by mean" in caplog.text


def test_a_directory_of_something_else_is_refused(source, tmp_path):
    folder = tmp_path / "probe"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not the directory of a pretraining run"):
        prepared(config_of(**{"student.weights": str(folder)}), source, tmp_path)
