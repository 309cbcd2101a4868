"""Tests of few-shot evaluation, information plane, t-SNE and cost table: files and figures."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

import helpers
from disco_jax import flags
from disco_jax.commands import cost, fewshot, plane, tsne
from disco_jax.errors import UserError
from disco_jax.evaluate import features, ridge, scores, subsets, target

# Checks that files and figures exist and are consistent, for any scores.
pytestmark = pytest.mark.wiring


@pytest.fixture(scope="module", autouse=True)
def shared_programs(tmp_path_factory):
    """Shares compiled programs between runs that differ only in their weights."""
    with helpers.programs_kept(tmp_path_factory.mktemp("programs")), helpers.tiny_networks():
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs on a part of the digits."""
    folder = tmp_path_factory.mktemp("runs")
    digits = helpers.digits()
    few = {key: value[: 128 if key.startswith("train") else 80] for key, value in digits.items()}
    np.savez(folder / "few.npz", **few)
    names = ("teacher", "student")
    return [
        helpers.network_run(folder / name, folder / "few.npz", seed=i)
        for i, name in enumerate(names)
    ]


def read(run, name):
    return json.loads(pathlib.Path(run, f"{name}.json").read_text())


def is_drawn(file):
    """Returns True if a figure exists and is not blank."""
    with Image.open(file) as image:
        return image.width > 400 and len(np.unique(np.asarray(image.convert("L")))) > 20


def test_few_shots_are_the_same_for_a_seed_and_better_with_more(runs):
    config = flags.load("fewshot")
    config.shots = (1, 6)
    result = fewshot.run(config, runs[0])
    assert result == read(runs[0], "fewshot") == fewshot.run(config, runs[0])
    few, more = result["shots"]["1"], result["shots"]["6"]
    assert len(few["by_seed"]) == 3 and few["top1"] == pytest.approx(np.mean(few["by_seed"]))
    assert 10 < few["top1"] < more["top1"]
    trained, source = target.opened(features.load(runs[0]))
    train, test = (features.of_split(trained, source, split, 64) for split in ("train", "test"))
    rows = subsets.balanced(train.labels, 6, seed=1)
    kernel, bias = ridge.fit(train.features[rows], train.labels[rows], 10)
    by_hand = scores.top_k(test.features @ kernel + bias, test.labels, 1)
    assert more["by_seed"][1] == pytest.approx(by_hand)
    config.shots = (40,)
    with pytest.raises(UserError, match=r"fewer than the 40[\s\S]*config.shots"):
        fewshot.run(config, runs[0])
    config.shots = ()
    with pytest.raises(UserError, match=r"config.shots=\(\)"):
        fewshot.run(config, runs[0])


def short_plane(**changes):
    config = flags.load("plane")
    config.update_from_flattened_dict(
        {"total_epochs": 4, "batch_size": 64, "information_plane.points": 4, **changes}
    )
    return config


def test_a_way_through_the_plane(runs):
    result = plane.run(short_plane(), runs[0])
    assert [point["step"] for point in result["path"]] == [2, 4, 6, 8]
    for point in result["path"]:
        assert 0 <= point["label_bits"] <= min(point["input_bits"], np.log2(10)) + 1e-9
        assert point["input_bits"] <= np.log2(80) + 1e-9
    assert result == read(runs[0], "plane")
    second = plane.run(short_plane(**{"information_plane.beside": (runs[0],)}), runs[1])
    assert second["path"] != result["path"]
    assert is_drawn(pathlib.Path(runs[1], "plane.png"))


