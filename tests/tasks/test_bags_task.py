"""Bags from a teacher's features, and the runs that read them."""

import numpy as np
import pytest

import helpers
from disco_jax import flags
from disco_jax.data.arrays import ArraySource
from disco_jax.data.bags import Bags
from disco_jax.errors import UserError
from disco_jax.evaluate import knn
from disco_jax.evaluate.kmeans import kmeans
from disco_jax.ops.losses import unit
from disco_jax.tasks import bags, pretrain


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory):
    """Runs that differ in their files alone are one program."""
    with helpers.programs_kept(tmp_path_factory.mktemp("programs")), helpers.tiny_networks():
        yield


@pytest.fixture(scope="module")
def source():
    made = helpers.digits()
    return ArraySource({"train": (made["train_images"][:200], made["train_labels"][:200])})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    np.savez(folder / "digits.npz", **helpers.digits())
    queueless = {"objectives.contrast.weight": 0.0}  # else the run's queue is looked for
    return helpers.network_run(folder / "run", folder / "digits.npz", **queueless)


def settings(teacher, **changes):
    config = flags.load("bags:data=digits")
    config.update(teacher=teacher, batch_size=64, **changes)
    return config


@pytest.fixture(scope="module")
def made(tmp_path_factory, teacher, source):
    """Kind -> folder."""
    folders = {kind: str(tmp_path_factory.mktemp(kind)) for kind in ("knn", "kmeans")}
    bags.run(settings(teacher), folders["knn"], source)
    bags.run(settings(teacher, kind="kmeans", clusters=16), folders["kmeans"], source)
    return folders


def test_neighbours_are_the_nearest_but_oneself(made, teacher, source):
    found = Bags.load(f"{made['knn']}/bags.npz").neighbours
    assert found.shape == (200, 5) and (found != np.arange(200)[:, None]).all()
    rows = bags._encode(settings(teacher), source)
    similarities = np.asarray(unit(rows)) @ np.asarray(unit(rows)).T
    np.fill_diagonal(similarities, -2)
    chosen = np.take_along_axis(similarities, found, axis=1)
    best = -np.sort(-similarities, axis=1)[:, :5]
    np.testing.assert_allclose(chosen, best, atol=1e-5)


@pytest.mark.wiring  # bags of both kinds reach the step, which has tests of its own
def test_bingo_learns_from_neighbours_and_from_clusters(made, teacher, source, tmp_path):
    for kind, folder in made.items():
        config = helpers.smoke_config("bingo")
        config.teacher.update(head="auto", weights=teacher)
        config.bags.file = f"{folder}/bags.npz"
        result = pretrain.run(config, str(tmp_path / kind), source)
        assert result["step"] == 2


@pytest.mark.wiring  # likewise
def test_pseudo_labels_need_as_many_prototypes_as_clusters(made, source, tmp_path):
    config = helpers.smoke_config("pseudo_labels:clusters=16")
    config.bags.file = f"{made['kmeans']}/bags.npz"
    assert pretrain.run(config, str(tmp_path / "run"), source)["step"] == 2
    config.student.prototypes = (8,)
    with pytest.raises(UserError, match=r"prototypes=\(8,\) are fewer than the 16 clusters"):
        pretrain.prepare(config, source)
    config.bags.update(file=f"{made['knn']}/bags.npz", sampling="images")
    with pytest.raises(UserError, match=r"needs clusters, but config\.bags\.file contains neighbours"):
        pretrain.prepare(config, source)


def test_bags_that_nobody_reads_are_refused(made, source):
    config = helpers.smoke_config("moco_v2", **{"bags.file": f"{made['knn']}/bags.npz"})
    with pytest.raises(UserError, match="no objective reads bags"):
        pretrain.prepare(config, source)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "kmean"}, "Did you mean 'kmeans'"),
        ({"output": "feature"}, "Did you mean 'features'"),
        ({"neighbours": 200}, "between 1 and 199"),
        ({"kind": "kmeans", "clusters": 201}, "between 1 and the 200 images"),
        ({"teacher": ""}, "config.teacher is empty"),
        ({"teacher": "/no/such"}, "does not exist"),
    ],
)
def test_mistakes(teacher, source, changes, message, tmp_path):
    config = settings(teacher)
    config.update(changes)
    with pytest.raises(UserError, match=message):
        bags.run(config, str(tmp_path / "bags"), source)
    assert not (tmp_path / "bags").exists()


def test_kmeans_finds_groups_and_leaves_no_cluster_empty():
    rng = np.random.default_rng(0)
    centres = np.eye(8, dtype="f")[:6]
    groups = np.repeat(np.arange(6), 20)
    rows = (centres[groups] + 0.05 * rng.normal(size=(120, 8))).astype("f")
    centroids, labels = kmeans(rows, 6, seed=1, block=50)
    # Every group but those that share a start is one cluster; the assignment is the nearest.
    nearest = np.argmax(np.asarray(unit(rows)) @ centroids.T, axis=1)
    np.testing.assert_array_equal(labels, nearest)
    assert len(set(labels)) == 6
    assert np.mean([np.bincount(labels[groups == g]).max() for g in range(6)]) > 15
    np.testing.assert_array_equal(kmeans(rows, 6, seed=1)[1], labels)
    assert knn.neighbours(rows, rows, 1)[1].shape == (120, 1)
