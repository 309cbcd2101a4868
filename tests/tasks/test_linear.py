"""Probes, few labels, transfer and fine-tuning of a run, from config to results' files."""

import json
import pathlib

import jax
import numpy as np
import pytest

import helpers
from disco_jax import flags
from disco_jax.data import chosen
from disco_jax.data.arrays import ArraySource
from disco_jax.errors import UserError
from disco_jax.evaluate import features, saved, streamed
from disco_jax.tasks import linear


def few(count=96):
    """The first digits: enough for every class, few enough to be quick."""
    return {
        key: value[: count if key.startswith("train") else 60]
        for key, value in helpers.digits().items()
    }


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "few.npz"
    np.savez(path, **few())
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_file):
    return helpers.network_run(tmp_path_factory.mktemp("runs") / "run", data_file)


def quick(recipe, **changes):
    """A recipe with two epochs of small batches."""
    config = flags.load(recipe)
    short = {"total_epochs": 2, "batch_size": 32, "learning_rate.per_256": 0.5}
    config.update_from_flattened_dict({**short, **changes})
    return config


def metrics(run, name):
    lines = pathlib.Path(run, name, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_cached_probe_leaves_what_it_found(run):
    result = linear.run(quick("linear", total_epochs=20, evaluate_every_epochs=5), run)
    written = json.loads(pathlib.Path(run, "linear.json").read_text())
    assert written == result
    assert result["images"] == 60 and len(result["class_top1"]) == 10
    low, high = result["top1_interval"]
    assert low < result["top1"] < high and result["best_top1"] >= result["top1"]
    with np.load(f"{run}/linear.npz") as kept:
        assert kept["confusion"].sum() == 60
        assert 100 * np.trace(kept["confusion"]) / 60 == pytest.approx(result["top1"])


def test_crops_and_flips_go_through_the_same_loop_and_leave_the_network_alone(run):
    config = quick("linear:protocol=moco", evaluate_every_epochs=1)
    result = linear.run(config, run)
    lines = metrics(run, "linear_moco")
    assert [line["step"] for line in lines if "test/top1" in line] == [3, 6]
    assert result["best_top1"] == max(line.get("test/top1", 0) for line in lines)
    teacher = saved.read(f"{run}/linear_moco")
    jax.tree.map(
        np.testing.assert_array_equal, teacher.trained.variables, features.load(run).variables
    )
    config.seed = 1
    with pytest.raises(UserError, match=r"evaluation.seed: 0 -> 1[\s\S]*config.name"):
        linear.run(config, run)
    config.seed = 0
    assert linear.run(config, run) == result  # nothing is trained again


def test_devices_do_not_change_a_streamed_probe(run):
    """One device and four, whose last batches of the test images are partial."""
    trained = features.load(run)
    config = quick("linear:protocol=moco")
    found = []
    for devices in (1, 4):
        with helpers.devices(devices):
            _, layer = streamed.train(config, trained, ArraySource(splits()), None)
            test = features.of_split(trained, ArraySource(splits()), "test", 24)
            found.append((layer.scores(test.features), test.labels))
    np.testing.assert_array_equal(found[0][1], few()["test_labels"])
    np.testing.assert_array_equal(found[0][1], found[1][1])
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)


def splits():
    made = few()
    return {s: (made[f"{s}_images"], made[f"{s}_labels"]) for s in ("train", "test")}