def test_the_plane_of_the_official_code_follows_a_probe_on_training_images(runs):
    """cifar_main_lincls.py: each step of the first epoch, then the end of each epoch."""
    config = flags.load("plane:protocol=code")
    plane_fields = config.information_plane
    assert (config.layers, config.norm, config.total_epochs) == ("classifier", "running", 200)
    assert (config.learning_rate.base_lr, config.learning_rate.decay) == (3.0, "constant")
    assert (plane_fields.split, plane_fields.images) == ("train", 1000)
    config.update(total_epochs=3, batch_size=32, report=False)
    plane_fields.images = 100
    result = plane.run(config, runs[0])
    assert result["name"] == "plane_code"
    assert [point["step"] for point in result["path"]] == [1, 2, 3, 4, 8, 12]
    assert {point["most_bits"] for point in result["path"]} == {np.log2(100)}


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"information_plane.points": 1}, "config.information_plane.points=1"),
        ({"information_plane.grouping": "row"}, "Did you mean 'rows'"),
        ({"information_plane.beside": ("/no/run",)}, "disco-jax plane --workdir /no/run"),
    ],
)
def test_a_plane_that_cannot_be_is_refused_first(runs, changes, says):
    with pytest.raises(UserError, match=says):
        plane.run(short_plane(**changes, name="wrong"), runs[0])
    assert not pathlib.Path(runs[0], "wrong").exists()


def test_pictures_of_several_runs_side_by_side(runs):
    config = flags.load("tsne")
    config.update(beside=(runs[1],), classes=(1, 4, 7), images_per_class=8, perplexity=5.0)
    result = tsne.run(config, runs[0])
    assert result["classes"] == [1, 4, 7] and set(result["neighbours_top1"]) == {
        "teacher",
        "student",
    }
    with np.load(f"{runs[0]}/tsne.npz") as saved:
        assert saved["places_0"].shape == saved["places_1"].shape == (result["images"], 2)
        assert set(saved["labels"]) == {1, 4, 7}
    assert is_drawn(pathlib.Path(runs[0], "tsne.png"))
    for field, value, says in [
        ("classes", (1, 12), "no image of class 12"),
        ("names", ("one",), "1 names for 3"),
        ("titles", ("one",), "1 titles for 2 runs"),
        ("perplexity", 100.0, "below the"),
    ]:
        wrong = config.copy_and_resolve_references()
        wrong[field] = value
        with pytest.raises(UserError, match=says):
            tsne.run(wrong, runs[0])


def test_the_distance_of_a_map_is_scikit_learns_default_or_the_cosine(runs, monkeypatch):
    sklearn, metrics = pytest.importorskip("sklearn.manifold"), []

    class Recorded:
        def __init__(self, metric, **_):
            metrics.append(metric)

        def fit_transform(self, rows):
            return rows[:, :2]

    assert sklearn.TSNE().metric == flags.load("tsne").metric == "euclidean"
    monkeypatch.setattr(sklearn, "TSNE", Recorded)
    config = flags.load("tsne:protocol=disco")
    assert (config.classes, config.images_per_class) == (tuple(range(5, 15)), 50)
    config.update(name="tsne_metric", classes=(1, 4), images_per_class=8, perplexity=5.0)
    for config.metric in ("euclidean", "cosine"):
        tsne.run(config, runs[0])
    assert metrics == ["euclidean", "cosine"]


def test_costs_stand_beside_accuracies(runs, tmp_path):
    pathlib.Path(runs[0], "linear.json").write_text(json.dumps({"top1": 61.5}))
    config = flags.load("cost")
    config.update(students=("resnet8",), size=16, runs=tuple(runs), repeats=2)
    rows = cost.run(config, str(tmp_path))["rows"]
    assert [row["top1"] for row in rows] == [None, 61.5, None]
    assert rows[1]["parameters"] == rows[2]["parameters"] < rows[0]["parameters"]
    assert rows[1]["median_ms"] == rows[2]["median_ms"]  # one network, measured once
    assert is_drawn(tmp_path / "cost.png")
    config.students = ("resnet19",)
    with pytest.raises(UserError, match="Did you mean 'resnet1"):
        cost.run(config, str(tmp_path))
    config.update(students=(), runs=())
    with pytest.raises(UserError, match="Nothing to measure"):
        cost.run(config, str(tmp_path))
