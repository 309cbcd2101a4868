"""Tests of bags computed from a teacher's features, and of runs that read them."""

import numpy as np
import pytest

import helpers
from disco_jax import flags
from disco_jax.commands import bags
from disco_jax.data.arrays import ArraySource
from disco_jax.data.bags import Bags
from disco_jax.errors import UserError
from disco_jax.evaluate import knn
from disco_jax.evaluate.kmeans import kmeans
from disco_jax.ops.vectors import l2_normalize
from disco_jax.workflows import pretrain


@pytest.fixture(scope="module", autouse=True)
def shared_programs(tmp_path_factory):
    """Shares compiled programs between runs that differ only in their files."""
    with helpers.programs_kept(tmp_path_factory.mktemp("programs")), helpers.tiny_networks():
        yield


@pytest.fixture(scope="module")
def source():
    digits = helpers.digits()
    return ArraySource({"train": (digits["train_images"][:200], digits["train_labels"][:200])})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    np.savez(folder / "digits.npz", **helpers.digits())
    queueless = {"objectives.contrast.weight": 0.0}  # otherwise the run must have a queue
    return helpers.network_run(folder / "run", folder / "digits.npz", **queueless)


def settings(teacher, **changes):
    config = flags.load("bags:data=digits")
    config.update(teacher=teacher, batch_size=64, **changes)
    return config


@pytest.fixture(scope="module")
def bag_folders(tmp_path_factory, teacher, source):
    """Map from kind to the folder with bags of this kind."""
    folders = {kind: str(tmp_path_factory.mktemp(kind)) for kind in ("knn", "kmeans")}
    bags.run(settings(teacher), folders["knn"], source)
    bags.run(settings(teacher, kind="kmeans", clusters=16), folders["kmeans"], source)
    return folders


def test_neighbours_are_the_nearest_but_oneself(bag_folders, teacher, source):
    neighbours = Bags.load(f"{bag_folders['knn']}/bags.npz").neighbours
    assert neighbours.shape == (200, 5) and (neighbours != np.arange(200)[:, None]).all()
    rows = bags._encode(settings(teacher), source)
    similarities = np.asarray(l2_normalize(rows)) @ np.asarray(l2_normalize(rows)).T
    np.fill_diagonal(similarities, -2)
    chosen = np.take_along_axis(similarities, neighbours, axis=1)
    best = -np.sort(-similarities, axis=1)[:, :5]
    np.testing.assert_allclose(chosen, best, atol=1e-5)


@pytest.mark.wiring  # checks that the bags reach the step, which is tested elsewhere
def test_bingo_learns_from_neighbours_and_from_clusters(bag_folders, teacher, source, tmp_path):
    for kind, folder in bag_folders.items():
        config = helpers.smoke_config("bingo")
        config.teacher.update(head="auto", weights=teacher)
        config.bags.file = f"{folder}/bags.npz"
        result = pretrain.run(config, str(tmp_path / kind), source)
        assert result["step"] == 2


@pytest.mark.wiring  # checks that the clusters reach the step
def test_pseudo_labels_need_as_many_prototypes_as_clusters(bag_folders, source, tmp_path):
    config = helpers.smoke_config("pseudo_labels:clusters=16")
    config.bags.file = f"{bag_folders['kmeans']}/bags.npz"
    assert pretrain.run(config, str(tmp_path / "run"), source)["step"] == 2
    config.student.prototypes = (8,)
    with pytest.raises(UserError, match=r"prototypes=\(8,\) are fewer than the 16 clusters"):
        pretrain.prepare(config, source)
    config.bags.update(file=f"{bag_folders['knn']}/bags.npz", sampling="images")
    with pytest.raises(
        UserError, match=r"needs clusters, but config\.bags\.file contains neighbours"
    ):
        pretrain.prepare(config, source)


def test_bags_that_nobody_reads_are_refused(bag_folders, source):
    config = helpers.smoke_config("moco_v2", **{"bags.file": f"{bag_folders['knn']}/bags.npz"})
    with pytest.raises(UserError, match="no objective reads bags"):
        pretrain.prepare(config, source)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "kmean"}, "Did you mean 'kmeans'"),
        ({"output": "feature"}, "Did you mean 'features'"),
        ({"neighbours": 200}, "between 1 and 199"),
        ({"kind": "kmeans", "clusters": 201}, "between 1 and the number of images, 200"),
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
    # Each group is one cluster unless two groups share a start. Rows go to the nearest centroid.
    nearest = np.argmax(np.asarray(l2_normalize(rows)) @ centroids.T, axis=1)
    np.testing.assert_array_equal(labels, nearest)
    assert len(set(labels)) == 6
    assert np.mean([np.bincount(labels[groups == g]).max() for g in range(6)]) > 15
    np.testing.assert_array_equal(kmeans(rows, 6, seed=1)[1], labels)
    assert knn.neighbours(rows, rows, 1)[1].shape == (120, 1)
