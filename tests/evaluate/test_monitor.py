"""kNN during training: right, on time, and without a trace in what is learned."""

import json
import types

import jax
import numpy as np
import pytest

import helpers
from disco_jax.data.arrays import ArraySource
from disco_jax.errors import UserError
from disco_jax.evaluate import features, knn, monitor, subsets
from disco_jax.tasks import pretrain


def config(**changes):
    tiny = {"student.backbone": "tiny", "total_steps": 4}
    made = helpers.smoke_config("moco_v2", **{**tiny, **changes})
    made.monitor.update(images=70, k=5)
    return made


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
    spent = {
        name: json.loads((tmp_path / name / "goodput.json").read_text())["seconds"]["eval"]
        for name in ("watched", "alone")
    }
    assert spent["watched"] > spent["alone"] == 0
    lines = (tmp_path / "watched" / "metrics.jsonl").read_text().splitlines()
    found = {
        line["step"]: line["knn/top1"] for line in map(json.loads, lines) if "knn/top1" in line
    }
    assert sorted(found) == [3, 4]  # every third step, and the last
    one, two = (features.load(str(tmp_path / name)) for name in ("watched", "alone"))
    jax.tree.map(np.testing.assert_array_equal, one.variables, two.variables)

    test = features.of_split(one, few(), "test", 96, ("features",))
    drawn = subsets.even(test.labels, 70, watched.seed)
    scored, labels = test.features[drawn], test.labels[drawn]
    rows = scored.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    similar = rows @ rows.T
    np.fill_diagonal(similar, -np.inf)
    near = np.argsort(-similar, axis=1, kind="stable")[:, :5]
    votes = np.zeros((70, 10))
    weights = np.exp(np.take_along_axis(similar, near, 1) / 0.07)
    np.add.at(votes, (np.arange(70)[:, None], labels[near]), weights)
    assert found[4] == pytest.approx(100 * np.mean(votes.argmax(1) == labels))
    assert knn.leave_one_out(scored, labels, 5) == pytest.approx(found[4])


def sorted_noise():
    """Noise of three classes that are stored one after the other, as in a folder."""
    images = np.random.default_rng(0).integers(0, 256, (90, 16, 16, 3), np.uint8)
    return ArraySource({"test": (images, np.repeat([0, 1, 2], 30))})


def test_the_images_that_are_scored_are_of_all_classes_and_follow_the_seed():
    source, asked = sorted_noise(), config(**{"monitor.knn_every_steps": 1})
    asked.monitor.images = 24
    some, split = monitor.sample(asked, source)
    assert split == "test"
    images = [image for _, image, _ in some.pictures("test")]
    assert np.bincount([label for *_, label in some.pictures("test")]).tolist() == [8, 8, 8]
    assert some.count("test") == 24
    again = [image for _, image, _ in monitor.sample(asked, source)[0].pictures("test")]
    np.testing.assert_array_equal(images, again)
    asked.seed += 1
    other = [image for _, image, _ in monitor.sample(asked, source)[0].pictures("test")]
    assert (np.array(images) != np.array(other)).any()
    asked.monitor.images = 90
    assert monitor.sample(asked, source)[0] is source  # all of it: nothing is drawn


def test_noise_is_not_told_apart():
    """The first 24 images in the stored order are of one class, on which kNN is always right."""
    source, asked = sorted_noise(), config(**{"monitor.knn_every_steps": 1})
    asked.monitor.images = 24
    encoder = features.untrained(asked).encoder
    state = types.SimpleNamespace(student=encoder.create(0, 16))
    found = monitor.knn_of(asked, encoder, source)(1, state)
    assert found["knn/top1"] < 80


def test_unlabelled_images_are_refused_before_any_is_drawn():
    images = np.zeros((30, 4, 4), np.uint8)
    source = ArraySource({"test": (images, np.arange(30) % 3 - 1)})
    asked = config(**{"monitor.knn_every_steps": 1})
    asked.monitor.images = 24
    with pytest.raises(UserError, match="images without a label"):
        monitor.sample(asked, source)


@pytest.mark.parametrize(
    "changes, labelled, says",
    [
        ({}, False, "no labels to compare with"),
        ({"monitor.k": 70}, True, "below the 70 images"),
        ({"monitor.split": "tset"}, True, "Did you mean 'test'"),
    ],
)
def test_what_cannot_be_watched_is_told_at_the_start(changes, labelled, says):
    source = few()
    if not labelled:
        source = ArraySource({s: (x, None) for s, (x, _) in helpers.digits_splits().items()})
    with pytest.raises(UserError, match=says):
        asked = config(**{"monitor.knn_every_steps": 1})
        asked.update_from_flattened_dict(changes)
        monitor.check(asked, source)
    monitor.check(config(), source)  # not asked for, nothing to refuse
