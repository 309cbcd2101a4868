"""kNN during training: correct, at the right steps, and without effect on the weights."""

import json
import types

import jax
import numpy as np
import pytest

import helpers
from disco_jax.data.arrays import ArraySource
from disco_jax.errors import UserError
from disco_jax.evaluate import features, knn, monitor, subsets
from disco_jax.train.experiment import parse
from disco_jax.train.monitored import check
from disco_jax.workflows import pretrain


def config(**changes):
    tiny = {"student.backbone": "tiny", "total_steps": 4}
    smoke = helpers.only_cropped(helpers.smoke_config("moco_v2", **{**tiny, **changes}))
    smoke.monitor.update(images=70, k=5)
    return smoke


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with helpers.tiny_backbone():
        yield


def few():
    return ArraySource({s: (x[:96], y[:96]) for s, (x, y) in helpers.digits_splits().items()})


def test_the_run_is_watched_and_left_alone(tmp_path):
    watched = config(**{"monitor.knn_every_steps": 3})
    pretrain.run(watched, str(tmp_path / "watched"), few())
    pretrain.run(config(), str(tmp_path / "alone"), few())
    eval_seconds = {
        name: json.loads((tmp_path / name / "goodput.json").read_text())["seconds"]["eval"]
        for name in ("watched", "alone")
    }
    assert eval_seconds["watched"] > eval_seconds["alone"] == 0
    lines = (tmp_path / "watched" / "metrics.jsonl").read_text().splitlines()
    logged = {
        line["step"]: line["knn/top1"] for line in map(json.loads, lines) if "knn/top1" in line
    }
    assert sorted(logged) == [3, 4]  # every third step, and the last
    one, two = (features.load(str(tmp_path / name)) for name in ("watched", "alone"))
    jax.tree.map(np.testing.assert_array_equal, one.variables, two.variables)

    test = features.of_split(one, few(), "test", 96, ("features",))
    sampled = subsets.even(test.labels, 70, watched.seed)
    scored, labels = test.features[sampled], test.labels[sampled]
    rows = scored.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    similar = rows @ rows.T
    np.fill_diagonal(similar, -np.inf)
    near = np.argsort(-similar, axis=1, kind="stable")[:, :5]
    votes = np.zeros((70, 10))
    weights = np.exp(np.take_along_axis(similar, near, 1) / 0.07)
    np.add.at(votes, (np.arange(70)[:, None], labels[near]), weights)
    assert logged[4] == pytest.approx(100 * np.mean(votes.argmax(1) == labels))
    assert knn.leave_one_out(scored, labels, 5) == pytest.approx(logged[4])


def sorted_noise():
    """Generates noise images of three classes, stored class by class as in a folder."""
    images = np.random.default_rng(0).integers(0, 256, (90, 16, 16, 3), np.uint8)
    return ArraySource({"test": (images, np.repeat([0, 1, 2], 30))})


def sample(config, source):
    """Calls `monitor.sample` with typed settings."""
    return monitor.sample(parse(config), source)


def test_the_images_that_are_scored_are_of_all_classes_and_follow_the_seed():
    source, monitored = sorted_noise(), config(**{"monitor.knn_every_steps": 1})
    monitored.monitor.images = 24
    sampled, split = sample(monitored, source)
    assert split == "test"
    images = [image for _, image, _ in sampled.iter_images("test")]
    assert np.bincount([label for *_, label in sampled.iter_images("test")]).tolist() == [8, 8, 8]
    assert sampled.count("test") == 24
    again = [image for _, image, _ in sample(monitored, source)[0].iter_images("test")]
    np.testing.assert_array_equal(images, again)
    monitored.seed += 1
    other = [image for _, image, _ in sample(monitored, source)[0].iter_images("test")]
    assert (np.array(images) != np.array(other)).any()
    monitored.monitor.images = 90
    assert sample(monitored, source)[0] is source  # the whole split needs no sampling


def test_noise_is_not_classified():
    """The first 24 stored images belong to one class, for which kNN is always correct."""
    source, monitored = sorted_noise(), config(**{"monitor.knn_every_steps": 1})
    monitored.monitor.images = 24
    encoder = features.untrained(parse(monitored)).encoder
    state = types.SimpleNamespace(student=encoder.create(0, 16))
    metrics = monitor.knn_of(parse(monitored), encoder, source)(1, state)
    assert metrics["knn/top1"] < 80


def test_unlabelled_images_are_refused_before_any_is_drawn():
    images = np.zeros((30, 4, 4), np.uint8)
    source = ArraySource({"test": (images, np.arange(30) % 3 - 1)})
    monitored = config(**{"monitor.knn_every_steps": 1})
    monitored.monitor.images = 24
    with pytest.raises(UserError, match="images without a label"):
        sample(monitored, source)


@pytest.mark.parametrize(
    "changes, labelled, message",
    [
        ({}, False, "needs labels"),
        ({"monitor.k": 70}, True, "below the 70 images"),
        ({"monitor.split": "tset"}, True, "Did you mean 'test'"),
    ],
)
def test_what_cannot_be_watched_is_told_at_the_start(changes, labelled, message):
    source = few()
    if not labelled:
        source = ArraySource({s: (x, None) for s, (x, _) in helpers.digits_splits().items()})
    with pytest.raises(UserError, match=message):
        with_monitor = config(**{"monitor.knn_every_steps": 1})
        with_monitor.update_from_flattened_dict(changes)
        check(parse(with_monitor), source)
    check(parse(config()), source)  # monitoring is off, so nothing is checked
