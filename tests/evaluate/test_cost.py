"""Multiply-adds equal published values; latencies are plausible."""

import pytest

from disco_jax import models
from disco_jax.evaluate import cost


@pytest.mark.parametrize(
    "name, millions",
    [
        # torchvision's numbers include the last layer, D x 1000, which is not counted here.
        ("resnet50", 4089.2 - 2.0),
        ("mobilenetv2", 300.8 - 1.3),
        ("efficientnet_b0", 385.8 - 1.3),
    ],
)
def test_multiply_adds_are_the_published_ones(name, millions):
    measured = cost.multiply_adds(models.backbone(name), 224) / 1e6
    assert measured == pytest.approx(millions, rel=0.005)


def test_latency_is_a_time():
    measured = cost.latency(models.backbone("resnet8"), 16, repeats=3)
    assert 0 < measured["low_ms"] <= measured["median_ms"] <= measured["high_ms"]
