"""Tests of the quick start, shortened: TFDS data, three networks, table, results and figure."""

import json

import pytest

from disco_jax import flags
from disco_jax.commands import demo

# Files, table and figure for any scores; `test_learning` checks the accuracy of such networks.
pytestmark = pytest.mark.wiring


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo of 3 epochs with shallow students: (folder, results, config)."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("demo")
    config = flags.load("configs/demo.py")
    config.linear.total_epochs = 6
    config.linear.learning_rate.milestones = (3, 5)
    for name in demo.RUNS:
        config[name].total_epochs = 3
        config[name].student.backbone = "resnet8"
    return folder, demo.run(config, str(folder)), config


def test_results_are_complete_and_in_percent(finished):
    """Takes over a minute: the quick start trains three networks and evaluates four."""
    folder, results, _ = finished
    assert json.loads((folder / "results.json").read_text()) == results
    for name in ("teacher", "moco_v2", "disco", "untrained"):
        for score in ("linear_top1", "knn_top1"):
            assert 10 < results[name][score] <= 100
    assert results["seeds"] == [0]
    for name in demo.RUNS:  # TensorBoard event files
        assert list((folder / "seed_0" / name).glob("events.out.tfevents.*"))


def test_three_epochs_already_teach_something(finished):
    _, results, _ = finished
    assert results["teacher"]["knn_top1"] > results["untrained"]["knn_top1"] + 5


def test_several_seeds_are_summed_up_by_mean_and_standard_deviation():
    by_seed = {
        seed: {"disco": {"linear_top1": 90.0 + seed, "knn_top1": 80.0}} for seed in (0, 2, 4)
    }
    assert demo._summary(by_seed, "disco") == {
        "linear_top1": 92.0,
        "linear_top1_spread": 2.0,
        "knn_top1": 80.0,
        "knn_top1_spread": 0.0,
    }


def test_the_picture_is_a_picture(finished):
    from PIL import Image

    folder, _, _ = finished
    picture = Image.open(folder / "figure.png")
    assert picture.size[0] > 800 and len(picture.convert("RGB").getcolors(2**24)) > 50


def test_started_again_it_trains_nothing_anew(finished, capsys):
    folder, results, config = finished
    again = demo.run(config, str(folder))
    out = capsys.readouterr().out
    assert out.count("is finished") == 3 and "images/s" not in out
    assert {n: again[n] for n in demo.TITLES} == {n: results[n] for n in demo.TITLES}
