"""SwAV and DINO learn from digits what an untrained network does not know."""

import pytest

import helpers
from disco_jax import flags
from disco_jax.data.arrays import ArraySource
from disco_jax.evaluate import features
from disco_jax.tasks import knn, pretrain

SMALL = {"student.width": 8, "student.hidden": 64, "student.dim": 16, "log.every_steps": 100}


def knn_top1(trained, source):
    config = flags.load("knn")
    splits = [features.of_split(trained, source, split, 256) for split in ("train", "test")]
    return knn.accuracy(config, *splits)["top1"]


@pytest.mark.slow
def test_swav_learns_digits(tmp_path):
    """Two views, 25 epochs: 91 % of held-out digits, measured; 79 % before training."""
    source = ArraySource(helpers.digits_splits())
    config = flags.load("swav:student=resnet8,data=digits")
    config.update_from_flattened_dict({**SMALL, "total_epochs": 25, "local.count": 0})
    pretrain.run(config, str(tmp_path), source)
    before, after = (
        knn_top1(t, source) for t in (features.untrained(config), features.load(str(tmp_path)))
    )
    assert after > 85 and after > before + 4, (before, after)
